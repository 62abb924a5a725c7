"""Turn text into packed shards, once: tokenise (`slope_pl.data.text_workers`), hold documents out, survive being stopped.

Each time a shard is full, the tokens that do not fill one yet are written next to it and the index is replaced, in this
order. Whatever happens, the index on disk describes files that are there, and the next call goes on at the first document
it does not cover. The result is the same, byte for byte, however often preparation was interrupted and however many
processes tokenised.
"""

import hashlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from slope_pl.data.bpe import TextTokenizer
from slope_pl.data.loading import check_integer
from slope_pl.data.squad import DataUnavailableError
from slope_pl.data.text_packing import Batch, Packed
from slope_pl.data.text_shards import INDEX, Shard, ShardError, ShardIndex, differences, write_atomically
from slope_pl.data.text_sources import Document, TextFormatError, TextSource
from slope_pl.data.text_workers import pack_in_order, usable_processes

_BATCH_CHARACTERS = 1 << 20  # packed in one go: a tenth of a second of work for one core
_BATCH_DOCUMENTS = 4096
_QUIET_SECONDS = 2.0  # no progress bar for less


def describe_tokenizer(tokenizer: TextTokenizer) -> dict[str, str | int]:
    """Return what the index records of a tokeniser."""
    return {key: getattr(tokenizer, key) for key in ("fingerprint", "vocab_size", "end_of_text")}


def prepare_shards(
    folder: Path,
    source: TextSource,
    tokenizer: TextTokenizer,
    *,
    val_fraction: float,
    shard_tokens: int,
    verify: bool = True,
    processes: int | None = None,
) -> ShardIndex:
    """Prepare a text, go on preparing it, or check what is prepared.

    One process at a time prepares a folder; others wait for it. It has others tokenise for it, if the text is long.

    Args:
        folder: Where the shards go.
        source: The text.
        tokenizer: The tokeniser.
        val_fraction: Expected fraction of the documents to hold out, 0 to 1.
        shard_tokens: Tokens a shard.
        verify: Whether to read shards that exist and compare their SHA-256, or to compare sizes alone.
        processes: How many processes tokenise, 1 for this one alone; None for one a core, 16 at most. What is written does
            not depend on it. Each takes some 150 MB.

    Returns:
        The complete index.

    Raises:
        ShardError: The folder holds shards of another text or tokeniser, or damaged ones.
        TextFormatError: The source is not text, or there is none in it.
        DataUnavailableError: The source could not be read to its end.
        WorkerError: A process that tokenised was ended from outside.
        TypeError: ``processes`` is no integer.
        ValueError: ``processes`` is 0 or less.
    """
    if processes is not None:
        check_integer("processes", processes, 1, "; None for one a core")
    if (found := _load(folder)) and found.complete:  # without the lock: the folder may be read-only
        _check(folder, found, source, tokenizer, val_fraction, shard_tokens, verify)
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataUnavailableError(
            f"cannot make the folder {folder} for the prepared text: {error.strerror or error}. Choose another cache_dir."
        ) from error
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        rank_zero_info(f"another process prepares {folder}: waiting for it")
        held = lock.acquire()
    with held:
        index = _load(folder)
        if index:
            _check(folder, index, source, tokenizer, val_fraction, shard_tokens, verify)
        else:
            index = ShardIndex(
                source=source.fingerprint(),
                tokenizer=describe_tokenizer(tokenizer),
                val_fraction=val_fraction,
                dtype="<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4",
                shard_tokens=shard_tokens,
            )
        if not index.complete:
            _Writer(folder, index).write(source, tokenizer, processes or usable_processes())
    return index


def _load(folder: Path) -> ShardIndex | None:
    return ShardIndex.load(folder) if (folder / INDEX).exists() else None


def _check(
    folder: Path,
    index: ShardIndex,
    source: TextSource,
    tokenizer: TextTokenizer,
    val_fraction: float,
    shard_tokens: int,
    verify: bool,
) -> None:
    """Check that an index and its shards are of this text, tokeniser and layout."""
    index.check_tokenizer(folder, describe_tokenizer(tokenizer))
    then, now = _by_file(index.source), _by_file(source.fingerprint(index.source))
    changed = [differences(then, now)]
    before = {"val_fraction": index.val_fraction, "shard_tokens": index.shard_tokens}
    changed.append(differences(before, {"val_fraction": val_fraction, "shard_tokens": shard_tokens}))
    if wrong := "; ".join(filter(None, changed)):
        raise ShardError(
            f"{folder / INDEX}: the shards were made from something else than {source.name} is now: {wrong}. Restore "
            f"that, or delete the folder {folder} to prepare the text again."
        )
    index.check_files(folder, content=verify)


