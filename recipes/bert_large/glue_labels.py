"""The task of a GLUE run in the config.json of a Hugging Face folder: read, and written."""

import json
from pathlib import Path

from slope_pl.data.glue_tasks import TaskInfo
from slope_pl.models import PretrainedMismatchError, locate_pretrained


def refuse_other_task(source: str, info: TaskInfo) -> None:
    """Raise if a folder or hub id was fine-tuned on another task of GLUE, whose head it has.

    Raises:
        PretrainedMismatchError: it was.
    """
    files = locate_pretrained(source)
    other = json.loads(files.config.read_text(encoding="utf-8")).get("finetuning_task")
    if other is not None and other != info.name:
        raise PretrainedMismatchError(
            f"{files.folder} was fine-tuned on {other}, and its head is that task's; the task is {info.name}. Start from "
            f"the encoder alone (a pretrained model), or use --data.task {other}."
        )


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
