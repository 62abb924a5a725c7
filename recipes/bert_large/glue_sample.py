"""Made-up sentences in the official layout of all nine tasks of GLUE: to see that everything runs, not what it scores.

    python -m recipes.bert_large.glue_sample FOLDER

The same bytes on every machine. Labels follow from one word, so that a small model can learn something in a minute.
"""

import argparse
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from slope_pl.data.glue_tasks import TASKS, TaskInfo

ROWS = {"train": 160, "dev": 48}
# Words of data/sample/vocab.txt, where the sample of SQuAD has its own.
_SUBJECTS = ("the river", "the town", "the bridge", "the king", "the market", "the house", "the school")
_VERBS = ("was built", "was opened", "was named", "was found")
_ENDS = ("in the south", "near the road", "near the river", "in the first year")
_MARKS = ("first", "often", "not")  # the word that decides, one for each class


def write_sample(folder: str | Path) -> Path:
    """Write ``folder/CoLA/train.tsv`` and so on; returns the folder."""
    folder = Path(folder)
    for info in TASKS.values():
        place = folder / info.folder
        place.mkdir(parents=True, exist_ok=True)
        for split in ("train", *info.dev):
            rows = list(_rows(info, split))
            header = "" if info.no_header else "\t".join(_header(info)) + "\n"
            text = header + "".join("\t".join(row) + "\n" for row in rows)
            (place / f"{info.stems(split)[0]}.tsv").write_text(text, encoding="utf-8", newline="\n")
    return folder


def _header(info: TaskInfo) -> list[str]:
    return ["index", *info.texts[0], info.label[0]]


def _rows(info: TaskInfo, split: str) -> Iterator[list[str]]:
    draw = random.Random(f"{info.name} {split}")  # a string seeds alike everywhere
    for index in range(ROWS["train" if split == "train" else "dev"]):
        number = draw.randrange(6) if info.regression else draw.randrange(info.num_labels)
        first = _sentence(draw.choice, _MARKS[number % 3] if info.texts[0][1:] == () else "")
        if info.regression:
            words = first.split()
            other = _sentence(draw.choice, "").split()
            keep = round(len(words) * number / 5)
            texts, label = [first, " ".join(words[:keep] + other[keep:])], f"{number:.3f}"
        else:
            texts = [first, _sentence(draw.choice, _MARKS[number])][: len(info.texts[0])]
            label = info.labels[number] if info.name in ("mnli", "qnli", "rte") else str(number)  # as distributed
        if info.no_header:
            yield ["sample", label, "" if number else "*", *texts]
        else:
            yield [str(index), *texts, label]


def _sentence(choose: Callable[[tuple[str, ...]], str], mark: str) -> str:
    verb, _, rest = choose(_VERBS).partition(" ")
    return " ".join(filter(None, (choose(_SUBJECTS), verb, mark, rest, choose(_ENDS))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(write_sample(parser.parse_args().folder))
