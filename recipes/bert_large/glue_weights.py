"""What a GLUE run starts from, and how that fits the task.

The two functions are the only place that knows what ``weights`` may be: another kind of source (a sparse pretraining
checkpoint, with its masks) is another branch in both.
"""

import json
from pathlib import Path

from slope_pl.data.glue_tasks import TaskInfo
from slope_pl.models import (
    BertConfig,
    BertForSequenceClassification,
    PretrainedMismatchError,
    load_config,
    load_pretrained,
    locate_pretrained,
)


def architecture(source: str) -> BertConfig:
    """The architecture of the weights.

    Args:
        source: a folder with config.json and model.safetensors, or a hub id.

    Raises:
        PretrainedUnavailableError: the hub does not deliver.
        PretrainedFilesError: the folder lacks files.
        ValueError: another kind of source.
    """
    _refuse_checkpoint(source)
    return load_config(source)


def read_weights(net: BertForSequenceClassification, source: str, info: TaskInfo) -> str:
    """Read weights into a dense net; a checkpoint without this head leaves it as it was drawn.

    Args:
        net: dense, before surgery.
        source: as for :func:`architecture`.
        info: the task that the head is for.

    Returns:
        One line for the log.

    Raises:
        PretrainedMismatchError: shapes differ, or the checkpoint's head is another task's.
    """
    _refuse_checkpoint(source)
    files = locate_pretrained(source)
    other = json.loads(files.config.read_text(encoding="utf-8")).get("finetuning_task")
    if other is not None and other != info.name:
        raise PretrainedMismatchError(
            f"{files.folder} was fine-tuned on {other}, and its head is that task's; the task is {info.name}. Start from "
            f"the encoder alone (a pretrained model), or use --data.task {other}."
        )
    return load_pretrained(net, str(files.folder)).summary()


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


def _refuse_checkpoint(source: str) -> None:
    if source.endswith(".ckpt"):
        raise ValueError(
            f"weights is {source!r}, a Lightning checkpoint; a folder with config.json and model.safetensors, or a hub id, "
            "is expected. Export a checkpoint to a folder first; to continue a GLUE run use --ckpt_path."
        )
