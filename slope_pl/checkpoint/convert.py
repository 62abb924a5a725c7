"""From any kind of checkpoint to another, on one process."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slope_pl.checkpoint.files import appearing_whole, save_whole
from slope_pl.checkpoint.mark import CHECKPOINT_KEY, check_mark
from slope_pl.checkpoint.sharded import is_sharded_folder, read_sharded, write_sharded
from slope_pl.checkpoint.trusted import load_trusted
from slope_pl.checkpoint.weights import read_weights, write_weights
from slope_pl.checkpoint.whole import damage
from slope_pl.checkpoint.zero import describe_zero, is_zero_folder, read_zero
from slope_pl.errors import CheckpointError

KINDS = ("full", "sharded", "safetensors", "huggingface")
SOURCES = (
    "a checkpoint file of Lightning's, the folder that FSDP2 or DeepSpeed wrote in its place, or weights.safetensors"
)


def checkpoint_kind(path: str | Path) -> str:
    """``full``, ``sharded`` (FSDP2's folder), ``deepspeed`` (ZeRO's) or ``safetensors``.

    Raises:
        CheckpointError: if there is nothing, or a folder of another kind.
    """
    source = Path(path).expanduser()
    if source.is_file():
        return "safetensors" if source.suffix == ".safetensors" else "full"
    if source.is_dir() and is_zero_folder(source):
        return "deepspeed"
    if source.is_dir() and is_sharded_folder(source):
        return "sharded"
    what = f"is no checkpoint; it holds {_listing(source)}" if source.is_dir() else "is not there"
    raise CheckpointError(f"{source} {what}; expected {SOURCES} (working directory: {Path.cwd()})")


def read_checkpoint(path: str | Path, optimizer: bool = True, verify: bool = True) -> dict[str, Any]:
    """Any checkpoint as the full one that a Trainer on a single device would have written. No pickled code is run.

    Args:
        path: see :func:`checkpoint_kind`. Tensors of a file are mapped, those of a folder are read.
        optimizer: whether to read the optimizer's state too.
        verify: whether to compare all of it with its checksums first, for which it is read once more; safetensors has none.

    Returns:
        Lightning's mapping: ``state_dict``, ``optimizer_states``, ``loops``, ``callbacks`` and so on; of a safetensors file,
        ``state_dict`` and this package's mark.

    Raises:
        CheckpointError: if it is missing, damaged, would run code, or a newer version of this package wrote it.
    """
    source, kind = Path(path).expanduser(), checkpoint_kind(path)
    if verify and kind != "safetensors" and (reason := damage(source)) is not None:
        raise CheckpointError(f"{source} is damaged or no checkpoint: {reason}. Take another one; expected {SOURCES}")
    if kind == "sharded":
        content = read_sharded(source, optimizer)
    elif kind == "deepspeed":
        content = read_zero(source, optimizer)
    elif kind == "safetensors":
        tensors, mark = read_weights(source)
        content = {"state_dict": tensors} | ({} if mark is None else {CHECKPOINT_KEY: mark})
    else:
        content = load_trusted(source)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{source} holds no state_dict of a Lightning module; expected {SOURCES}")
    check_mark(content)
    if not optimizer:
        content.pop("optimizer_states", None)
    return content


def saved_settings(path: str | Path) -> dict[str, Any]:
    """The hyperparameters in a checkpoint of any kind; its tensors are not read.

    Raises:
        CheckpointError: see :func:`read_checkpoint`.
    """
    found = read_rest(path).get("hyper_parameters")
    return dict(found) if isinstance(found, dict) else {}


def read_rest(path: str | Path) -> dict[str, Any]:
    """What a checkpoint has beside weights and moments: settings, loops, callbacks; those of a file are in it, but not read.

    Raises:
        CheckpointError: see :func:`read_checkpoint`.
    """
    source, kind = Path(path).expanduser(), checkpoint_kind(path)
    if kind == "safetensors":
        return {}
    if kind == "deepspeed":
        source = describe_zero(source).models[0]
    content = load_trusted(source / "meta.pt" if kind == "sharded" else source)
    if not isinstance(content, dict) or (kind == "full" and not isinstance(content.get("state_dict"), dict)):
        raise CheckpointError(f"{source} holds no state_dict of a Lightning module; expected {SOURCES}")
    check_mark(content)
    return content


def convert(source: str | Path, target: str | Path, to: str = "full", module: Any = None) -> Path:
    """Write a checkpoint in another form.

    Args:
        source: see :func:`checkpoint_kind`; it stays as it is.
        target: must not be there yet.
        to: ``full``: a file that every strategy resumes from, with the optimizer's state; ``sharded``: FSDP2's folder, of
            which each process reads its part; ``safetensors``: half-size weights and the config; ``huggingface``: a dense
            model, by ``module.export``.
        module: for ``huggingface``, the LightningModule's class.

    Returns:
        the target.

    Raises:
        CheckpointError: see :func:`read_checkpoint`; or the target exists, or the source lacks what it needs.
        OSError: if the target cannot be written, as on a full disk; nothing is left of it.
    """
    final = Path(target).expanduser()
    if to not in KINDS:
        raise CheckpointError(f"to={to!r}: expected one of {', '.join(KINDS)}")
    if module is not None and to != "huggingface":
        raise CheckpointError(
            f"module={module.__name__} has no effect with to={to!r}: leave it out, or take 'huggingface'"
        )
    if final.exists():
        raise CheckpointError(f"{final} exists already: remove it, or give another name")
    if to == "huggingface":
        if not hasattr(module, "export"):
            raise CheckpointError(
                f"to='huggingface' needs the class of a LightningModule with export(folder), got {module!r}: the "
                "architecture is not in a checkpoint. The recipes' classes have it"
            )
        with appearing_whole(final) as unfinished:
            load_module(module, source).export(str(unfinished))
        return final
    content = read_checkpoint(source, optimizer=to != "safetensors")
    if to == "safetensors":
        return write_weights(content["state_dict"], content.get(CHECKPOINT_KEY), final)
    if "loops" not in content:
        raise CheckpointError(f"{source} holds weights alone, no training can go on from it; convert it to huggingface")
    (save_whole if to == "full" else write_sharded)(content, final)
    return final


def is_checkpoint(path: str | Path) -> bool:
    """Whether there is a checkpoint of any kind: a folder of another content, as a Hugging Face model's, is none."""
    source = Path(path).expanduser()
    return source.is_file() or (source.is_dir() and (is_zero_folder(source) or is_sharded_folder(source)))


