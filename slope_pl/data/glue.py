"""Read a GLUE task from the hub, from TSV or from JSON lines, and check every row of it.

A label that is taken for another, or a sentence cut at a quotation mark, changes scores and raises nothing. So columns,
labels and texts are checked one by one, and a mistake is reported with its file, its line, the value and the fix.

Layouts of a local folder (``ROOT``), both found by themselves:

* ``ROOT/CoLA/train.tsv``, ``ROOT/CoLA/dev.tsv``, ... : the official distribution, one folder a task (``CoLA SST-2 MRPC
  STS-B QQP MNLI QNLI RTE WNLI``, or the task's name in lower case); MNLI has ``dev_matched.tsv`` and
  ``dev_mismatched.tsv``. UTF-8, tab-separated, no quoting (quotation marks are text), a header line except in CoLA.
* ``ROOT/train.tsv``, ``ROOT/dev.tsv``: the folder of the one task.

Instead of ``.tsv`` a file may be ``.jsonl``, one object a line; instead of ``dev`` it may be called ``validation``.
Columns and keys go by their official names or by the hub's (`slope_pl.data.glue_tasks`), others are ignored. Labels are
class names or their numbers; STS-B has numbers from 0 to 5.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from slope_pl.data.glue_tasks import HIGH, LOW, TASKS, TaskInfo, task_info
from slope_pl.data.squad import DataUnavailableError

HUB = "nyu-mll/glue"
OnBadRow = Literal["raise", "skip"]
_ENDINGS = (".tsv", ".jsonl")
_Row = tuple[str, dict[str, Any] | str]  # its place, and its fields or what is wrong with it


class GlueFormatError(ValueError):
    """The data is not the task's; the message names the file, the line, the value, the expectation and the fix."""


@dataclass(frozen=True, slots=True)
class GlueExample:
    """A sentence or a pair, and its label.

    Attributes:
        first: The sentence, or the first of two.
        second: The second sentence; None where a task has one.
        label: The number of the class, or STS-B's score.
    """

    first: str
    second: str | None
    label: float


def is_local(source: str | os.PathLike[str]) -> bool:
    """Tell a folder from a hub id: what exists on disk, or is written like a path, is local."""
    text = os.fspath(source)
    return os.path.exists(text) or text.startswith((".", "~", os.sep)) or text.count("/") > 1


def find_glue_file(source: str | os.PathLike[str], task: str, split: str) -> Path:
    """Find the file of a split in a local folder; see the module's text for the layouts.

    Args:
        source: The root of all tasks, or the folder of this one.
        task: A name of `TASKS`.
        split: ``"train"`` or one of the task's ``dev``.

    Raises:
        DataUnavailableError: There is no such file; says what was looked for and what is there.
        ValueError: There are several, or ``source`` is a file or another task's folder.
    """
    info, root = task_info(task), Path(source).expanduser()
    if root.is_file():
        raise ValueError(f"source is the file {root}, expected the folder with {info.folder}/, or that folder itself")
    if not root.is_dir():
        raise DataUnavailableError(
            f"no folder {root} (working directory: {Path.cwd()}). Give a folder that holds {info.folder}/train.tsv and "
            f"the like, or the hub id {HUB!r}."
        )
    other = next((t for t in TASKS.values() if root.name.lower() in (t.name, t.folder.lower()) and t is not info), None)
    if other is not None:
        raise ValueError(f"source is {root}, the folder of {other.name}, but the task is {info.name}: give one of them")
    places = [root / info.folder, root / info.name, root]
    names = [stem + ending for stem in info.stems(split) for ending in _ENDINGS]
    for place in places:
        found = [place / name for name in names if (place / name).is_file()]
        if len(found) > 1:
            raise ValueError(f"{place} holds {' and '.join(p.name for p in found)}, expected one of them: remove one")
        if found:
            return found[0]
    content = ", ".join(sorted(p.name for p in next(p for p in places if p.is_dir()).iterdir())[:12]) or "nothing"
    raise DataUnavailableError(
        f"no {' or '.join(names)} of {info.name} in {places[0]} or {root} (there is: {content}). "
        "slope_pl/data/glue.py describes the layouts."
    )


