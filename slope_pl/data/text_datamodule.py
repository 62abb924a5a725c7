"""Pretraining text for `lightning.pytorch.Trainer`: windows of packed tokens in an order that survives being stopped.

The training order is a function of ``(seed, epoch)`` and the number of ranks. The loader's position is part of the
checkpoint, as in `slope_pl.data.squad_datamodule`: a run stopped in the middle of an epoch goes on with the next batch.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from slope_pl.data.bpe import END_OF_TEXT, TextTokenizer, load_bpe
from slope_pl.data.loading import (
    Batch,
    EpochSampler,
    LoaderModule,
    ResumableDataLoader,
    check_flag,
    check_integer,
    check_place,
)
from slope_pl.data.text_prepare import describe_tokenizer, prepare_shards
from slope_pl.data.text_shards import INDEX, VERSION, PackedTokens, ShardError, ShardIndex
from slope_pl.data.text_sources import HubText, LocalText, TextSource, is_local_text

_FIX = "call prepare_data() first, as the trainer does"


class TokenWindows(Dataset[Batch]):
    """Consecutive windows of ``context`` tokens and the token after each; hands out whole batches.

    Window ``i`` is the tokens ``i * context : (i + 1) * context + 1``, so that every token but the very first is predicted
    once. What does not fill a window at the end is left out. Windows run across documents.

    Args:
        tokens: The tokens.
        context: Length of a window.
    """

    def __init__(self, tokens: PackedTokens, context: int) -> None:
        self.tokens, self.context = tokens, context

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // self.context

    def __getitem__(self, index: int) -> Batch:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return ``input_ids`` and ``targets``, int64 ``(len(indices), context)``, and ``window_index`` ``(len(indices),)``."""
        rows = np.empty((len(indices), self.context + 1), np.int64)
        for row, index in zip(rows, indices, strict=True):
            self.tokens.read(index * self.context, row)
        window = torch.from_numpy(rows)
        inputs, targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()
        return {"input_ids": inputs, "targets": targets, "window_index": torch.tensor(indices)}


