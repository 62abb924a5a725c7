"""GLUE for `lightning.pytorch.Trainer`: rows, batches of their own length, and an order that survives being stopped."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from slope_pl.data.glue import HUB, find_glue_file, is_local, load_hub_split, read_glue
from slope_pl.data.glue_rows import GlueRows, build_rows
from slope_pl.data.glue_tasks import task_info
from slope_pl.data.loading import (
    Batch,
    EpochSampler,
    LoaderModule,
    ResumableDataLoader,
    check_flag,
    check_integer,
    check_place,
    subset,
)
from slope_pl.data.pair_tokenizer import load_pair_tokenizer

_BUCKET = 50  # batches whose rows are sorted by length together


class RowDataset(Dataset[Batch]):
    """Rows as tensors; hands out whole batches, padded to their longest row.

    Args:
        rows: The rows.
        pad_to: Lengths are rounded up to a multiple of this.
    """

    def __init__(self, rows: GlueRows, pad_to: int) -> None:
        self.rows, self.pad_to = rows, pad_to

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return the batch of these rows; see `GlueRows.batch` for keys and shapes."""
        return {key: torch.from_numpy(v) for key, v in self.rows.batch(indices, self.pad_to).items()}


class BucketSampler(EpochSampler):
    """Shuffled, yet with rows of like length in a batch; as its base class a function of ``(seed, epoch)`` and ranks.

    The shuffled order is cut into stretches of 50 batches, each is sorted by length, and the batches are shuffled again.
    All ranks get rows of like length in the same step, so that none waits for the others.

    Args:
        rows: The rows.
        batch_size: Rows a batch, on each rank.
        **options: Of `EpochSampler`.
    """

    def __init__(self, rows: RowDataset, batch_size: int, **options: Any) -> None:
        super().__init__(rows, **options)
        self.lengths, self.batch_size = rows.rows.lengths, batch_size

    def __iter__(self) -> Iterator[int]:
        state = np.random.SeedSequence([self.seed, self.epoch, 1]).generate_state(1, np.uint64)
        generator = np.random.default_rng(state)
        order = np.resize(generator.permutation(len(self.lengths)), self.total_size)
        step = self.batch_size * self.num_replicas
        batches: list[np.ndarray] = []
        for at in range(0, len(order), step * _BUCKET):
            part = order[at : at + step * _BUCKET]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            batches += [part[i : i + step] for i in range(0, len(part), step)]
        last = [batches.pop()] if len(batches[-1]) < step else []  # the short one must stay last
        shuffled = [batches[i] for i in generator.permutation(len(batches))]
        return iter(np.concatenate(shuffled + last)[self.rank :: self.num_replicas].tolist())


class RowLoader(ResumableDataLoader):
    """Its base class, which also notices that the way of sampling has changed in the middle of an epoch."""

    def _layout(self) -> dict[str, int]:
        found = super()._layout()
        return {"rows": found.pop("windows"), **found, "length_buckets": int(isinstance(self.sampler, BucketSampler))}