def read_glue(
    source: str | os.PathLike[str] = HUB, task: str = "cola", split: str = "train", on_bad_row: OnBadRow = "raise"
) -> list[GlueExample]:
    """Read one split of a task and validate all of it.

    Args:
        source: A local folder (see the module's text), or the id of a data set on the hub with GLUE's configurations
            and columns. What exists on disk comes first.
        task: A name of `TASKS`.
        split: ``"train"`` or one of the task's ``dev`` (``dev``; MNLI: ``matched``, ``mismatched``).
        on_bad_row: What to do with rows of a wrong number of fields, without text or without a valid label:
            ``"raise"``, or ``"skip"`` and report their number in one line. Missing columns always raise.

    Returns:
        The rows in the order of the source.

    Raises:
        GlueFormatError: The data is not this task's.
        DataUnavailableError: The folder, the file or the hub cannot be reached.
        ValueError: ``task``, ``split`` or ``on_bad_row`` is none of the above.
    """
    info = task_info(task)
    if split != "train" and split not in info.dev:
        raise ValueError(f"split is {split!r}, expected 'train' or {' or '.join(map(repr, info.dev))} for {task}")
    if on_bad_row not in get_args(OnBadRow):
        raise ValueError(f"on_bad_row is {on_bad_row!r}, expected 'raise' or 'skip'")
    if is_local(source):
        path = find_glue_file(source, task, split)
        name, rows = str(path), _json_rows(path) if path.suffix == ".jsonl" else _tsv_rows(path, info)
    else:
        name = f"hub data set {os.fspath(source)!r}, {task}, split {info.hub_split(split)!r}"
        rows = ((f"row {r}", dict(row)) for r, row in enumerate(load_hub_split(os.fspath(source), task, split)))
    return _collect(rows, name, info, on_bad_row)


def load_hub_split(source: str, task: str, split: str) -> Any:
    """Download one split of a task, or take it from the local cache.

    Args:
        source: Hub id.
        task: A name of `TASKS`.
        split: ``"train"`` or one of the task's ``dev``.

    Returns:
        The ``datasets.Dataset``.

    Raises:
        DataUnavailableError: The hub is not reachable, or has no such data set, configuration or split.
    """
    import datasets  # here: it takes a second to import, and local files do not need it

    name = task_info(task).hub_split(split)
    try:
        return datasets.load_dataset(source, task, split=name)
    except (OSError, ValueError, RuntimeError) as error:  # the last: a data set that is a script, since datasets 4
        raise DataUnavailableError(
            f"cannot load data set {source!r}, {task}, split {name!r}, from the hub or its local cache "
            f"({type(error).__name__}: {error}); there is no folder of that name in {Path.cwd()} either. Without a "
            "network, download GLUE elsewhere and give the folder of its tasks."
        ) from error


def _lines(path: Path) -> list[str]:
    file = str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")  # MRPC's dev.tsv begins with a byte-order mark
    except UnicodeDecodeError as error:
        raise GlueFormatError(f"{file}: not UTF-8 at byte {error.start}: {error.reason}; convert the file") from error
    except OSError as error:
        raise DataUnavailableError(f"cannot read {file}: {error.strerror or error}") from error
    if not text.strip():
        raise GlueFormatError(f"{file}: the file is empty; download it again")
    # Not splitlines(): it also splits at characters that stand inside sentences, such as U+2028.
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _tsv_rows(path: Path, info: TaskInfo) -> Iterator[_Row]:
    lines = _lines(path)
    header, first = lines[0].split("\t"), 1
    if info.no_header and not {info.no_header[1], info.no_header[3]} <= set(header):
        header, first = list(info.no_header), 0
    _check_columns(header, info, f"{path}: the header")
    for number, line in enumerate(lines[first:], first + 1):
        fields = line.split("\t")
        if len(fields) == len(header):
            yield f"line {number}", dict(zip(header, fields, strict=True))
        elif not line.strip():
            yield f"line {number}", "the line is empty, expected a row"
        else:
            yield (
                f"line {number}",
                f"{len(fields)} fields, expected {len(header)} ({', '.join(header)}): a tab or a line break in a sentence?",
            )