@contextmanager
def as_full_file(path: str | Path) -> Iterator[Path]:
    """A file that Lightning's readers take: the checkpoint itself if it is one, else a copy of its weights for a while.

    Raises:
        CheckpointError: see :func:`read_checkpoint`.
    """
    content = read_checkpoint(path, optimizer=False)
    kind = checkpoint_kind(path)
    if kind == "safetensors":
        raise CheckpointError(
            f"{path} holds weights alone, and not how the model is built: make the model and use load_weights"
        )
    if kind == "full":
        yield Path(path).expanduser()
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.ckpt"
        save_whole(content, file)
        yield file


def load_module(module: Any, path: str | Path, **arguments: Any) -> Any:
    """``module.load_from_checkpoint`` of any kind of checkpoint, on the CPU.

    Args:
        module: the LightningModule's class.
        path: see :func:`checkpoint_kind`.
        **arguments: in place of the checkpoint's hyperparameters.

    Raises:
        CheckpointError: see :func:`read_checkpoint`; or its hyperparameters are not this class's.
    """
    with as_full_file(path) as file:
        try:
            return module.load_from_checkpoint(file, map_location="cpu", weights_only=True, **arguments)
        except TypeError as error:
            raise CheckpointError(
                f"{path} does not make a {module.__name__}: {error}. Give the class whose training wrote it, and what it does "
                "not save as a hyperparameter"
            ) from error


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
