"""What a GLUE run starts from, and how that fits the task.

The first two functions are the only place that knows what ``weights`` may be.
"""

import json
from pathlib import Path

from recipes.bert_large.pretrain_checkpoint import load_pretraining_checkpoint, read_pretraining_checkpoint
from slope_pl import SLoPeConfig
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
        source: a folder with config.json and model.safetensors, a hub id, or a .ckpt of recipes.bert_large.pretrain.

    Raises:
        PretrainedUnavailableError: the hub does not deliver.
        PretrainedFilesError: the folder lacks files.
        CheckpointError: the .ckpt is of something else.
    """
    return read_pretraining_checkpoint(source).bert if is_checkpoint(source) else load_config(source)


def is_checkpoint(source: str | None) -> bool:
    """Whether weights come from a pretraining checkpoint, whose masks are then kept."""
    return source is not None and source.endswith(".ckpt")


def read_weights(net: BertForSequenceClassification, source: str, info: TaskInfo, slope: SLoPeConfig | None) -> str:
    """Read weights into a dense net; a source without this head leaves it as it was drawn.

    Args:
        net: dense, before surgery.
        source: as for :func:`architecture`.
        info: the task that the head is for.
        slope: the method of the run; a sparse pretraining checkpoint makes the net sparse by it, with its own masks.

    Returns:
        One line for the log.

    Raises:
        PretrainedMismatchError: shapes differ, or the checkpoint's head is another task's.
        CheckpointError: a pretraining checkpoint does not fit the net or the method.
    """
    if is_checkpoint(source):
        return load_pretraining_checkpoint(net, source, slope).summary()
    files = locate_pretrained(source)
    other = json.loads(files.config.read_text(encoding="utf-8")).get("finetuning_task")
    if other is not None and other != info.name:
        raise PretrainedMismatchError(
            f"{files.folder} was fine-tuned on {other}, and its head is that task's; the task is {info.name}. Start from "
            f"the encoder alone (a pretrained model), or use --data.task {other}."
        )
    return f"Weights from {source}: {load_pretrained(net, str(files.folder)).summary()}."


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
