"""Packed tokens on disk: shards of a fixed number of tokens and one index that says what they are.

A folder holds ``index.json`` and, for each split, ``<split>-00000.bin`` and so on: little-endian uint16 (uint32 for
vocabularies that need it), without a header, so that any program can map them. All shards of a split but the last hold
``shard_tokens`` tokens. Documents follow each other, each with its end-of-text token behind it, across shards.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from slope_pl.data.text_sources import sha256

FORMAT = "slope_pl packed tokens"
VERSION = 1
INDEX = "index.json"
SPLITS = ("train", "val")
_SHOWN = 5  # differences in a message


class ShardError(ValueError):
    """A shard or the index is damaged, or is not what was asked for; the message names the file and the fix."""


@dataclass
class Shard:
    """One file of tokens.

    Attributes:
        file: Its name in the folder.
        tokens: How many it holds.
        sha256: Of its bytes, hex.
    """

    file: str
    tokens: int
    sha256: str


@dataclass
class SplitIndex:
    """The shards of one split.

    Attributes:
        documents: Documents in them, the one that ends in ``tail`` included.
        shards: In order.
        tail: Tokens that do not fill a shard yet, while preparation is under way.
    """

    documents: int = 0
    shards: list[Shard] = field(default_factory=list)
    tail: Shard | None = None

    @property
    def tokens(self) -> int:
        """Tokens in the shards."""
        return sum(shard.tokens for shard in self.shards)


@dataclass
class ShardIndex:
    """What a folder of shards holds.

    Attributes:
        source: Fingerprint of the text.
        tokenizer: ``fingerprint``, ``vocab_size`` and ``end_of_text`` of the tokeniser.
        val_fraction: Fraction of the documents that was held out.
        dtype: Of a token, ``"<u2"`` or ``"<u4"``.
        shard_tokens: Tokens in every shard but the last.
        complete: False while preparation is under way.
        documents_read: Documents taken from the source, empty ones included.
        empty: Documents without anything but white space, left out.
        characters: Characters in the others.
        splits: ``"train"`` and ``"val"``.
    """

    source: dict[str, Any]
    tokenizer: dict[str, Any]
    val_fraction: float
    dtype: str
    shard_tokens: int
    complete: bool = False
    documents_read: int = 0
    empty: int = 0
    characters: int = 0
    splits: dict[str, SplitIndex] = field(default_factory=lambda: {split: SplitIndex() for split in SPLITS})

    def save(self, folder: Path) -> None:
        """Write ``index.json``, whole or not at all."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_atomically(folder / INDEX, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> "ShardIndex":
        """Read ``index.json``.

        Raises:
            FileNotFoundError: There is none.
            ShardError: It is damaged, or of another format or version.
        """
        path = folder / INDEX
        fix = f"delete the folder {folder} to prepare the text again"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ShardError(f"{path}: not an index of packed tokens; give another folder")
            if (version := content.pop("version")) != VERSION:
                raise ShardError(f"{path}: format version {version}, this program reads {VERSION}; {fix}")
            content["splits"] = {name: _split(split) for name, split in content["splits"].items()}
            if set(content["splits"]) != set(SPLITS):
                raise ValueError(f"splits {sorted(content['splits'])}, expected {sorted(SPLITS)}")
            index = cls(**content)
            index._check_numbers()
            return index
        except ShardError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{path}: the index is damaged ({type(error).__name__}: {error}); {fix}") from error

    def _check_numbers(self) -> None:
        """Raise ValueError where readers of the shards would go astray."""
        if self.dtype not in ("<u2", "<u4"):
            raise ValueError(f"dtype is {self.dtype!r}, expected '<u2' or '<u4'")
        if not isinstance(self.tokenizer, dict) or not isinstance(self.source, dict):
            raise ValueError(f"tokenizer is {self.tokenizer!r} and source {self.source!r}, expected two objects")
        if not isinstance(self.shard_tokens, int) or self.shard_tokens < 1:
            raise ValueError(f"shard_tokens is {self.shard_tokens!r}, expected 1 or more")
        for split in self.splits.values():
            for shard in (*split.shards, *([split.tail] if split.tail else [])):
                full = any(shard is other for other in split.shards[:-1])
                least = self.shard_tokens if full else 1
                if not isinstance(shard.file, str) or Path(shard.file).name != shard.file:
                    raise ValueError(f"a shard is called {shard.file!r}, expected the name of a file in the folder")
                if not isinstance(shard.tokens, int) or not least <= shard.tokens <= self.shard_tokens:
                    raise ValueError(
                        f"{shard.file} has {shard.tokens!r} tokens, expected {least} to shard_tokens={self.shard_tokens}"
                    )

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits of the shards of both splits: the same tokens, split alike, give the same ones."""
        parts = [f"{name} {shard.sha256}" for name in SPLITS for shard in self.splits[name].shards]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]

    def check_files(self, folder: Path, content: bool) -> None:
        """Check every shard.

        Args:
            folder: Where they lie.
            content: Whether to read them, or to compare sizes alone.

        Raises:
            ShardError: A shard is missing, truncated or changed.
        """
        shards = [shard for split in self.splits.values() for shard in (*split.shards, split.tail) if shard]
        size = np.dtype(self.dtype).itemsize
        fix = f"Copy it again, or delete the folder {folder} to prepare the text again."
        for shard in tqdm(shards, desc="checking shards", unit=" shards", delay=2, leave=False, disable=not content):
            path = folder / shard.file
            if not path.is_file():
                raise ShardError(f"{path}: the shard is missing, expected {shard.tokens:,} tokens. {fix}")
            if (found := path.stat().st_size) != shard.tokens * size:
                what = "truncated" if found < shard.tokens * size else "too long"
                raise ShardError(
                    f"{path}: the shard is {what}: {found:,} bytes, expected {shard.tokens * size:,} "
                    f"({shard.tokens:,} tokens of {size} bytes). {fix}"
                )
            if content and (digest := sha256(path)) != shard.sha256:
                raise ShardError(
                    f"{path}: the shard is damaged: SHA-256 {digest[:16]}..., expected {shard.sha256[:16]}.... {fix}"
                )

    def check_tokenizer(self, folder: Path, tokenizer: Mapping[str, Any]) -> None:
        """Check that the shards are of this tokeniser.

        Raises:
            ShardError: They are of another.
        """
        if changed := differences(self.tokenizer, tokenizer):
            raise ShardError(
                f"{folder / INDEX}: the shards are of another tokeniser: {changed}. Give the tokeniser they were made "
                f"with, or delete the folder {folder} to prepare the text again."
            )


class PackedTokens:
    """The tokens of one split, mapped into memory and read by position.

    Args:
        folder: Folder of the shards.
        index: Its index.
        split: ``"train"`` or ``"val"``.
    """

    def __init__(self, folder: Path, index: ShardIndex, split: str) -> None:
        self.folder, self.shards = folder, index.splits[split].shards
        self.dtype, self.shard_tokens, self.tokens = index.dtype, index.shard_tokens, index.splits[split].tokens
        self._maps: dict[int, NDArray[Any]] = {}

    def __len__(self) -> int:
        return self.tokens

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry its whole content to the data workers.
        return {**self.__dict__, "_maps": {}}

    def read(self, start: int, out: NDArray[np.int64]) -> None:
        """Fill ``out``, int64 ``(n,)``, with the tokens ``start : start + n``.

        Raises:
            IndexError: There are not so many tokens.
        """
        if not 0 <= start <= self.tokens - len(out):
            raise IndexError(f"tokens {start} to {start + len(out)} of {self.tokens} in {self.folder}")
        done = 0
        while done < len(out):
            number, offset = divmod(start + done, self.shard_tokens)
            part = self._map(number)[offset : offset + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)

    def _map(self, number: int) -> NDArray[Any]:
        if number not in self._maps:
            path = self.folder / self.shards[number].file
            self._maps[number] = np.memmap(path, self.dtype, mode="r", shape=(self.shards[number].tokens,))
        return self._maps[number]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say in words where two mappings differ; "" if nowhere."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    shown = [f"{key} was {_short(before.get(key))} and is {_short(now.get(key))}" for key in keys[:_SHOWN]]
    return ", ".join([*shown, f"and {len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else shown)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: under another name, to the disk, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _split(content: dict[str, Any]) -> SplitIndex:
    tail = content["tail"]
    shards = [Shard(**shard) for shard in content["shards"]]
    return SplitIndex(content["documents"], shards, None if tail is None else Shard(**tail))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:16] + "..."
