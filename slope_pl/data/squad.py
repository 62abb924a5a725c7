"""Read SQuAD v1.1 from the hub, a folder or a file, and check every byte of it that training relies on.

A wrong offset in an answer is the classic silent error of a question-answering data set: training goes on, on the wrong
words. So each answer is compared with its context, and a mistake is reported with its file and its place in the JSON.

Source of the format: Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text".
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lightning.pytorch.utilities.rank_zero import rank_zero_info

Split = Literal["train", "dev"]
OnBadAnswer = Literal["raise", "skip"]
_HUB_SPLIT = {"train": "train", "dev": "validation"}
_KINDS = {str: "a string", int: "an integer", list: "a list", dict: "an object"}


class SquadFormatError(ValueError):
    """The data is not SQuAD v1.1; the message names the file, the place in it, the value and what was expected."""


class DataUnavailableError(OSError):
    """The data could not be reached; the message says what was tried and what to do instead."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A gold answer.

    Attributes:
        text: The answer, equal to ``context[start : start + len(text)]``.
        start: Index of its first character (code point) in the context.
    """

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class SquadExample:
    """A question, the paragraph that answers it, and its gold answers.

    Attributes:
        id: Key of the question in predictions.
        title: Title of the article; may be empty.
        context: The paragraph.
        question: The question.
        answers: One or more gold answers.
    """

    id: str
    title: str
    context: str
    question: str
    answers: tuple[Answer, ...]


def is_local(source: str | os.PathLike[str]) -> bool:
    """Tell a path from a hub id: what exists on disk, or is written like a path, is local."""
    text = os.fspath(source)
    return os.path.exists(text) or text.endswith(".json") or text.startswith((".", "~", os.sep)) or text.count("/") > 1


def find_squad_file(folder: str | os.PathLike[str], split: Split) -> Path:
    """Find the one ``train*.json`` or ``dev*.json`` of a folder.

    Args:
        folder: Folder to look in (not below it).
        split: ``"train"`` or ``"dev"``.

    Returns:
        The file.

    Raises:
        DataUnavailableError: The folder holds no such file.
        ValueError: It holds several.
    """
    folder = Path(folder).expanduser()
    found = sorted(folder.glob(f"{split}*.json"))
    if not found:
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
        raise DataUnavailableError(
            f"no {split}*.json in {folder} (it holds: {names}); expected {split}-v1.1.json or {split}.json. "
            f"Name the file with {split}_file if it is called otherwise."
        )
    if len(found) > 1:
        raise ValueError(
            f"several files in {folder} match {split}*.json: {', '.join(p.name for p in found)}. "
            f"Say which one with {split}_file."
        )
    return found[0]


def read_squad(
    source: str | os.PathLike[str] = "squad", split: Split = "train", on_bad_answer: OnBadAnswer = "raise"
) -> list[SquadExample]:
    """Read one split of SQuAD v1.1 and validate all of it.

    Args:
        source: A SQuAD v1.1 JSON file, a folder with one ``train*.json`` and one ``dev*.json``, or the id of a data set
            on the hub with SQuAD's columns. What exists on disk comes first.
        split: ``"train"`` or ``"dev"`` (the hub's ``validation``).
        on_bad_answer: What to do with an answer that is not where ``answer_start`` says, and with a question without
            answers: ``"raise"``, or ``"skip"`` and report the numbers in one line.

    Returns:
        The questions in the order of the source. Questions of a paragraph share one ``context`` object.

    Raises:
        SquadFormatError: The data is not SQuAD v1.1.
        DataUnavailableError: The file, the folder or the hub cannot be reached.
        ValueError: ``split`` or ``on_bad_answer`` is none of the above, or several files match.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}, expected 'train' or 'dev' (the hub's 'validation' is called 'dev' here)")
    if on_bad_answer not in get_args(OnBadAnswer):
        raise ValueError(f"on_bad_answer is {on_bad_answer!r}, expected 'raise' or 'skip'")
    if not is_local(source):
        name = f"hub data set {os.fspath(source)!r}, split {_HUB_SPLIT[split]!r}"
        return _collect(_hub_records(os.fspath(source), split, name), name, split, on_bad_answer)
    path = Path(source).expanduser()
    if not path.exists():
        raise DataUnavailableError(
            f"no file or folder {path} (working directory: {Path.cwd()}). Give a SQuAD v1.1 JSON file, a folder with "
            "train-v1.1.json and dev-v1.1.json, or a hub id such as 'squad'."
        )
    if path.is_dir():
        path = find_squad_file(path, split)
    return _collect(_file_records(path), str(path), split, on_bad_answer)


@dataclass(frozen=True, slots=True)
class _Record:
    """One question before its answers are checked; ``where`` is its place in the source."""

    where: str
    title: str
    context: str
    question: str
    id: str
    answers: list[tuple[str, str, int]]


def _field(file: str, where: str, value: Any, key: str, kind: type) -> Any:
    """``value[key]``, which must exist and be of ``kind``."""
    here = where or "the top level"
    if not isinstance(value, dict):
        raise SquadFormatError(f"{file}: {here} is {_show(value)}, expected an object with key {key!r}")
    if key not in value:
        keys = ", ".join(sorted(map(repr, value))) or "none"
        raise SquadFormatError(f"{file}: {here} has no key {key!r} (its keys: {keys})")
    found = value[key]
    if not isinstance(found, kind) or isinstance(found, bool):
        place = f"{where}.{key}" if where else key
        raise SquadFormatError(f"{file}: {place} is {_show(found)}, expected {_KINDS[kind]}")
    return found


def _show(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _file_records(path: Path) -> Iterator[_Record]:
    file = str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SquadFormatError(f"{file}: not UTF-8 at byte {error.start}: {error.reason}") from error
    except OSError as error:
        raise DataUnavailableError(f"cannot read {file}: {error.strerror or error}") from error
    if not text.strip():
        raise SquadFormatError(f"{file}: the file is empty, expected SQuAD v1.1 JSON")
    try:
        root = json.loads(text)
    except json.JSONDecodeError as error:
        raise SquadFormatError(f"{file}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    del text
    for a, article in enumerate(_field(file, "", root, "data", list)):
        where_a = f"data[{a}]"
        paragraphs = _field(file, where_a, article, "paragraphs", list)
        title = _field(file, where_a, article, "title", str) if "title" in article else ""
        for p, paragraph in enumerate(paragraphs):
            where_p = f"{where_a}.paragraphs[{p}]"
            context = _field(file, where_p, paragraph, "context", str)
            for q, qa in enumerate(_field(file, where_p, paragraph, "qas", list)):
                where = f"{where_p}.qas[{q}]"
                key, question = _field(file, where, qa, "id", str), _field(file, where, qa, "question", str)
                answers = []
                for i, answer in enumerate(_field(file, where, qa, "answers", list)):
                    where_i = f"{where}.answers[{i}]"
                    start = _field(file, where_i, answer, "answer_start", int)
                    answers.append((where_i, _field(file, where_i, answer, "text", str), start))
                yield _Record(where, title, context, question, key, answers)


def load_hub_split(source: str, split: Split) -> Any:
    """Download one split of a hub data set, or take it from the local cache.

    Args:
        source: Hub id.
        split: ``"train"`` or ``"dev"``.

    Returns:
        The ``datasets.Dataset``.

    Raises:
        DataUnavailableError: The hub is not reachable, or has no such data set or split.
    """
    import datasets  # here: it takes a second to import, and local files do not need it

    try:
        return datasets.load_dataset(source, split=_HUB_SPLIT[split])
    except (OSError, ValueError, RuntimeError) as error:  # the last: a data set that is a script, since datasets 4
        raise DataUnavailableError(
            f"cannot load data set {source!r}, split {_HUB_SPLIT[split]!r}, from the hub or its local cache "
            f"({type(error).__name__}: {error}); there is no file or folder of that name in {Path.cwd()} either. "
            "Without a network, download train-v1.1.json and dev-v1.1.json elsewhere and give the folder of the two."
        ) from error


def _hub_records(source: str, split: Split, name: str) -> Iterator[_Record]:
    contexts: dict[str, str] = {}  # rows repeat their paragraph: keep one copy
    for r, row in enumerate(load_hub_split(source, split)):
        where = f"row {r}"
        answers = _field(name, where, row, "answers", dict)
        texts, starts = (_field(name, f"{where}.answers", answers, k, list) for k in ("text", "answer_start"))
        if len(texts) != len(starts):
            raise SquadFormatError(f"{name}: {where}.answers has {len(texts)} texts and {len(starts)} answer_starts")
        context = _field(name, where, row, "context", str)
        found = []
        for i, (text, start) in enumerate(zip(texts, starts, strict=True)):
            where_i, answer = f"{where}.answers[{i}]", {"text": text, "answer_start": start}
            start = _field(name, where_i, answer, "answer_start", int)
            found.append((where_i, _field(name, where_i, answer, "text", str), start))
        title = _field(name, where, row, "title", str) if "title" in row else ""
        key, question = _field(name, where, row, "id", str), _field(name, where, row, "question", str)
        yield _Record(where, title, contexts.setdefault(context, context), question, key, found)


def _answer_error(context: str, text: str, start: int) -> str | None:
    """Say what is wrong with an answer, if anything."""
    if not text.strip():
        return f"the answer {text!r} is blank, expected words of the context"
    found = context[start : start + len(text)] if start >= 0 else ""
    if found == text:
        return None
    places: list[str] = []
    at = context.find(text)
    while at >= 0 and len(places) < 5:
        places.append(str(at))
        at = context.find(text, at + 1)
    hint = f"it occurs at {', '.join(places)}" if places else "it does not occur in the context"
    return f"answer {text!r} expected at context[{start}:{start + len(text)}], found {found!r} there; {hint}"


def _collect(records: Iterator[_Record], file: str, split: Split, on_bad_answer: OnBadAnswer) -> list[SquadExample]:
    examples: list[SquadExample] = []
    seen: dict[str, tuple[str, SquadExample]] = {}
    bad_answers = dropped = 0
    first_bad = ""
    for record in records:
        for key in ("context", "question", "id"):
            if not getattr(record, key).strip():
                place = f"{record.where}.{key}" if key != "context" else f"the context of {record.where}"
                raise SquadFormatError(f"{file}: {place} is {getattr(record, key)!r}, expected text")
        answers, problem = [], ""
        for where, text, start in record.answers:
            error = _answer_error(record.context, text, start)
            if error is None:
                answers.append(Answer(text, start))
            else:
                bad_answers += 1
                problem = problem or f"{file}: {where} (id {record.id!r}): {error}"
        if not record.answers:
            problem = (
                f"{file}: {record.where} (id {record.id!r}) has no answer, expected one or more "
                "(unanswerable questions are SQuAD v2.0, which is not supported)"
            )
        if problem:
            if on_bad_answer == "raise":
                raise SquadFormatError(
                    f"{problem}. Mend the file, or leave such answers out with on_bad_answer='skip'."
                )
            first_bad = first_bad or record.id
            if not answers:
                dropped += 1
                continue
        example = SquadExample(record.id, record.title, record.context, record.question, tuple(answers))
        if record.id in seen:
            where, other = seen[record.id]
            same = (other.question, other.context) == (example.question, example.context)
            # Predictions are keyed by id, so dev ids must be unique. Training needs no key, and published training
            # sets do repeat questions.
            if split == "dev" or not same:
                what = "the same question" if same else f"another question ({other.question!r})"
                raise SquadFormatError(f"{file}: {record.where}.id is {record.id!r}, which {where} has for {what}")
        else:
            seen[record.id] = (record.where, example)
        examples.append(example)
    if first_bad:
        rank_zero_info(
            f"{file}: left out {bad_answers} answers that are not in their context and {dropped} questions that have "
            f"no other; the first id is {first_bad}"
        )
    if not examples:
        raise SquadFormatError(f"{file}: no questions, expected one or more in data[].paragraphs[].qas[]")
    return examples
