"""Everything that can be set about the baselines, validated like :class:`slope_pl.SLoPeConfig`."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self, get_args

from slope_pl.config import SLoPeConfig, as_patterns, check_flag, check_fraction, check_integer, check_one_of
from slope_pl.errors import ConfigError

BackwardPruning = Literal["weight", "gradient", "none"]
BACKWARD_PRUNINGS: tuple[str, ...] = get_args(BackwardPruning)

DEFAULT_ADAPTER_FRACTION = 0.01
DEFAULT_DENSE_FRACTION = 1 / 6


class BaselineConfig:
    """What both configs share: plain mappings in and out."""

    FIXED: ClassVar[frozenset[str]]
    """Fields that cannot change once a model is converted."""
    decay: float
    mask_refresh_steps: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists: safe in a checkpoint that is read with ``weights_only=True``."""
        values = asdict(self)  # type: ignore[call-overload]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def coerce(cls, value: Any) -> Self:
        """A config as it is, a mapping of its fields as a config, None as the defaults.

        Raises:
            ConfigError: for an unknown field, or anything else.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"a {cls.__name__}, a mapping of its fields or None is expected, got {type(value).__name__}"
            )
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(str(key) for key in value if key not in known)
        if unknown:
            raise ConfigError(
                f"unknown {cls.__name__} setting {', '.join(map(repr, unknown))}; known are {', '.join(known)}"
            )
        return cls(**value)


@dataclass(frozen=True, kw_only=True)
class SRSTEConfig(BaselineConfig):
    """Extended SR-STE (SLoPe, appendix B.12, after arXiv 2102.04010).

    The appendix leaves some things open; the defaults are the reading that is closest to SR-STE and to SLoPe, and
    ``backward_pruning`` has the literal one.

    Args:
        decay: lambda of ``lambda (1 - mask) W``, which is added to the gradient. 6e-6 is the published choice for GPT2.
        mask_refresh_steps: optimizer steps between two choices of the mask by current magnitude; 1 is SR-STE's.
        backward_pruning: what the input gradient's product prunes. ``weight``: the masked weight a second time, along the
            output dimension, as SLoPe does (paper, section 3.2). ``gradient``: the output gradient, two of four along the
            output dimension by magnitude; this is what the appendix lists, and also what it reports to diverge.
            ``none``: nothing further; SR-STE as first published.
        adapter_rank: rank of the low-rank adapters in every masked layer; 0 for none.
        adapter_rank_fraction: the rank as a fraction of the smaller side of each layer, instead of ``adapter_rank``.
        adapter_fraction: the share of all optimizer steps, at the end, in which the adapters are awake.
        adapter_start_step: the optimizer step at which they wake, instead of a share.
        seed: of the adapters' initial values, which are SLoPe's for the same seed.
        include: which linear layers are masked, as in ``SLoPeConfig``; empty means all that SLoPe would make sparse.
        exclude: patterns of layers that stay dense.
        keep_first_dense: as in ``SLoPeConfig``.
        keep_heads_dense: as in ``SLoPeConfig``.

    Raises:
        ConfigError: if a value is out of range or two settings contradict each other.
    """

    FIXED: ClassVar[frozenset[str]] = frozenset(
        {"backward_pruning", "adapter_rank", "adapter_rank_fraction", "seed", "include", "exclude"}
    ) | {"keep_first_dense", "keep_heads_dense"}

    decay: float = 6e-6
    mask_refresh_steps: int = 1
    backward_pruning: BackwardPruning = "weight"
    adapter_rank: int = 0
    adapter_rank_fraction: float | None = None
    adapter_fraction: float = DEFAULT_ADAPTER_FRACTION
    adapter_start_step: int | None = None
    seed: int = 0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    keep_first_dense: bool = True
    keep_heads_dense: bool = True

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            object.__setattr__(self, name, as_patterns(name, getattr(self, name)))
        _check_common(self)
        check_one_of("backward_pruning", self.backward_pruning, BACKWARD_PRUNINGS)
        check_fraction(
            "adapter_fraction", self.adapter_fraction, "0.01 wakes the adapters for the last 1 % of the steps"
        )
        changed = self.adapter_fraction != DEFAULT_ADAPTER_FRACTION
        _one_mark("adapter_fraction", self.adapter_fraction, changed, "adapter_start_step", self.adapter_start_step)
        if not self.selection().has_adapters and (changed or self.adapter_start_step is not None):
            raise ConfigError(
                f"adapter_fraction={self.adapter_fraction}, adapter_start_step={self.adapter_start_step} have no effect "
                "without adapters; set adapter_rank (or adapter_rank_fraction), or leave them out"
            )

    def selection(self) -> SLoPeConfig:
        """The SLoPe config that chooses the same layers and has the same adapters."""
        return SLoPeConfig(
            seed=self.seed,
            adapter_rank=self.adapter_rank,
            adapter_rank_fraction=self.adapter_rank_fraction,
            include=self.include,
            exclude=self.exclude,
            keep_first_dense=self.keep_first_dense,
            keep_heads_dense=self.keep_heads_dense,
        )


@dataclass(frozen=True, kw_only=True)
class FSTConfig(BaselineConfig):
    """FST, fully sparse training of feed-forward layers (arXiv 2404.01847), dense at the end.

    Args:
        targets: which linear layers are masked: shell patterns on qualified names, as ``SLoPeConfig.include``. Empty means
            the feed-forward layers, told by name: see :func:`slope_pl.baselines.choose_feed_forward`.
        decay: lambda of ``lambda (1 - mask) W``, which is added to the gradient. Published for GPT2: 6e-5 (124M, 774M),
            2e-4 (350M, 1558M).
        mask_refresh_steps: optimizer steps between two choices of the 4x4 transposable mask; 40 as published.
        mvue: prune the output gradient in the weight gradient's product to two of four *tokens*, at random and unbiased
            (arXiv 2203.10991); on as published.
        dense_finish_fraction: the share of all optimizer steps, at the end, in which the weight is dense; 1/6 as published
            (50k of 300k). 0 never lets the mask go.
        dense_finish_step: the optimizer step at which training becomes dense, instead of a share.
        seed: of the random pruning.

    Raises:
        ConfigError: if a value is out of range or two settings contradict each other.
    """

    FIXED: ClassVar[frozenset[str]] = frozenset({"targets", "seed"})

    targets: tuple[str, ...] = ()
    decay: float = 6e-5
    mask_refresh_steps: int = 40
    mvue: bool = True
    dense_finish_fraction: float = DEFAULT_DENSE_FRACTION
    dense_finish_step: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", as_patterns("targets", self.targets))
        _check_common(self)
        check_flag("mvue", self.mvue)
        if self.dense_finish_fraction != 0 or isinstance(self.dense_finish_fraction, bool):
            check_fraction("dense_finish_fraction", self.dense_finish_fraction, "0 never ends the sparse phase")
        changed = self.dense_finish_fraction != DEFAULT_DENSE_FRACTION
        _one_mark(
            "dense_finish_fraction", self.dense_finish_fraction, changed, "dense_finish_step", self.dense_finish_step
        )


def _check_common(config: SRSTEConfig | FSTConfig) -> None:
    decay = config.decay
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < math.inf:
        raise ConfigError(f"decay={decay!r}: a number of at least 0 is expected; 0 is plain straight-through training")
    check_integer("mask_refresh_steps", config.mask_refresh_steps, 1, "; 1 chooses the mask anew at every step")
    check_integer("seed", config.seed, 0)


def _one_mark(fraction: str, value: float, changed: bool, step: str, at: int | None) -> None:
    if at is None:
        return
    check_integer(step, at, 0)
    if changed:
        raise ConfigError(f"{fraction}={value} and {step}={at} are both set; give one of them")
