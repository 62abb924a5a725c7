"""Where a text is split into sentences.

Nothing but the standard library is imported: the processes of `slope_pl.data.text_workers` start with this module.
"""

import re
from typing import Literal

Sentences = Literal["prose", "lines"]

# An end mark with closing quotes or brackets behind it and white space, or one of the full-width marks, or an empty line.
# The pattern is part of the fingerprint of what was prepared: `_END` finds the same, five times as fast, because the
# first character is one of a set, which `re` skips to.
_RULE = r"""[.!?…]+["'”’»)\]]*(\s+)|[。！？]+["'”’」』）]*|\n[ \t\r]*\n\s*"""
_END = re.compile(
    r"""[.!?…。！？\n](?:(?<=[.!?…])[.!?…]*["'”’»)\]]*(\s+)|(?<=[。！？])[。！？]*["'”’」』）]*|(?<=\n)[ \t\r]*\n\s*)"""
)
_OPENING = "\"'“‘«([-—–"
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'“‘])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Rev|Gen|Col|Capt|Lt|Sgt|vs|e\.g|i\.e|cf)\.$"
)
RULES = f"{_RULE} {_ABBREVIATION.pattern}"
"""What decides where prose is split; shards that were prepared by other rules are not those of this program."""


def split_sentences(text: str, sentences: Sentences = "prose") -> list[str]:
    """Split a document into sentences, none of them empty.

    Args:
        text: The document.
        sentences: ``"prose"``: at an empty line, and after a full stop, question or exclamation mark that white space
            follows and then no small letter; not after initials and common abbreviations of English. A line break alone
            ends nothing: texts are often wrapped. ``"lines"``: each line is a sentence already.

    Returns:
        The sentences without the white space around them; joined, they hold every other character of the text.
    """
    if sentences == "lines":
        return [sentence for line in text.split("\n") if (sentence := line.strip())]
    found, start = [], 0
    for match in _END.finditer(text):
        if match[1] is not None and not _ends(text, match):
            continue
        found.append(text[start : match.end()])
        start = match.end()
    return [sentence for part in (*found, text[start:]) if (sentence := part.strip())]


def _ends(text: str, match: re.Match[str]) -> bool:
    if match[1].count("\n") > 1:  # an empty line
        return True
    follows = text[match.end() : match.end() + 4].lstrip(_OPENING)[:1]
    if follows.islower():
        return False
    before = text[max(match.start() - 8, 0) : match.start() + 1]
    return text[match.start()] != "." or _ABBREVIATION.search(before) is None