class WindowSampler(EpochSampler):
    """Shuffled windows of one rank; ranks get disjoint windows and equally many, so up to ``ranks - 1`` stay unseen.

    Args:
        windows: The windows.
        num_replicas: Number of ranks.
        rank: This one.
        seed: Of the order.
    """

    def __init__(self, windows: Dataset[Any], num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(windows, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed, drop_last=True)
        self.skip = 0  # indices that the next pass leaves out at its beginning

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        indices = list(super().__iter__())
        return iter(indices[skip:])


class WindowLoader(ResumableDataLoader):
    """A resumable loader whose skipped batches are never made: an epoch may have a hundred thousand."""

    def _layout(self) -> dict[str, int]:
        dataset = self.dataset
        assert isinstance(dataset, TokenWindows)
        digest = hashlib.sha256(json.dumps([shard.sha256 for shard in dataset.tokens.shards]).encode()).hexdigest()
        return {**super()._layout(), "context": dataset.context, "tokens' checksum": int(digest[:8], 16)}

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        sampler = self.sampler
        if not isinstance(sampler, WindowSampler):  # Lightning's, for overfit_batches
            yield from super().__iter__()
            return
        self._epoch = sampler.epoch
        self._batches = self._skip(sampler.epoch)
        sampler.skip = self._batches * (self.batch_size or 1)
        for batch in DataLoader.__iter__(self):
            self._batches += 1
            yield batch


class TextDataModule(LoaderModule):
    """Any text as windows of packed tokens.

    Batches are dictionaries of two int64 tensors of shape ``(batch, context)``: ``input_ids``, and ``targets``, which
    holds the token after each (already shifted; hence not ``labels``, which losses shift themselves. For such a loss,
    give ``input_ids`` as labels: the last position then predicts nothing). Documents are packed one after the other with
    an end-of-text token behind each. Training batches are all full; what is left of an epoch is left out.

    The text is tokenised once, by ``prepare_data`` on one process a node, into a folder below ``cache_dir`` whose name
    depends on all that is asked for here. Files that changed meanwhile are an error, not a silent second preparation.

    Args:
        source: The text: a .txt or .jsonl file, or a folder of them (also .xz, .gz); a hub data set id, which is streamed;
            or a folder that was prepared before (one with index.json). What exists on disk comes first.
        tokenizer: Folder or file of a byte-level BPE, or a hub model id; see `slope_pl.data.load_bpe`.
        context: Tokens a window.
        batch_size: Training windows a batch, on each device.
        eval_batch_size: Validation windows a batch, on each device.
        val_fraction: Fraction of the documents held out for validation, by a hash of their text; 0 for none.
        seed: Seed of the training order.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        cache_dir: Where prepared text goes; None means ~/.cache/slope_pl/text, or below XDG_CACHE_HOME.
        separator: What separates the documents of a .txt file, such as a NUL or an empty line; None makes each file one
            document.
        text_field: Key of the text in .jsonl lines, or column of a hub data set.
        subset: Configuration of a hub data set.
        split: Split of a hub data set.
        revision: Commit or tag of a hub data set; without it, changes on the hub go unnoticed.
        end_of_text: The token that ends a document.
        shard_tokens: Tokens a file of the prepared text.
        verify: Whether ``prepare_data`` reads all shards to compare their checksums, or compares sizes alone.
        prepare_processes: How many processes tokenise a long text, 1 for one alone; None for one a core, 16 at most. Each
            takes some 150 MB; what is prepared does not depend on their number.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        source: str = "openwebtext",
        tokenizer: str = "gpt2",
        context: int = 1024,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        val_fraction: float = 0.0005,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        separator: str | None = None,
        text_field: str = "text",
        subset: str | None = None,
        split: str = "train",
        revision: str | None = None,
        end_of_text: str = END_OF_TEXT,
        shard_tokens: int = 1 << 25,
        verify: bool = True,
        prepare_processes: int | None = None,
    ) -> None:
        super().__init__()
        counts = {"context": context, "batch_size": batch_size, "eval_batch_size": eval_batch_size, "seed": seed}
        for name, value in {**counts, "num_workers": num_workers, "shard_tokens": shard_tokens}.items():
            check_integer(name, value, 0 if name in ("seed", "num_workers") else 1)
        check_place("source", source)
        check_place("tokenizer", tokenizer)
        if cache_dir is not None:
            check_place("cache_dir", cache_dir)
        check_flag("verify", verify)
        if prepare_processes is not None:
            check_integer("prepare_processes", prepare_processes, 1, "; None for one a core")
        texts = {"text_field": text_field, "split": split, "end_of_text": end_of_text}
        optional = {"separator": separator, "subset": subset, "revision": revision}
        for name, text in {**texts, **optional}.items():
            if not isinstance(text, str) and not (text is None and name in optional):
                raise TypeError(f"{name} is {text!r}, expected a string{', or None' if name in optional else ''}")
        if not isinstance(val_fraction, int | float) or isinstance(val_fraction, bool):
            raise TypeError(f"val_fraction is {val_fraction!r}, expected a number")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction is {val_fraction}, expected 0 (nothing held out) or more, and less than 1")
        if separator == "":
            raise ValueError("separator is '', expected a string such as '\\0', or None for one document a file")
        self.source, self.tokenizer, self.end_of_text = source, tokenizer, end_of_text
        self.context, self.batch_size, self.eval_batch_size = context, batch_size, eval_batch_size
        self.val_fraction, self.seed, self.num_workers = float(val_fraction), seed, num_workers
        self.separator, self.text_field = separator, text_field
        self.subset, self.split, self.revision = subset, split, revision
        self.shard_tokens, self.verify, self.prepare_processes = shard_tokens, verify, prepare_processes
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slope_pl" / "text"
        self.cache_dir = default if cache_dir is None else Path(cache_dir).expanduser()
        self._checked = False
        self._index: ShardIndex | None = None
        self._train: TokenWindows | None = None
        self._val: TokenWindows | None = None

    @property
    def _is_prepared(self) -> bool:
        """Whether the source is a folder of shards."""
        return (Path(self.source).expanduser() / INDEX).is_file()

    @property
    def folder(self) -> Path:
        """Folder of the shards, there or not."""
        path = Path(self.source).expanduser()
        if self._is_prepared:
            return path
        local = is_local_text(self.source)
        tokenizer = Path(self.tokenizer).expanduser()
        what = [str(path.resolve()), self.separator] if local else [self.source, self.subset, self.split, self.revision]
        named = str(tokenizer.resolve()) if tokenizer.exists() else self.tokenizer
        settings = [
            VERSION,
            local,
            *what,
            self.text_field,
            named,
            self.end_of_text,
            self.val_fraction,
            self.shard_tokens,
        ]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:10]
        return self.cache_dir / f"{re.sub(r'[^A-Za-z0-9.]+', '-', path.name).strip('-.') or 'text'}-{key}"

    def load_tokenizer(self) -> TextTokenizer:
        """Load the tokeniser; see `slope_pl.data.load_bpe` for what can go wrong."""
        return load_bpe(self.tokenizer, self.end_of_text)

    def prepare_data(self) -> None:
        """Tokenise the text, or check that what is prepared is still of this text and tokeniser.

        Raises:
            ShardError: It is not, or it is damaged.
            TextFormatError: The source is not text.
            DataUnavailableError: Source or tokeniser cannot be reached.
        """
        if self._checked:
            return
        self._say_what_has_no_effect()
        if self._is_prepared:
            index = self._load()
            index.check_tokenizer(self.folder, describe_tokenizer(self.load_tokenizer()))
            index.check_files(self.folder, content=self.verify)
        else:
            source: TextSource
            if is_local_text(self.source):
                source = LocalText(self.source, self.separator, self.text_field)
            else:
                source = HubText(self.source, self.subset, self.split, self.revision, self.text_field)
            prepare_shards(
                self.folder,
                source,
                self.load_tokenizer(),
                val_fraction=self.val_fraction,
                shard_tokens=self.shard_tokens,
                verify=self.verify,
                processes=self.prepare_processes,
            )
        self._checked = True

    def _say_what_has_no_effect(self) -> None:
        hub = {"subset": self.subset, "revision": self.revision, "split": None if self.split == "train" else self.split}
        if self._is_prepared:
            what, ignored = "was prepared before", {"separator": self.separator, **hub}
        elif is_local_text(self.source):
            what, ignored = "is on disk", hub
        else:
            what, ignored = "is a hub data set", {"separator": self.separator}
        if names := [f"{name}={value!r}" for name, value in ignored.items() if value is not None]:
            rank_zero_info(f"{', '.join(names)} has no effect: {self.source} {what}")

    def setup(self, stage: str | None = None) -> None:
        """Open the shards; nothing is written, so all ranks may.

        Args:
            stage: Of no importance: opening takes milliseconds.

        Raises:
            ShardError: The text is not prepared, a shard is missing or has the wrong size, or ``val_fraction`` is not the
                one that a prepared folder was made with.
            ValueError: There is less text than one batch takes on each rank, or no document was held out.
        """
        if self._index is not None:
            return
        index = self._load()
        index.check_files(self.folder, content=False)
        train = TokenWindows(PackedTokens(self.folder, index, "train"), self.context)
        val = TokenWindows(PackedTokens(self.folder, index, "val"), self.context)
        documents = {name: split.documents for name, split in index.splits.items()}
        if self.val_fraction and not len(val):
            raise ValueError(
                f"{documents['val']} of {sum(documents.values()):,} documents ({len(val.tokens):,} tokens) are held out at "
                f"val_fraction={self.val_fraction}, expected a window of {self.context} tokens + 1 or more. Raise "
                "val_fraction, or set it to 0 to train without validation"
                + ("" if self.separator else "; a file is one document unless separator says otherwise")
                + "."
            )
        ranks = self._ranks["num_replicas"]
        if len(train) < self.batch_size * ranks:
            raise ValueError(
                f"the training text of {len(train.tokens):,} tokens gives {len(train):,} windows of {self.context} tokens, "
                f"expected {self.batch_size * ranks:,} or more: a batch of {self.batch_size} for each of {ranks} ranks. "
                "Give more text, or lower context, batch_size or the number of devices."
            )
        rank_zero_info(
            f"text {self.folder}: {len(train):,} training windows of {self.context} tokens ({documents['train']:,} "
            f"documents), {len(val):,} validation windows ({documents['val']:,} documents)"
        )
        self._index, self._train, self._val = index, train, val

    def _load(self) -> ShardIndex:
        folder = self.folder
        try:
            index = ShardIndex.load(folder)
        except FileNotFoundError:
            raise ShardError(f"no prepared text in {folder}; {_FIX}") from None
        if not index.complete:
            fix = "prepare it where the text is" if self._is_prepared else _FIX
            raise ShardError(f"{folder / INDEX}: preparation is not finished; {fix}")
        if index.val_fraction != self.val_fraction:
            raise ShardError(
                f"{folder / INDEX}: val_fraction is {self.val_fraction}, but the text was prepared with "
                f"{index.val_fraction}; set val_fraction to that, or give the text itself as source"
            )
        return index

    @property
    def index(self) -> ShardIndex:
        """What was prepared: counts, fingerprints, after `setup`."""
        return self._ready(self._index, "index")

    @property
    def train_windows(self) -> TokenWindows:
        """Training windows, after `setup`."""
        return self._ready(self._train, "train_windows")

    @property
    def val_windows(self) -> TokenWindows:
        """Held-out windows, after `setup`; may be none with ``val_fraction=0``."""
        return self._ready(self._val, "val_windows")

    @property
    def vocab_size(self) -> int:
        """Highest token id plus one, after `setup`; 50257 for GPT-2."""
        return self.index.tokenizer["vocab_size"]

    def train_dataloader(self) -> WindowLoader:
        """Shuffled training windows of this rank, full batches only; the order is a function of ``(seed, epoch)``."""
        windows = self.train_windows
        sampler = WindowSampler(windows, **self._ranks, seed=self.seed)
        return WindowLoader(
            windows, batch_size=self.batch_size, sampler=sampler, drop_last=True, **self._loader_options()
        )

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Held-out windows in order; [] with ``val_fraction=0``: no validation, which Lightning remarks on in a warning.

        Over several ranks Lightning deals them out and repeats up to ``ranks - 1`` of them.
        """
        if not len(self.val_windows):
            return []
        return DataLoader(self.val_windows, batch_size=self.eval_batch_size, **self._loader_options())