def _json_rows(path: Path) -> Iterator[_Row]:
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield f"line {number}", f"not JSON at column {error.colno}: {error.msg}; expected an object"
            continue
        yield f"line {number}", row if isinstance(row, dict) else f"{_show(row)}, expected a JSON object"


def _check_columns(names: list[str], info: TaskInfo, where: str) -> tuple[tuple[str, ...], str]:
    """The text columns and the label column among ``names``."""
    texts = next((columns for columns in info.texts if set(columns) <= set(names)), None)
    label = next((column for column in info.label if column in names), None)
    if texts is None or label is None:
        wanted = [" and ".join(map(repr, columns)) for columns in info.texts]
        missing = [f"text ({' or '.join(wanted)})"] if texts is None else []
        missing += [f"label ({' or '.join(map(repr, info.label))})"] if label is None else []
        raise GlueFormatError(
            f"{where} has no column of the {' and the '.join(missing)} of {info.name}; it has: {', '.join(names)}. "
            f"Rename its columns, or give the files of {info.name}."
        )
    return texts, label


def _collect(rows: Iterator[_Row], file: str, info: TaskInfo, on_bad_row: OnBadRow) -> list[GlueExample]:
    examples: list[GlueExample] = []
    bad, first_bad = 0, ""
    columns: tuple[tuple[str, ...], str] | None = None
    for where, row in rows:
        problem = row if isinstance(row, str) else ""
        if isinstance(row, dict):
            # By the first row: the rest of the file must have the same.
            columns = columns or _check_columns([*row], info, f"{file}: {where}")
            example = _example(row, *columns, info)
            if isinstance(example, GlueExample):
                examples.append(example)
                continue
            problem = example
        if on_bad_row == "raise":
            raise GlueFormatError(
                f"{file}: {where}: {problem}. Mend the row, or leave such rows out with on_bad_row='skip'."
            )
        bad, first_bad = bad + 1, first_bad or f"{where}: {problem}"
    if not examples:
        raise GlueFormatError(f"{file}: no valid row" + (f" ({bad} bad ones, {first_bad})" if bad else ""))
    if bad:
        rank_zero_info(f"{file}: left out {bad} bad rows of {bad + len(examples)} (first: {first_bad})")
    return examples


def _example(row: dict[str, Any], texts: tuple[str, ...], label: str, info: TaskInfo) -> GlueExample | str:
    """The row as an example, or what is wrong with it."""
    for column in (*texts, label):
        if column not in row:
            return f"no {column!r} (it has: {', '.join(row) or 'nothing'})"
    for column in texts:
        if not isinstance(row[column], str) or not row[column].strip():
            return f"{column!r} is {_show(row[column])}, expected text"
    read: Callable[[Any, TaskInfo], float | None] = _score if info.regression else _class
    value = read(row[label], info)
    if value is None:
        numbers = f"0 to {len(info.labels) - 1}"
        wanted = f"a number from {LOW:g} to {HIGH:g}" if info.regression else f"{', '.join(info.labels)}, or {numbers}"
        hint = " (-1 marks rows of the test set, which has no labels)" if str(row[label]) == "-1" else ""
        return f"{label!r} is {_show(row[label])}, expected {wanted}{hint}"
    return GlueExample(row[texts[0]], row[texts[1]] if len(texts) > 1 else None, value)


def _class(value: Any, info: TaskInfo) -> float | None:
    text = value.strip() if isinstance(value, str) else str(value)
    if text in info.labels:
        return float(info.labels.index(text))
    numbers = [str(i) for i in range(len(info.labels))]
    return float(numbers.index(text)) if text in numbers else None


def _score(value: Any, info: TaskInfo) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if LOW <= number <= HIGH and not isinstance(value, bool) else None


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
