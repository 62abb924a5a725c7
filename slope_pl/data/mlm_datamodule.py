"""Pretraining text for BERT under `lightning.pytorch.Trainer`: masked language model and next sentence.

Source, preparation, cache and resume are those of `slope_pl.data.text_datamodule`; what is different is the tokeniser, which
marks sentences, and that an example is a pair of segments drawn anew at every visit.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from slope_pl.data.loading import ResumableDataLoader, check_integer
from slope_pl.data.mlm_pairs import Batch, MlmPairs
from slope_pl.data.mlm_sentences import GroupedText, Sentences, SentenceTokenizer, load_sentence_tokenizer
from slope_pl.data.mlm_spans import Spans, load_spans
from slope_pl.data.text_datamodule import TextDataModule, WindowLoader, WindowSampler
from slope_pl.data.text_prepare import prepare_shards
from slope_pl.data.text_shards import PackedTokens, ShardIndex
from slope_pl.data.text_sources import HubText, LocalText, TextSource, is_local_text

_SHORTEST = 8  # [CLS], two [SEP], and a few tokens in each segment


class PairSampler(WindowSampler):
    """Shuffled examples of one rank as ``(epoch, index)``: data workers know the epoch from the index alone."""

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch
        return ((epoch, index) for index in super().__iter__())  # type: ignore[misc]


class PairLoader(WindowLoader):
    """A resumable loader of `MlmPairs`; batches that a checkpoint lies behind are never made."""

    def _layout(self) -> dict[str, int]:
        pairs = self.dataset
        assert isinstance(pairs, MlmPairs)
        digest = hashlib.sha256(json.dumps([shard.sha256 for shard in pairs.tokens.shards]).encode()).hexdigest()
        return {
            **ResumableDataLoader._layout(self),
            "max_length": pairs.max_length,
            "max_predictions": pairs.max_predictions,
            "short_probability (ppm)": round(pairs.short_probability * 1e6),
            "tokens' checksum": int(digest[:8], 16),
        }


class MlmDataModule(TextDataModule):
    """Any text as pairs of segments with hidden tokens (Devlin et al. 2018, section 3.1).

    Batches are what `MlmPairs.__getitems__` returns; training batches are all full and of one shape. Masks, pairs and order
    are drawn anew in every epoch, each as a function of the seed, the epoch and the example's index; validation draws as
    epoch 0 does, always the same. A checkpoint holds the position, so that a run stopped in the middle of an epoch goes on
    with the next batch. Ranks get disjoint examples.

    The text is tokenised once into a folder below ``cache_dir``, whatever the length of the examples: both phases read the
    same shards. One source a run; folders of several can be prepared one after the other.

    Args:
        source: The text: a .txt or .jsonl file, or a folder of them (also .xz, .gz); a hub data set id, which is streamed;
            or a folder that was prepared before (one with index.json).
        tokenizer: A vocab.txt, a folder with tokenizer.json or vocab.txt, or a hub model id.
        max_length: Tokens an example, with [CLS] and two [SEP]; published: 128 in phase 1, 512 in phase 2.
        max_predictions: Most hidden tokens an example; published: 20 at length 128, 80 at 512.
        batch_size: Training examples a batch, on each device.
        eval_batch_size: Validation examples a batch, on each device.
        val_fraction: Fraction of the documents held out for validation, by a hash of their text; 0 for none.
        short_probability: Share of the examples that are filled to a random length only.
        seed: Of order, pairs and masks.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        cache_dir: Where prepared text goes; None means ~/.cache/slope_pl/text, or below XDG_CACHE_HOME.
        sentences: "prose" splits sentences at full stops, "lines" takes each line for one.
        rows_per_document: How many consecutive documents of the source make one, a line each: for data with a sentence a row
            (with sentences="lines").
        separator: What separates the documents of a .txt file, such as a NUL or an empty line; None makes each file one
            document.
        text_field: Key of the text in .jsonl lines, or column of a hub data set.
        subset: Configuration of a hub data set.
        split: Split of a hub data set.
        revision: Commit or tag of a hub data set; without it, changes on the hub go unnoticed.
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
        source: str = "wikimedia/wikipedia",
        tokenizer: str = "google-bert/bert-large-uncased",
        max_length: int = 128,
        max_predictions: int = 20,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        val_fraction: float = 0.0005,
        short_probability: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        sentences: Sentences = "prose",
        rows_per_document: int = 1,
        separator: str | None = None,
        text_field: str = "text",
        subset: str | None = None,
        split: str = "train",
        revision: str | None = None,
        shard_tokens: int = 1 << 25,
        verify: bool = True,
        prepare_processes: int | None = None,
    ) -> None:
        for name, value, least in (
            ("max_length", max_length, _SHORTEST),
            ("max_predictions", max_predictions, 1),
            ("rows_per_document", rows_per_document, 1),
        ):
            check_integer(name, value, least)
        if max_predictions > max_length:
            raise ValueError(f"max_predictions is {max_predictions}, expected max_length={max_length} or less")
        if not isinstance(short_probability, int | float) or isinstance(short_probability, bool):
            raise TypeError(f"short_probability is {short_probability!r}, expected a number")
        if not 0 <= short_probability <= 1:
            raise ValueError(f"short_probability is {short_probability}, expected a share from 0 to 1")
        if sentences not in ("prose", "lines"):
            raise ValueError(f"sentences is {sentences!r}, expected 'prose' or 'lines'")
        super().__init__(
            source=source,
            tokenizer=tokenizer,
            context=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            seed=seed,
            num_workers=num_workers,
            cache_dir=cache_dir,
            separator=separator,
            text_field=text_field,
            subset=subset,
            split=split,
            revision=revision,
            shard_tokens=shard_tokens,
            verify=verify,
            prepare_processes=prepare_processes,
        )
        self.max_length, self.max_predictions = max_length, max_predictions
        self.short_probability, self.sentences = float(short_probability), sentences
        self.rows_per_document = rows_per_document
        self._pairs: dict[str, MlmPairs] = {}

    @property
    def folder(self) -> Path:
        """Folder of the shards, there or not."""
        shards = super().folder
        rows = "" if self.rows_per_document == 1 else f"-{self.rows_per_document}"
        return shards if self._is_prepared else shards.with_name(f"{shards.name}-{self.sentences}{rows}")

    def load_tokenizer(self) -> SentenceTokenizer:
        """Load the tokeniser; see `load_sentence_tokenizer` for what can go wrong."""
        return load_sentence_tokenizer(self.tokenizer, self.sentences)

    def prepare_data(self) -> None:
        """Tokenise the text, or check that what is prepared is still of it; then find the examples of this length.

        Raises:
            ShardError: The folder is of another text, tokeniser or way to split sentences, or it is damaged.
            TextFormatError: The source is not text.
            DataUnavailableError: Source or tokeniser cannot be reached.
        """
        if self.rows_per_document == 1 or self._is_prepared:
            if self.rows_per_document != 1:
                rank_zero_info(f"rows_per_document has no effect: {self.source} was prepared before")
            super().prepare_data()
        elif not self._checked:
            self._say_what_has_no_effect()
            rows: TextSource
            if is_local_text(self.source):
                rows = LocalText(self.source, self.separator, self.text_field)
            else:
                rows = HubText(self.source, self.subset, self.split, self.revision, self.text_field)
            prepare_shards(
                self.folder,
                GroupedText(rows, self.rows_per_document),
                self.load_tokenizer(),
                val_fraction=self.val_fraction,
                shard_tokens=self.shard_tokens,
                verify=self.verify,
                processes=self.prepare_processes,
            )
            self._checked = True
        index, tokenizer = self._load(), self.load_tokenizer()
        for split in ("train", "val"):
            self._spans(index, split, tokenizer, save=True)

    def _spans(self, index: ShardIndex, split: str, tokenizer: SentenceTokenizer, save: bool = False) -> Spans:
        return load_spans(PackedTokens(self.folder, index, split), split, tokenizer, self.max_length - 3, save)

    def setup(self, stage: str | None = None) -> None:
        """Open the shards; nothing is written, so all ranks may.

        Args:
            stage: Of no importance.

        Raises:
            ShardError: The text is not prepared, or not with these settings, or a shard is missing or has the wrong size.
            ValueError: There is too little text: fewer examples than one batch takes on each rank, or fewer than two
                documents of two sentences in a split, between which random pairs could be made.
        """
        if self._index is not None:
            return
        index, tokenizer = self._load(), self.load_tokenizer()
        index.check_tokenizer(self.folder, {**index.tokenizer, "fingerprint": tokenizer.fingerprint})
        index.check_files(self.folder, content=False)
        options = {"max_length": self.max_length, "max_predictions": self.max_predictions}
        for split in ("train", "val"):
            spans = self._spans(index, split, tokenizer)
            self._check_documents(index, split, spans)
            tokens = PackedTokens(self.folder, index, split)
            chance = self.short_probability
            self._pairs[split] = MlmPairs(tokens, spans, tokenizer, **options, seed=self.seed, short_probability=chance)
        train, ranks = self._pairs["train"], self._ranks["num_replicas"]
        if len(train) < self.batch_size * ranks:
            raise ValueError(
                f"the training text of {len(train.tokens):,} tokens gives {len(train):,} examples of {self.max_length} "
                f"tokens, expected {self.batch_size * ranks:,} or more: a batch of {self.batch_size} for each of {ranks} "
                "ranks. Give more text, or lower max_length, batch_size or the number of devices."
            )
        counts = "; ".join(
            f"{split}: {len(pairs):,} examples of {self.max_length} tokens from {len(pairs.spans.ends):,} documents "
            f"({index.splits[split].documents - len(pairs.spans.ends):,} of one sentence or none left out)"
            for split, pairs in self._pairs.items()
        )
        rank_zero_info(f"text {self.folder}: {counts}")
        self._index = index

    def _check_documents(self, index: ShardIndex, split: str, spans: Spans) -> None:
        usable, documents = len(spans.ends), index.splits[split].documents
        if usable >= 2 or (split == "val" and not self.val_fraction):
            return
        way_out = {
            "train": "Give more text, say where documents end (separator) and what a sentence is (sentences), or lower "
            "val_fraction.",
            "val": "Raise val_fraction, or set it to 0 to train without validation.",
        }
        raise ValueError(
            f"{usable} of the {documents:,} documents of the {split} split have two sentences or more, expected at least "
            f"two: half of all pairs join two documents. {way_out[split]}"
            + ("" if self.separator else " A file is one document unless separator says otherwise.")
        )

    @property
    def train_pairs(self) -> MlmPairs:
        """Training examples, after `setup`."""
        return self._ready(self._pairs.get("train"), "train_pairs")

    @property
    def val_pairs(self) -> MlmPairs:
        """Held-out examples, after `setup`; none with ``val_fraction=0``."""
        return self._ready(self._pairs.get("val"), "val_pairs")

    def train_dataloader(self) -> PairLoader:
        """Shuffled examples of this rank, full batches only; the order is a function of ``(seed, epoch)``."""
        pairs = self.train_pairs
        sampler = PairSampler(pairs, **self._ranks, seed=self.seed)
        return PairLoader(pairs, batch_size=self.batch_size, sampler=sampler, drop_last=True, **self._loader_options())

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Held-out examples in order, the same every time; [] with ``val_fraction=0``.

        Over several ranks Lightning deals them out and repeats up to ``ranks - 1`` of them.
        """
        if not len(self.val_pairs):
            return []
        return DataLoader(self.val_pairs, batch_size=self.eval_batch_size, **self._loader_options())