class GlueDataModule(LoaderModule):
    """A task of GLUE as rows of tokens.

    Batches are dictionaries: int64 ``input_ids``, ``attention_mask``, ``token_type_ids`` of shape ``(batch, T)``, where T is
    the longest row of the batch, ``labels`` ``(batch,)`` (float32 for STS-B) and ``row_index`` ``(batch,)``.

    Args:
        task: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli.
        source: Where the data is: the hub data set nyu-mll/glue, or a folder in one of the layouts that
            slope_pl/data/glue.py describes (CoLA/train.tsv, CoLA/dev.tsv, ...).
        tokenizer: A vocab.txt, a folder with tokenizer.json, vocab.txt, or vocab.json and merges.txt (RoBERTa), or a hub
            model id.
        max_length: Tokens a row, with [CLS] and [SEP]; longer rows are cut, and counted in the log.
        batch_size: Training rows a batch, on each device.
        eval_batch_size: Evaluation rows a batch, on each device.
        pad_to: Lengths of batches are rounded up to a multiple of this; max_length gives all batches one length. Sparse
            products are tuned once for each shape, so few lengths make a short start.
        length_buckets: Put rows of like length together, which saves padding and makes the order less random.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        max_train_rows: Train on a subset of so many rows, drawn at random from ``seed``, in file order.
        max_dev_rows: Evaluate on the first so many rows of each evaluation set.
        seed: Seed of the training order and of the training subset.
        on_bad_row: What to do with rows without text or with a wrong label: raise an error, or skip and count them.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        task: str = "cola",
        source: str = HUB,
        tokenizer: str = "google-bert/bert-large-uncased",
        max_length: int = 128,
        batch_size: int = 4,
        eval_batch_size: int = 64,
        pad_to: int = 8,
        length_buckets: bool = False,
        num_workers: int = 0,
        max_train_rows: int | None = None,
        max_dev_rows: int | None = None,
        seed: int = 0,
        on_bad_row: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__()
        self.info = task_info(task)
        least = {"num_workers": 0, "seed": 0, "max_length": 5}
        for name, value in (
            ("max_length", max_length),
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("pad_to", pad_to),
            ("num_workers", num_workers),
            ("max_train_rows", max_train_rows),
            ("max_dev_rows", max_dev_rows),
            ("seed", seed),
        ):
            if value is None and name.endswith("_rows"):
                continue
            hint = "; leave it out (null) for all rows" if name.endswith("_rows") else ""
            check_integer(name, value, least.get(name, 1), hint)
        check_place("source", source)
        check_place("tokenizer", tokenizer)
        check_flag("length_buckets", length_buckets)
        if on_bad_row not in ("raise", "skip"):
            raise ValueError(f"on_bad_row is {on_bad_row!r}, expected 'raise' or 'skip'")
        self.task, self.source, self.tokenizer, self.on_bad_row = task, source, tokenizer, on_bad_row
        self.max_length, self.pad_to, self.length_buckets = max_length, pad_to, length_buckets
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.max_train_rows, self.max_dev_rows, self.seed = max_train_rows, max_dev_rows, seed
        self._train: GlueRows | None = None
        self._dev: dict[str, GlueRows] = {}
        self._vocab_size: int | None = None

    def prepare_data(self) -> None:
        """Download what comes from the hub, on one process a node."""
        for split in ("train", *self.info.dev):
            if is_local(self.source):
                find_glue_file(self.source, self.task, split)
            else:
                load_hub_split(self.source, self.task, split)
        load_pair_tokenizer(self.tokenizer)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the splits that a stage needs, once.

        Args:
            stage: ``"fit"`` needs all; ``"validate"``, ``"test"`` and ``"predict"`` need the evaluation sets; None means all.
        """
        if stage in ("fit", None) and self._train is None:
            self._train = self._read("train")
        if not self._dev:
            self._dev = {split: self._read(split) for split in self.info.dev}

    def _read(self, split: str) -> GlueRows:
        examples = read_glue(self.source, self.task, split, self.on_bad_row)
        examples = (
            subset(examples, self.max_train_rows, self.seed) if split == "train" else examples[: self.max_dev_rows]
        )
        tokenizer = load_pair_tokenizer(self.tokenizer)
        self._vocab_size = tokenizer.vocab_size
        rows = build_rows(examples, self.info, tokenizer, self.max_length)
        rank_zero_info(
            f"{self.info.folder} {split}: {len(rows):,} rows of {rows.lengths.min()} to {rows.lengths.max()} tokens "
            f"(mean {rows.lengths.mean():.1f}), {rows.truncated:,} of them cut to {self.max_length}"
        )
        return rows

    @property
    def train_rows(self) -> GlueRows:
        """Training rows, after ``setup("fit")``."""
        return self._ready(self._train, "train_rows")

    @property
    def dev_rows(self) -> dict[str, GlueRows]:
        """Evaluation sets by name, in the order of the loaders, after `setup`."""
        return self._ready(self._dev or None, "dev_rows")

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary, after `setup`."""
        return self._ready(self._vocab_size, "vocab_size")

    @property
    def pad(self) -> int:
        """Id of the padding token, after `setup`."""
        return next(iter(self.dev_rows.values())).pad

    def train_dataloader(self) -> RowLoader:
        """Shuffled training rows of this rank; the order is a function of ``(seed, epoch)``."""
        dataset = RowDataset(self.train_rows, self.pad_to)
        options: dict[str, Any] = {**self._ranks, "shuffle": True, "seed": self.seed}
        sampler = (
            BucketSampler(dataset, self.batch_size, **options)
            if self.length_buckets
            else EpochSampler(dataset, **options)
        )
        return RowLoader(dataset, batch_size=self.batch_size, sampler=sampler, **self._loader_options())

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """Each evaluation set in order: one loader, MNLI has two."""
        return [
            DataLoader(RowDataset(rows, self.pad_to), batch_size=self.eval_batch_size, **self._loader_options())
            for rows in self.dev_rows.values()
        ]

    def predict_dataloader(self) -> list[DataLoader[Batch]]:
        """The same sets as for validation; over several ranks the first few rows occur twice."""
        return [
            self._equal_parts(RowDataset(rows, self.pad_to), self.eval_batch_size) for rows in self.dev_rows.values()
        ]
