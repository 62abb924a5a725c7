"""SQuAD v1.1 for `lightning.pytorch.Trainer`: windows, batches, and an order that survives being stopped.

The training order is a function of ``(seed, epoch)``. `ResumableDataLoader` has the ``state_dict`` that Lightning's fit
loop saves with every checkpoint, so that a run stopped in the middle of an epoch goes on with the batches it had left.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from slope_pl.data.loading import (
    Batch,
    EpochSampler,
    LoaderModule,
    ResumableDataLoader,
    check_integer,
    check_place,
    subset,
)
from slope_pl.data.pair_tokenizer import load_pair_tokenizer
from slope_pl.data.squad import Split, SquadExample, find_squad_file, is_local, load_hub_split, read_squad
from slope_pl.data.squad_windows import SquadWindows, build_windows, check_lengths


class WindowDataset(Dataset[Batch]):
    """Windows as int64 tensors; hands out whole batches.

    Args:
        windows: The windows. Their texts are left behind: workers need only the arrays.
        positions: Whether batches hold the gold positions.
    """

    def __init__(self, windows: SquadWindows, positions: bool) -> None:
        self.windows = replace(windows, examples=())
        self.positions = positions

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Batch:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return the batch of these windows; see `SquadWindows.batch` for keys and shapes."""
        return {key: torch.from_numpy(v) for key, v in self.windows.batch(indices, self.positions).items()}


