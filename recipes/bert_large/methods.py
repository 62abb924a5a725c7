"""The methods that comparisons of fine-tuned models run: masks, ranks and starts, as arguments of the recipes."""

import hashlib
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from recipes.checkpoints import read_checkpoint
from slope_pl import CheckpointError
from slope_pl.checkpoint import CHECKPOINT_KEY

HERE = Path(__file__).parent
_BASES = ("base.yaml", "glue_base.yaml")  # laid under every run anyway

MASKS: dict[str, tuple[str, ...]] = {
    "magnitude": ("--model.slope.mask", "magnitude"),
    "wanda": ("--model.slope.mask", "magnitude", "--model.slope.mask_calibration_batches", "16"),
    "transposable": ("--model.slope.mask", "transposable"),
    "transposable-wanda": ("--model.slope.mask", "transposable", "--model.slope.mask_calibration_batches", "16"),
    "random": ("--model.slope.mask", "random"),
}
STARTS = {
    "early": "adapters awake from the first step; runs with adapters only",
    "teacher": "the dense run at its best rate so far teaches",
    "tuned": "from the weights of that dense run, not from pretrained ones",
    "recovered": "from the checkpoints of pretrain_recover.yaml in --recovered FOLDER, whose masks they keep; FOLDER's name is "
    "part of the start's",
    "gradual": "a dense stage as long as the sparse one comes first, in which pruned weights fade to zero",
}
FADE = 0.5
"""Share of the first stage's steps in which they do, if nothing is said; another one is part of a start's name."""
_FADED = "faded"  # of the name of a first stage


@dataclass(frozen=True)
class Run:
    """What makes a run the same run.

    Attributes:
        task: name of the task; ``squad`` for SQuAD.
        method: ``dense`` or ``sparse``; ``fade`` for the first stage of a gradual start, which is no result.
        mask: one of :data:`MASKS`; ``none`` for dense.
        rank: of the adapters.
        start: ``plain``, or some of :data:`STARTS`, joined by ``+``; ``gradual=0.3`` where the share is not :data:`FADE`.
        rate: peak learning rate.
        seed: of the head, the order and the subset of the data.
        arguments: given to the sparse runs alone.
        settings: config, data, weights and arguments that all runs of a comparison share.
    """

    task: str
    method: str
    mask: str
    rank: int
    start: str
    rate: float
    seed: int
    arguments: str
    settings: str

    @property
    def starts(self) -> set[str]:
        """The parts of ``start``, by the names in :data:`STARTS`."""
        return {_part(name) for name in self.start.split("+")} & set(STARTS)

    @property
    def fade(self) -> float:
        """Share of the first stage's steps."""
        shares = [name.partition("=")[2] for name in self.start.split("+") if _part(name) in ("gradual", _FADED)]
        return float(shares[0]) if shares and shares[0] else FADE

    def without(self, *parts: str) -> str:
        """``start`` without some of its parts."""
        return "+".join(name for name in self.start.split("+") if _part(name) not in parts) or "plain"

    @property
    def label(self) -> str:
        """The method in a table."""
        if self.method == "dense":
            return "dense"
        extra = ([] if self.start == "plain" else [self.start.replace("+", " + ")]) + [self.arguments]
        return ", ".join([f"2:4 {self.mask}, r = {self.rank}", *filter(None, extra)])

    @property
    def name(self) -> str:
        """Of its folder: readable, and another one for other settings."""
        words = f"{self.task}-{self.method}-{self.mask}-r{self.rank}-{self.start}-{self.rate:g}-{self.seed}"
        return f"{words}-{hashlib.sha256(repr(self).encode()).hexdigest()[:6]}"

    def __str__(self) -> str:
        stage = "first stage of " if self.method == "fade" else ""
        return f"{self.task}, {stage}{self.label}, rate {self.rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Place:
    """Where and on what the runs are made.

    Attributes:
        config: of this folder, laid under the method's.
        data: hub id, or a folder.
        weights: hub id, a folder, or a checkpoint, which has no vocabulary; None for the config's own.
        arguments: for all runs, before the user's.
    """

    config: str
    data: str
    weights: str | None
    arguments: tuple[str, ...] = ()

    @cached_property
    def settings(self) -> str:
        """For the CSV: without folders that only this machine has.

        Raises:
            CheckpointError: the weights are a checkpoint that cannot be read.
        """
        parts = [self.config, f"data={_tail(self.data, 1)}"]
        if self.weights:
            # Every last.ckpt has the same name.
            parts += [f"weights={_tail(self.weights, 2)}" + (f"#{_digest(self.weights)}" if self.is_checkpoint else "")]
        return " ".join([*parts, *self.arguments])

    @property
    def is_checkpoint(self) -> bool:
        """Whether the weights are a checkpoint of these recipes or of pretraining."""
        return self.weights is not None and self.weights.endswith(".ckpt")

    def check_methods(self, methods: list[str], starts: list[str]) -> None:
        """Refuse dense runs from a sparse checkpoint before any is made.

        Args:
            methods: ``dense``, ``sparse``.
            starts: of the sparse runs.

        Raises:
            SystemExit: naming the way out.
        """
        need = ["--methods dense"] if "dense" in methods else []
        parts = {start: {_part(p) for p in start.split("+")} for start in starts}
        if self.is_checkpoint and (twice := [start for start in starts if "recovered" in parts[start]]):
            raise SystemExit(
                f"--weights {self.weights} and --starts {twice[0]}: a run starts from one checkpoint; leave one of them out"
            )
        need += [f"--starts {start}" for start in starts if parts[start] - {"plain", "early"}]
        if need and self.is_checkpoint and CHECKPOINT_KEY in _read(str(self.weights)):
            raise SystemExit(
                f"--weights {self.weights} is of a 2:4 sparse model, from which no dense run can start, and {need[0]} needs "
                "one: give --methods sparse, and no starts but plain and early"
            )

    def config_arguments(self) -> list[str]:
        """What goes before the method's."""
        return [] if self.config in _BASES else ["--config", str(HERE / self.config)]

    def command_line(self) -> list[str]:
        """What goes after the method's."""
        weights = ["--model.weights", self.weights] if self.weights else []
        if self.weights and not self.is_checkpoint:
            weights += ["--data.tokenizer", self.weights]
        return ["--data.source", self.data, *weights, *self.arguments]


