"""Everything that can be set about the method, in one validated place."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from slope_pl.errors import ConfigError
from slope_pl.ops.backends import BACKEND_NAMES, BackendName
from slope_pl.sparsity import MASK_KINDS, MaskKind

DEFAULT_ADAPTER_START = 0.99


@dataclass(frozen=True, kw_only=True)
class SLoPeConfig:
    """How a model is made sparse and trained.

    Args:
        mask: how the forward mask is chosen at conversion. ``magnitude`` (the paper's): the two largest of four.
            ``random``: any two of four. ``transposable``: the best 4x4 tiles that are 2:4 along both dimensions, so that
            the input gradient is exact and the re-setup has nothing to do.
        layer_masks: another kind of mask for some layers: shell pattern on qualified names -> kind, as in
            ``{"*.mlp.*": "transposable"}``. The first pattern that matches counts; layers that none matches have ``mask``.
        seed: for random masks and the adapters' initial values; each layer derives its own from it and its name, so that
            all ranks agree and the global random state is left alone.
        mask_calibration_batches: 0 ranks weights by magnitude alone. N > 0 ranks them by magnitude times the norm of the
            input feature they are multiplied with (Wanda, arXiv 2306.11695), measured on N batches of training data (of each
            rank) before the first step: for pretrained weights. See :mod:`slope_pl.lightning.calibration`.
        backward_refresh_steps: optimizer steps between two choices of the double-pruned weight's columns. 100 is the
            paper's; 1 re-chooses at every step; None never does.
        adapter_rank: rank of the low-rank adapters in every sparse layer, at most its smaller side; 0 for none. The paper
            uses 4, 16 and 64 for BERT-Large, 4 and 16 for GPT2-Small.
        adapter_rank_fraction: the rank as a fraction of the hidden size, which is the smaller side of each layer
            (0.0625 is 64 at 1024), at least 1. Instead of ``adapter_rank``.
        adapter_start: the fraction of all optimizer steps after which the adapters wake; 0.99 leaves them the last 1 %.
        adapter_start_step: the optimizer step at which they wake, instead of a fraction; needed where the number of
            steps is unknown (``max_time`` alone, an endless data set).
        include: which linear layers become sparse: shell patterns on qualified names (``encoder.layer.*``). Empty means
            all. A pattern without wildcards is an explicit request: it overrides the rule for first layers and heads,
            and an ineligible layer is then an error.
        exclude: patterns of layers that stay dense, whatever ``include`` says.
        keep_first_dense: the first linear layer after the input (with its query, key and value siblings) stays dense.
        keep_heads_dense: output heads stay dense.
        backend: ``auto`` takes the fastest that runs on the device; a backend asked for by name runs or raises.
        fuse_gelu: where the backend can, the GELU between two sparse layers becomes part of their products
            (:func:`slope_pl.nn.sparse_mlp`), which is faster. False: three operations, as where it cannot.

    Raises:
        ConfigError: if a value is out of range or two settings contradict each other.
    """

    mask: MaskKind = "magnitude"
    layer_masks: dict[str, MaskKind] = field(default_factory=dict, hash=False)
    seed: int = 0
    mask_calibration_batches: int = 0
    backward_refresh_steps: int | None = 100
    adapter_rank: int = 0
    adapter_rank_fraction: float | None = None
    adapter_start: float = DEFAULT_ADAPTER_START
    adapter_start_step: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    keep_first_dense: bool = True
    keep_heads_dense: bool = True
    backend: BackendName = "auto"
    fuse_gelu: bool = True

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            object.__setattr__(self, name, as_patterns(name, getattr(self, name)))
        check_one_of("mask", self.mask, MASK_KINDS)
        object.__setattr__(self, "layer_masks", _as_kinds(self.layer_masks))
        check_one_of("backend", self.backend, BACKEND_NAMES)
        check_integer(
            "mask_calibration_batches", self.mask_calibration_batches, 0, "; 0 chooses masks by magnitude alone"
        )
        if "random" in self.mask_kinds and self.mask_calibration_batches:
            raise ConfigError(
                f"mask_calibration_batches={self.mask_calibration_batches} has no effect with mask='random', which looks at no "
                "weight; set it to 0, or choose mask='magnitude' or 'transposable' (layer_masks likewise)"
            )
        check_integer("seed", self.seed, 0)
        for name in ("keep_first_dense", "keep_heads_dense", "fuse_gelu"):
            check_flag(name, getattr(self, name))
        if self.backward_refresh_steps is not None:
            check_integer(
                "backward_refresh_steps", self.backward_refresh_steps, 1, "; None never re-chooses the columns"
            )
        check_integer("adapter_rank", self.adapter_rank, 0, "; 0 means no adapters")
        if self.adapter_rank_fraction is not None:
            check_fraction("adapter_rank_fraction", self.adapter_rank_fraction, "leave it out for no adapters")
            if self.adapter_rank:
                raise ConfigError(
                    f"adapter_rank={self.adapter_rank} and adapter_rank_fraction={self.adapter_rank_fraction} are both "
                    "set; give one of them"
                )
        check_fraction("adapter_start", self.adapter_start, "0.99 wakes the adapters for the last 1 % of the steps")
        if self.adapter_start_step is not None:
            check_integer("adapter_start_step", self.adapter_start_step, 0)
            if self.adapter_start != DEFAULT_ADAPTER_START:
                raise ConfigError(
                    f"adapter_start={self.adapter_start} and adapter_start_step={self.adapter_start_step} are both set; "
                    "give one of them"
                )
        if not self.has_adapters and (
            self.adapter_start_step is not None or self.adapter_start != DEFAULT_ADAPTER_START
        ):
            raise ConfigError(
                f"adapter_start={self.adapter_start}, adapter_start_step={self.adapter_start_step} have no effect without "
                "adapters; set adapter_rank (or adapter_rank_fraction), or leave the start out"
            )

    @property
    def mask_kinds(self) -> tuple[MaskKind, ...]:
        """The kinds of masks that are asked for, ``mask`` first."""
        return self.mask, *self.layer_masks.values()

    def for_layer(self, name: str) -> "SLoPeConfig":
        """The config of the layer with that qualified name: its kind of mask as ``mask``, and no ``layer_masks``."""
        if not self.layer_masks:
            return self
        kinds = (kind for pattern, kind in self.layer_masks.items() if fnmatchcase(name, pattern))
        return replace(self, mask=next(kinds, self.mask), layer_masks={})

    @property
    def has_adapters(self) -> bool:
        """Whether sparse layers get low-rank adapters."""
        return self.adapter_rank > 0 or self.adapter_rank_fraction is not None

    def rank_for(self, d_out: int, d_in: int) -> int:
        """Adapter rank of a layer of that shape; 0 without adapters."""
        if self.adapter_rank_fraction is None:
            return self.adapter_rank
        return max(1, round(self.adapter_rank_fraction * min(d_out, d_in)))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists: safe in a checkpoint that is read with ``weights_only=True``."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "SLoPeConfig":
        """The config of a mapping such as :meth:`to_dict` makes; an unknown key is a :class:`ConfigError`."""
        if not isinstance(settings, Mapping):
            raise ConfigError(f"a mapping of SLoPeConfig's fields is expected, got {type(settings).__name__}")
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in settings if key not in known)
        if unknown:
            raise ConfigError(f"unknown SLoPe setting {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
        return cls(**settings)


def as_config(value: "SLoPeConfig | Mapping[str, Any] | None") -> SLoPeConfig | None:
    """A config, a mapping of its fields, or None, as a config or None."""
    if value is None or isinstance(value, SLoPeConfig):
        return value
    if isinstance(value, Mapping):
        return SLoPeConfig.from_dict(value)
    raise ConfigError(f"a SLoPeConfig, a mapping of its fields or None is expected, got {type(value).__name__}")


def check_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise a ConfigError unless a setting has one of the allowed values."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}")


def check_integer(name: str, value: Any, least: int, hint: str = "") -> None:
    """Raise a ConfigError unless a setting is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r}: an integer of at least {least} is expected{hint}")


