"""Whether all of a checkpoint is there, and as it was written.

A file that ``torch.save`` wrote is a zip archive, and every tensor in it has a checksum that ``torch.load`` does not look at. A
damaged file that loads is worse than one that does not; here all of it is read and compared.
"""

import io
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import torch

from slope_pl.checkpoint.sharded import is_sharded_folder, stored_parts
from slope_pl.checkpoint.zero import describe_zero, is_zero_folder
from slope_pl.errors import CheckpointError

# What is written last into a folder: Lightning's of FSDP2, DeepSpeed's.
_SHARDED_MARK, _ZERO_MARK = ("meta.pt", ".metadata"), "latest"


def damage(path: Path) -> str | None:
    """Why a checkpoint is not whole, or None.

    Args:
        path: a file; or the folder of a sharded checkpoint (FSDP2's, DeepSpeed's), whose parts are looked at one by one.
    """
    if path.is_symlink() and not path.exists():
        return f"it is a link to {path.readlink()}, which is not there"
    if not path.is_dir():
        return _damage_of(path)
    marks = (_ZERO_MARK,) if is_zero_folder(path) else _SHARDED_MARK
    missing = next((name for name in marks if not (path / name).is_file()), None)
    if missing is not None:
        return f"it has no {missing}: its save was not finished"
    try:
        if is_zero_folder(path):
            describe_zero(path)
        reasons = ((file.name, _damage_of(file)) for file in sorted(path.rglob("*.pt")) if file.is_file())
        found = next((f"{name}: {reason}" for name, reason in reasons if reason), None)
        return _damaged_shard(path) if found is None and is_sharded_folder(path) else found
    except CheckpointError as error:
        return str(error)


def _damage_of(file: Path | IO[bytes]) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
        if broken is None:  # torch's reader looks at less content, and more closely at what stands around it
            if not isinstance(file, Path):
                file.seek(0)
            reader: Any = torch._C.PyTorchFileReader(str(file) if isinstance(file, Path) else file)
            for record in reader.get_all_records():
                reader.get_record_offset(record)
    # Nothing was compressed or encrypted: what asks for that, or is no text where a name should be, is damaged.
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        return str(error).partition(". This is")[0]
    return None if broken is None else f"the checksum of {broken} is wrong"


def _damaged_shard(path: Path) -> str | None:
    """A shard is a row of archives, one for each piece of a tensor; where they are, the index says."""
    for file, pieces in stored_parts(path).items():
        if not file.is_file():
            return f"it has no {file.name}, which its index names"
        with file.open("rb") as stream:
            for name, offset, length in pieces:
                stream.seek(offset)
                reason = _damage_of(io.BytesIO(stream.read(length)))
                if reason is not None:
                    return f"{file.name}: {name}: {reason}"
    return None