class SquadDataModule(LoaderModule):
    """SQuAD v1.1 as windows of tokens.

    Batches are dictionaries of int64 tensors: ``input_ids``, ``attention_mask``, ``token_type_ids`` of shape
    ``(batch, max_length)`` and ``window_index`` ``(batch,)``; training batches also have ``start_positions`` and
    ``end_positions`` ``(batch,)``. Every window is padded to ``max_length``, so all full batches have one shape.

    Args:
        source: Where the data is: a hub data set id, or a folder with train*.json and dev*.json.
        tokenizer: A vocab.txt, a folder with tokenizer.json, vocab.txt, or vocab.json and merges.txt (RoBERTa), or a hub
            model id.
        train_file: SQuAD v1.1 JSON file to train on, instead of the one in ``source``.
        dev_file: SQuAD v1.1 JSON file to evaluate on, instead of the one in ``source``.
        max_length: Tokens a window, with [CLS], the question and two [SEP].
        doc_stride: Tokens between the starts of consecutive windows of a long context, as in BERT's original program
            (Hugging Face's option called stride is the overlap of the windows, not this).
        max_question_length: Longest question, tokens; longer ones are cut, and counted in the log.
        batch_size: Training windows a batch, on each device.
        eval_batch_size: Evaluation windows a batch, on each device.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        max_train_questions: Train on a subset of so many questions, drawn at random from ``seed``, in file order.
        max_dev_questions: Evaluate on the first so many questions of the file.
        seed: Seed of the training order and of the training subset.
        on_bad_answer: What to do with answers that are not where the data says: raise an error, or skip and count them.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        source: str = "squad",
        tokenizer: str = "bert-large-uncased",
        train_file: str | None = None,
        dev_file: str | None = None,
        max_length: int = 384,
        doc_stride: int = 128,
        max_question_length: int = 64,
        batch_size: int = 24,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        max_train_questions: int | None = None,
        max_dev_questions: int | None = None,
        seed: int = 0,
        on_bad_answer: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__()
        least = {"num_workers": 0, "seed": 0}
        for name, value in (
            ("max_length", max_length),
            ("doc_stride", doc_stride),
            ("max_question_length", max_question_length),
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("num_workers", num_workers),
            ("max_train_questions", max_train_questions),
            ("max_dev_questions", max_dev_questions),
            ("seed", seed),
        ):
            if value is None and name.endswith("_questions"):
                continue
            hint = "; leave it out (null) for all questions" if name.endswith("_questions") else ""
            check_integer(name, value, least.get(name, 1), hint)
        places = {"source": source, "tokenizer": tokenizer, "train_file": train_file, "dev_file": dev_file}
        for name, place in places.items():
            if place is not None or not name.endswith("_file"):
                check_place(name, place)
        if on_bad_answer not in ("raise", "skip"):
            raise ValueError(f"on_bad_answer is {on_bad_answer!r}, expected 'raise' or 'skip'")
        check_lengths(max_length, doc_stride, max_question_length)
        self.source, self.tokenizer, self.on_bad_answer = source, tokenizer, on_bad_answer
        self.train_file, self.dev_file = train_file, dev_file
        self.max_length, self.doc_stride, self.max_question_length = max_length, doc_stride, max_question_length
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.max_train_questions, self.max_dev_questions, self.seed = max_train_questions, max_dev_questions, seed
        self._train: SquadWindows | None = None
        self._dev: SquadWindows | None = None
        self._vocab_size: int | None = None
        self._pad: int | None = None

    def _place(self, split: Split) -> str:
        """File or hub id that a split is read from."""
        explicit = self.train_file if split == "train" else self.dev_file
        if explicit is not None:
            if not Path(explicit).expanduser().is_file():
                raise FileNotFoundError(f"{split}_file is {explicit!r}, which is not a file (seen from {Path.cwd()})")
            return explicit
        path = Path(self.source).expanduser()
        if path.is_dir():
            return str(find_squad_file(path, split))
        if path.is_file():
            raise ValueError(
                f"source is the file {self.source!r}, expected a folder or a hub id: one file cannot be both training "
                "and evaluation data. Give it as train_file or dev_file."
            )
        return self.source

    def prepare_data(self) -> None:
        """Download what comes from the hub, on one process a node."""
        splits: tuple[Split, ...] = ("train", "dev")
        for split in splits:
            place = self._place(split)
            if not is_local(place):
                load_hub_split(place, split)
        load_pair_tokenizer(self.tokenizer)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the splits that a stage needs, once.

        Args:
            stage: ``"fit"`` needs both splits; ``"validate"``, ``"test"`` and ``"predict"`` need dev; None means both.
        """
        if stage in ("fit", None) and self._train is None:
            examples = read_squad(self._place("train"), "train", self.on_bad_answer)
            self._train = self._windows("train", subset(examples, self.max_train_questions, self.seed))
        if self._dev is None:
            examples = read_squad(self._place("dev"), "dev", self.on_bad_answer)
            self._dev = self._windows("dev", examples[: self.max_dev_questions])

    def _windows(self, split: str, examples: list[SquadExample]) -> SquadWindows:
        tokenizer = load_pair_tokenizer(self.tokenizer)
        self._vocab_size, self._pad = tokenizer.vocab_size, tokenizer.pad
        windows = build_windows(
            examples,
            tokenizer,
            max_length=self.max_length,
            doc_stride=self.doc_stride,
            max_question_length=self.max_question_length,
        )
        rank_zero_info(
            f"SQuAD {split}: {windows.questions:,} questions, {len(windows):,} windows of {self.max_length} tokens "
            f"({int((windows.start_positions > 0).sum()):,} hold the answer), "
            f"{windows.truncated_questions:,} questions cut to {self.max_question_length} tokens"
        )
        return windows

    @property
    def train_windows(self) -> SquadWindows:
        """Training windows, after ``setup("fit")``."""
        return self._ready(self._train, "train_windows")

    @property
    def dev_windows(self) -> SquadWindows:
        """Evaluation windows, after `setup`."""
        return self._ready(self._dev, "dev_windows")

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary, after `setup`."""
        return self._ready(self._vocab_size, "vocab_size")

    @property
    def pad(self) -> int:
        """Id of ``[PAD]``, after `setup`."""
        return self._ready(self._pad, "pad")

    def train_dataloader(self) -> ResumableDataLoader:
        """Shuffled training windows of this rank; the order is a function of ``(seed, epoch)``."""
        dataset = WindowDataset(self.train_windows, positions=True)
        sampler = EpochSampler(dataset, **self._ranks, shuffle=True, seed=self.seed)
        return ResumableDataLoader(dataset, batch_size=self.batch_size, sampler=sampler, **self._loader_options())

    def val_dataloader(self) -> DataLoader[Batch]:
        """Evaluation windows in order."""
        dataset = WindowDataset(self.dev_windows, positions=False)
        return DataLoader(dataset, batch_size=self.eval_batch_size, **self._loader_options())

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Evaluation windows in order; over several ranks the first few occur twice."""
        return self._equal_parts(WindowDataset(self.dev_windows, positions=False), self.eval_batch_size)