def check_flag(name: str, value: Any) -> None:
    """Raise a ConfigError unless a setting is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: True or False is expected")


def check_fraction(name: str, value: Any, hint: str) -> None:
    """Raise a ConfigError unless a setting is above 0 and at most 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ConfigError(f"{name}={value!r}: a fraction above 0 and at most 1 is expected; {hint}")


def _as_kinds(value: Any) -> dict[str, MaskKind]:
    """A mapping of shell patterns to kinds of masks; a ConfigError if it is something else."""
    if not isinstance(value, Mapping) or not all(isinstance(pattern, str) and pattern for pattern in value):
        raise ConfigError(
            f"layer_masks={value!r}: a mapping of patterns to kinds of masks is expected, for example "
            "{'*.mlp.*': 'transposable'}"
        )
    for pattern, kind in value.items():
        check_one_of(f"layer_masks[{pattern!r}]", kind, MASK_KINDS)
    return dict(value)


def as_patterns(name: str, value: Any) -> tuple[str, ...]:
    """A list of shell patterns as a tuple; a ConfigError if it is something else."""
    listed = isinstance(value, list | tuple)
    if not listed or not all(isinstance(pattern, str) and pattern for pattern in value):
        raise ConfigError(f"{name}={value!r}: a list of patterns is expected, for example ['encoder.layer.*']")
    return tuple(value)
