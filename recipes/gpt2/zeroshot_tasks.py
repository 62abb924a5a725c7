"""The zero-shot tasks and their local files, turned into the layout that their hub data sets have.

A folder of local files holds one ``<task>.jsonl`` or ``<task>.jsonl.xz`` a task, one JSON object a line:

=====================================  =========================================================================
mmlu                                   question, choices (4), label, subject
arc_challenge, openbookqa, piqa        question, choices, label
mathqa                                 question, choices (5), label; options_raw, if the file has the hub's string
race (or race_high)                    context, question, choices (4), label, passage_id; a passage's rows adjacent
winogrande                             sentence (with one ``_``), options (2), label
lambada                                context, target (the last word)
hellaswag                              the hub's own: activity_label, ctx_a, ctx_b, endings (4), label
=====================================  =========================================================================

``label`` counts from 0. Texts are bare: "Question:", letters and "Answer:" come from the harness. A row may name its
``split``; without, it belongs to the one that is scored. Other fields are ignored.
"""

import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from slope_pl import ConfigError, SLoPeError
from slope_pl.data import DataUnavailableError

Row = dict[str, Any]
Splits = dict[str, list[Row]]
_LETTERS = "ABCDEFGHIJ"


class TaskFileError(SLoPeError, ValueError):
    """A local task file is not in the documented layout; the message names file and line."""


@dataclass(frozen=True)
class ZeroshotTask:
    """One task of the published table.

    Attributes:
        harness: Its name in the LM Evaluation Harness.
        chance: Accuracy of guessing, per cent.
        fields: What each row of a local file must have, and its type.
        to_hub: From the rows of one split to the hub's.
        scored: The split the harness scores.
        files: Names a local file may have, without suffix.
        choices: How many choices a row must have; None for any number from 2.
        group: Whether the harness makes several tasks of it and averages them.
    """

    harness: str
    chance: float
    fields: dict[str, type | tuple[type, ...]]
    to_hub: Callable[[list[Row]], list[Row]]
    scored: str
    files: tuple[str, ...]
    choices: int | None = None
    group: bool = False


def _mmlu(rows: list[Row]) -> list[Row]:
    return [{key: row[key] for key in ("question", "subject", "choices")} | {"answer": row["label"]} for row in rows]


def _lettered(question: str) -> Callable[[list[Row]], list[Row]]:
    """ARC and OpenBookQA, which differ in the name of the question."""

    def convert(rows: list[Row]) -> list[Row]:
        return [
            {
                question: row["question"],
                "choices": {"text": row["choices"], "label": list(_LETTERS[: len(row["choices"])])},
                "answerKey": _LETTERS[row["label"]],
            }
            for row in rows
        ]

    return convert


def _winogrande(rows: list[Row]) -> list[Row]:
    return [
        {"sentence": row["sentence"], "option1": row["options"][0], "option2": row["options"][1]}
        | {"answer": str(row["label"] + 1)}
        for row in rows
    ]


def _hellaswag(rows: list[Row]) -> list[Row]:
    keys = ("activity_label", "ctx_a", "ctx_b", "endings")
    return [{key: row[key] for key in keys} | {"label": str(row["label"])} for row in rows]


def _mathqa(rows: list[Row]) -> list[Row]:
    # The harness cuts the choices out of the hub's string, some of them badly. For the same score it gets that string.
    def options(row: Row) -> str:
        joined = " , ".join(f"{letter} ) {choice}" for letter, choice in zip("abcde", row["choices"], strict=True))
        return row.get("options_raw", joined)

    return [{"Problem": row["question"], "options": options(row), "correct": "abcde"[row["label"]]} for row in rows]