def _by_file(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint as one flat mapping, for comparison; the times of files do not count."""
    rest = {key: value for key, value in fingerprint.items() if key != "files"}
    files = {row["file"]: f"{row['sha256'][:12]} ({row['bytes']:,} bytes)" for row in fingerprint.get("files", ())}
    return rest | files


class _Writer:
    """Appends tokens to shards; see the module for the order in which files appear."""

    def __init__(self, folder: Path, index: ShardIndex) -> None:
        self.folder, self.index = folder, index
        self.dtype = np.dtype(index.dtype)
        self.open: dict[str, list[NDArray[np.generic]]] = {}
        self.waiting: dict[str, int] = {}
        for name, split in index.splits.items():
            tail = np.fromfile(folder / split.tail.file, self.dtype) if split.tail else np.empty(0, self.dtype)
            self.open[name], self.waiting[name] = [tail], len(tail)
        self._clean()

    def write(self, source: TextSource, tokenizer: TextTokenizer, processes: int) -> None:
        """Take the rest of the source in."""
        index, start = self.index, self.index.documents_read
        if start:
            done = sum(split.tokens for split in index.splits.values())
            rank_zero_info(f"{self.folder}: going on after {start:,} documents, {done:,} tokens in full shards")
        with tqdm(
            total=source.total,
            unit=source.unit,
            unit_scale=source.unit == "B",
            desc=f"tokenising {source.name}",
            delay=_QUIET_SECONDS,
            leave=False,
        ) as bar:
            batches = _batches(source.documents(start))
            packer = tokenizer.packer(index.dtype)
            with closing(pack_in_order(packer, batches, index.val_fraction, processes)) as results:
                for batch, packed in results:
                    self._add(batch, packed)
                    bar.update(batch.done - bar.n)
                    tokens = sum(split.tokens + self.waiting[name] for name, split in index.splits.items())
                    bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
        if index.documents_read == index.empty:
            raise TextFormatError(
                f"{source.name}: no text in it ({index.documents_read:,} documents, all of them empty), expected one "
                "document or more"
            )
        for split in index.splits:
            self._shard(split, least=1)
        index.complete = True
        self._commit()
        rank_zero_info(
            f"{self.folder}: {index.characters:,} characters; {index.empty:,} empty documents left out; "
            + "; ".join(f"{n}: {s.documents:,} documents, {s.tokens:,} tokens" for n, s in index.splits.items())
        )

    def _add(self, batch: Batch, packed: Packed) -> None:
        index = self.index
        for name, split in index.splits.items():
            self.open[name].append(packed.tokens[name])
            self.waiting[name] += len(packed.tokens[name])
            split.documents += packed.documents[name]
        index.documents_read += len(batch.texts)
        index.empty += packed.empty
        index.characters += packed.characters
        full = [self._shard(split, least=index.shard_tokens) for split in index.splits]
        if any(full):
            self._commit()

    def _shard(self, name: str, least: int) -> bool:
        """Write shards while ``least`` tokens are waiting; whether there was one."""
        split, wrote = self.index.splits[name], False
        if self.waiting[name] < least:
            return False
        tokens = np.concatenate(self.open[name])
        while len(tokens) >= least:
            part, tokens = tokens[: self.index.shard_tokens], tokens[self.index.shard_tokens :]
            split.shards.append(self._file(f"{name}-{len(split.shards):05}.bin", part))
            wrote = True
        self.open[name], self.waiting[name] = [tokens], len(tokens)
        return wrote

    def _file(self, name: str, tokens: NDArray[np.generic]) -> Shard:
        data = tokens.tobytes()
        write_atomically(self.folder / name, data)
        return Shard(name, len(tokens), hashlib.sha256(data).hexdigest())

    def _commit(self) -> None:
        for name, split in self.index.splits.items():
            split.tail = None
            if self.waiting[name]:
                self.open[name] = [np.concatenate(self.open[name])]
                # Another name each time: the index on disk still speaks of the last one.
                split.tail = self._file(f"{name}-tail-{self.index.documents_read}.bin", self.open[name][0])
        self.index.save(self.folder)
        self._clean()

    def _clean(self) -> None:
        """Remove tails and temporary files that no index speaks of."""
        kept = {split.tail.file for split in self.index.splits.values() if split.tail}
        for path in [*self.folder.glob("*-tail-*.bin"), *self.folder.glob("*.tmp")]:
            if path.name not in kept:
                path.unlink()


def _batches(documents: Iterator[Document]) -> Iterator[Batch]:
    texts: list[str] = []
    characters = done = 0
    for document in documents:
        texts.append(document.text)
        characters, done = characters + len(document.text), document.done
        if characters >= _BATCH_CHARACTERS or len(texts) >= _BATCH_DOCUMENTS:
            yield Batch(texts, done)
            texts, characters = [], 0
    if texts:
        yield Batch(texts, done)
