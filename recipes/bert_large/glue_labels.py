"""The task of a GLUE run in the config.json of a Hugging Face folder: read, and written."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slope_pl.data.glue_tasks import TaskInfo
from slope_pl.models import PretrainedMismatchError, locate_pretrained

_HEAD = "ForSequenceClassification"
_UNNAMED = re.compile(r"(label_?)?\d+", re.IGNORECASE)


def refuse_other_task(source: str, info: TaskInfo) -> None:
    """Raise if a folder or hub id has the head of another task than this one, or of this one with its labels in another order.

    Labels without names (``LABEL_0``) are taken for the task's.

    Raises:
        PretrainedMismatchError: it has.
    """
    files = locate_pretrained(source)
    content = json.loads(files.config.read_text(encoding="utf-8"))
    way_out = "Start from the encoder alone: a pretrained model, or this one saved without its head"
    other = content.get("finetuning_task")
    if other is not None and _plain(other) != info.name:
        raise PretrainedMismatchError(
            f"{files.folder} was fine-tuned on {other}, and its head is that task's; the task is {info.name}. {way_out}; or "
            f"use --data.task {other}."
        )
    if not any(str(kind).endswith(_HEAD) for kind in content.get("architectures") or ()):
        return
    names, labels = _labels(content), info.labels or ("score",)
    wrong = len(names) != len(labels)
    if not wrong and not info.regression and not all(_UNNAMED.fullmatch(name) for name in names):
        wrong = [_plain(name) for name in names] != [_plain(label) for label in labels]
    if wrong:
        raise PretrainedMismatchError(
            f"{files.config}: the head's labels are {', '.join(names)}, those of {info.name} are {', '.join(labels)}, in this "
            f"order; its outputs would be taken for others. {way_out}; if they mean the same, name them so in id2label."
        )


def _labels(content: Mapping[str, Any]) -> list[str]:
    """The names of a head's outputs, by number; two without names where config.json says nothing, as in transformers."""
    names = content.get("id2label")
    if isinstance(names, dict) and names:
        return [str(names[key]) for key in sorted(names, key=int)]
    return [f"LABEL_{i}" for i in range(int(content.get("num_labels") or 2))]


def _plain(name: object) -> str:
    """Without what spellings differ in: ``sst-2`` and ``SST2``, ``Not entailment`` and ``not_entailment``."""
    return "".join(letter for letter in str(name).lower() if letter.isalnum())


def name_labels(folder: str, info: TaskInfo) -> None:
    """Write the task and its class names into the config.json of an exported model, where transformers reads them."""
    file = Path(folder) / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    labels = info.labels or ("score",)
    content |= {
        "finetuning_task": info.name,
        "problem_type": "regression" if info.regression else "single_label_classification",
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