def _piqa(rows: list[Row]) -> list[Row]:
    return [
        {"goal": row["question"], "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["label"]}
        for row in rows
    ]


def _race(rows: list[Row]) -> list[Row]:
    # The harness has one document a passage: all questions but the last are shown with their answers. The hub keeps the
    # questions as the text of a Python list.
    documents = []
    for _, group in groupby(rows, key=lambda row: row["passage_id"]):
        passage = list(group)
        problems = [
            {"question": row["question"], "answer": _LETTERS[row["label"]], "options": row["choices"]}
            for row in passage
        ]
        documents.append({"article": passage[0]["context"], "problems": repr(problems)})
    return documents


def _lambada(rows: list[Row]) -> list[Row]:
    return [{"text": f"{row['context']} {row['target']}"} for row in rows]


_CHOICE: dict[str, type | tuple[type, ...]] = {"question": str, "choices": list, "label": int}
TASKS = {
    "mmlu": ZeroshotTask("mmlu", 25.0, {**_CHOICE, "subject": str}, _mmlu, "test", ("mmlu",), choices=4, group=True),
    "arc_challenge": ZeroshotTask("arc_challenge", 25.0, _CHOICE, _lettered("question"), "test", ("arc_challenge",)),
    "openbookqa": ZeroshotTask("openbookqa", 25.0, _CHOICE, _lettered("question_stem"), "test", ("openbookqa",)),
    "winogrande": ZeroshotTask(
        "winogrande",
        50.0,
        {"sentence": str, "options": list, "label": int},
        _winogrande,
        "validation",
        ("winogrande",),
        choices=2,
    ),
    "hellaswag": ZeroshotTask(
        "hellaswag",
        25.0,
        {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": (int, str)},
        _hellaswag,
        "validation",
        ("hellaswag",),
        choices=4,
    ),
    "mathqa": ZeroshotTask("mathqa", 20.0, _CHOICE, _mathqa, "test", ("mathqa",), choices=5),
    "piqa": ZeroshotTask("piqa", 50.0, _CHOICE, _piqa, "validation", ("piqa",), choices=2),
    "race": ZeroshotTask(
        "race", 25.0, {**_CHOICE, "context": str, "passage_id": str}, _race, "test", ("race", "race_high"), choices=4
    ),
    "lambada": ZeroshotTask(
        "lambada_openai", 0.0, {"context": str, "target": str}, _lambada, "test", ("lambada", "lambada_openai")
    ),
}
"""All tasks by the name the command line has for them, in the order of the published table."""


def check_names(names: list[str]) -> None:
    """Raise a ConfigError for a task that is not known, or named twice."""
    for name in names:
        if name not in TASKS:
            raise ConfigError(f"unknown task {name!r}, expected some of: {' '.join(TASKS)}.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"task {twice[0]!r} is named twice: name each once.")


def find_file(name: str, folder: Path) -> Path:
    """The file of a task in a folder.

    Raises:
        DataUnavailableError: if the folder or the file is not there; says which names would do.
    """
    if not folder.is_dir():
        raise DataUnavailableError(
            f"no folder {folder} (--data): expected one with <task>.jsonl or <task>.jsonl.xz files."
        )
    wanted = [f"{stem}{suffix}" for stem in TASKS[name].files for suffix in (".jsonl", ".jsonl.xz")]
    for file in wanted:
        if (folder / file).is_file():
            return folder / file
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
    raise DataUnavailableError(
        f"{folder} has no file of the task {name!r}: expected {' or '.join(wanted)}, it holds {there}. Add the file, leave "
        "the task out of --tasks, or leave --data out to read from the hub."
    )


def read_splits(name: str, path: Path) -> Splits:
    """Read a local file: the rows of each split, in the layout of the hub.

    Raises:
        TaskFileError: if a row is not in the documented layout, or none is in the split that is scored.
    """
    task = TASKS[name]
    splits: Splits = {}
    for number, row in enumerate(_lines(path), start=1):
        if (problem := _problem(task, row)) is not None:
            raise TaskFileError(f"{path}, line {number}: {problem}. Layout: python -m recipes.gpt2.zeroshot --help")
        splits.setdefault(row.get("split", task.scored), []).append(row)
    if task.scored not in splits:
        raise TaskFileError(
            f"{path} has no row of the split {task.scored!r}, which is scored (splits: {', '.join(splits) or 'none'})."
        )
    return {split: task.to_hub(rows) for split, rows in splits.items()}


def _lines(path: Path) -> Iterator[Any]:
    opener = lzma.open if path.suffix == ".xz" else open
    done = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
                done += 1
    except (json.JSONDecodeError, UnicodeError, lzma.LZMAError, EOFError) as error:
        raise TaskFileError(f"{path} cannot be read after line {done}: {error}. Get the file anew.") from error


def _problem(task: ZeroshotTask, row: Any) -> str | None:
    """What is wrong with a row; None if nothing is."""
    if not isinstance(row, dict):
        return f"{type(row).__name__}, expected a JSON object"
    for field, kind in task.fields.items():
        if field not in row:
            return f"no {field!r}, expected {', '.join(task.fields)}; there is {', '.join(row) or 'nothing'}"
        if not isinstance(row[field], kind) or isinstance(row[field], bool):
            return f"{field} is {row[field]!r}, expected {kind}"
    choices = next((row[field] for field, kind in task.fields.items() if kind is list), None)
    if choices is None:
        return None
    if not all(isinstance(choice, str) for choice in choices):
        return f"the choices are {choices!r}, expected texts"
    if len(choices) != (task.choices or len(choices)) or not 2 <= len(choices) <= len(_LETTERS):
        return f"{len(choices)} choices, expected {task.choices or f'2 to {len(_LETTERS)}'}"
    if str(row["label"]) not in map(str, range(len(choices))):
        return f"label is {row['label']!r}, expected 0 to {len(choices) - 1}"
    if task.harness == "winogrande" and row["sentence"].count("_") != 1:
        return f"sentence is {row['sentence']!r}, expected one '_' in it"
    return None