def _tail(place: str, parts: int) -> str:
    path = Path(place)
    return "/".join(path.parts[-parts:]) if path.exists() or place.startswith((".", "~", "/")) else place


def _read(checkpoint: str) -> dict[str, Any]:
    try:
        return read_checkpoint(checkpoint)
    except CheckpointError as error:
        raise SystemExit(f"--weights: {error}") from error


def _digest(checkpoint: str) -> str:
    """Tells checkpoints apart by their vectors (biases, norms): a few MB, where all of it is gigabytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(_read(checkpoint)["state_dict"].items()):
        if tensor.dim() == 1:
            found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:8]


def _part(name: str) -> str:
    """A part of a start without its share."""
    return name.partition("=")[0]


def check_starts(names: list[str], fade: float = FADE, recovered: Path | None = None) -> list[str]:
    """Combinations in one spelling.

    Args:
        names: of the starts.
        fade: share of the first stage's steps in a gradual one.
        recovered: folder of the checkpoints of a recovered one.

    Raises:
        SystemExit: for an unknown part, or a recovered one without a folder.
    """
    spelt = {part: part for part in STARTS}
    if fade != FADE:
        spelt["gradual"] = f"gradual={fade:g}"
    if recovered is not None:
        folder = recovered.expanduser().resolve().name
        if not folder or set(folder) & set("+=,"):
            raise SystemExit(
                f"--recovered {recovered}: its name {folder!r} is part of the rows' and may not have +, = or ,"
            )
        spelt["recovered"] = f"recovered={folder}"
    found = []
    for name in names:
        parts = set(name.split("+")) - {"plain"}
        if unknown := sorted(parts - set(STARTS)):
            raise SystemExit(
                f"--starts: {', '.join(unknown)} unknown; plain, or some of {', '.join(STARTS)}, joined by +"
            )
        if "recovered" in parts and recovered is None:
            raise SystemExit(f"--starts {name} needs --recovered FOLDER, with checkpoints of pretrain_recover.yaml")
        found.append("+".join(spelt[part] for part in STARTS if part in parts) or "plain")
    return list(dict.fromkeys(found))


def check_recovered(runs: Iterable[Run], folder: Path | None) -> None:
    """Before anything is run: whether the checkpoints of recovered starts are there.

    Args:
        runs: those that are missing.
        folder: of the checkpoints.

    Raises:
        SystemExit: for one that is not, or starts that exclude each other.
    """
    for run in runs:
        if "recovered" not in run.starts:
            continue
        if other := sorted(run.starts & {"tuned", "gradual"}):
            raise SystemExit(f"--starts {run.start}: a run starts from one place, recovered or {other[0]}")
        assert folder is not None, "check_starts has seen to it"
        recovered_checkpoint(run, folder)


def recovered_checkpoint(run: Run, folder: Path) -> Path:
    """What a recovered start begins from: ``MASK-rRANK.ckpt``, whose adapters are awake, or else ``MASK.ckpt``.

    Raises:
        SystemExit: if neither is there.
    """
    names = [f"{run.mask}-r{run.rank}.ckpt", f"{run.mask}.ckpt"]
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is None:
        raise SystemExit(
            f"--recovered {folder} has neither {' nor '.join(names)}: copy the checkpoint of a run of pretrain_recover.yaml "
            "there"
        )
    return found.absolute()


def dense_sibling(run: Run, rate: float) -> Run:
    """The dense run that teaches a run, or whose weights it starts from."""
    return replace(run, method="dense", mask="none", rank=0, start="plain", arguments="", rate=rate)


def first_stage(run: Run) -> Run:
    """The dense run in which the entries that a run prunes fade to zero."""
    start = run.without("early", "gradual")
    if run.fade != FADE:
        start = "+".join([*([] if start == "plain" else [start]), f"{_FADED}={run.fade:g}"])
    return replace(run, method="fade", rank=0, start=start, arguments="")


def method_arguments(run: Run, configs: tuple[str, str]) -> list[str]:
    """What the method adds to a command line.

    Args:
        run: dense, sparse, or a first stage.
        configs: the recipe's sparse and dense ones.
    """
    if run.method == "dense":
        return ["--config", str(HERE / configs[1])]
    arguments = ["--config", str(HERE / configs[0]), *MASKS[run.mask]]
    if run.method == "fade":
        return [*arguments, "--model.fade", str(run.fade)]
    if run.starts & {"gradual", "recovered"}:
        arguments += ["--model.slope.mask_calibration_batches", "0"]  # masks were chosen before
    arguments += ["--model.slope.adapter_rank", str(run.rank)]
    arguments += ["--model.slope.adapter_start_step", "0"] if "early" in run.starts else []
    return [*arguments, *shlex.split(run.arguments)]
