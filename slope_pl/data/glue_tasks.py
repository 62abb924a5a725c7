"""The nine tasks of GLUE (Wang et al. 2018): where each lies, what its columns and labels are called, how it is scored.

Column names come in two families: those of the official TSV files and those of the hub's ``nyu-mll/glue``. Classes are
numbered as on the hub.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

LOW, HIGH = 0.0, 5.0  # STS-B's scale


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """What there is to know about a task.

    Attributes:
        name: as on the hub, and the value of ``--data.task``.
        folder: of the official distribution.
        texts: the names that the text columns go by; one or two columns, the official name first.
        label: the names that the label column goes by.
        labels: the classes, in the order of their numbers; none for a task that is a number from 0 to 5.
        metrics: what the benchmark reports. The task's score is their mean.
        published: the one that the tables of SLoPe and BERT show: ``score`` is the mean.
        dev: labelled sets to evaluate on: its name here -> its name on the hub and stems of local files. The first is
            the one that tables show.
        no_header: columns of the official file where that has no header line.
    """

    name: str
    folder: str
    texts: tuple[tuple[str, ...], ...]
    label: tuple[str, ...] = ("label",)
    labels: tuple[str, ...] = ("0", "1")
    metrics: tuple[str, ...] = ("accuracy",)
    published: str = "accuracy"
    dev: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"dev": ("validation", "dev")}, hash=False)
    no_header: tuple[str, ...] = ()

    @property
    def regression(self) -> bool:
        """Whether the label is a number and not a class."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Outputs of the head: the classes, or 1 to regress."""
        return len(self.labels) or 1

    def stems(self, split: str) -> tuple[str, ...]:
        """What local files of a split are called, without their ending."""
        return ("train",) if split == "train" else tuple(reversed(self.dev[split]))

    def hub_split(self, split: str) -> str:
        """What the hub calls a split."""
        return "train" if split == "train" else self.dev[split][0]


_PAIR = ("sentence1", "sentence2")
_MNLI_DEV = {
    "matched": ("validation_matched", "dev_matched"),
    "mismatched": ("validation_mismatched", "dev_mismatched"),
}
_ENTAILMENT = ("entailment", "not_entailment")

TASKS: Mapping[str, TaskInfo] = MappingProxyType(
    {
        task.name: task
        for task in (
            TaskInfo(
                name="cola",
                folder="CoLA",
                texts=(("sentence",),),
                labels=("unacceptable", "acceptable"),
                metrics=("matthews",),
                published="matthews",
                no_header=("source", "label", "mark", "sentence"),
            ),
            TaskInfo(name="sst2", folder="SST-2", texts=(("sentence",),), labels=("negative", "positive")),
            TaskInfo(
                name="mrpc",
                folder="MRPC",
                texts=(("#1 String", "#2 String"), _PAIR),
                label=("Quality", "label"),
                labels=("not_equivalent", "equivalent"),
                metrics=("accuracy", "f1"),
                published="f1",
            ),
            TaskInfo(
                name="stsb",
                folder="STS-B",
                texts=(_PAIR,),
                label=("score", "label"),
                labels=(),
                metrics=("pearson", "spearman"),
                published="score",
            ),
            TaskInfo(
                name="qqp",
                folder="QQP",
                texts=(("question1", "question2"),),
                label=("is_duplicate", "label"),
                labels=("not_duplicate", "duplicate"),
                metrics=("accuracy", "f1"),
                published="f1",
            ),
            TaskInfo(
                name="mnli",
                folder="MNLI",
                texts=(_PAIR, ("premise", "hypothesis")),
                label=("gold_label", "label"),
                labels=("entailment", "neutral", "contradiction"),
                metrics=("accuracy", "accuracy_mismatched"),
                dev=_MNLI_DEV,
            ),
            TaskInfo(name="qnli", folder="QNLI", texts=(("question", "sentence"),), labels=_ENTAILMENT),
            TaskInfo(name="rte", folder="RTE", texts=(_PAIR,), labels=_ENTAILMENT),
            TaskInfo(name="wnli", folder="WNLI", texts=(_PAIR,), labels=("not_entailment", "entailment")),
        )
    }
)


def task_info(name: str) -> TaskInfo:
    """The task of that name.

    Raises:
        ValueError: there is none; lists those there are.
    """
    if not isinstance(name, str) or name not in TASKS:
        raise ValueError(f"task is {name!r}, expected one of {', '.join(TASKS)}")
    return TASKS[name]
