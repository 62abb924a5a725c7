"""SQuAD v1.1 for `lightning.pytorch.Trainer`: windows, batches, and an order that survives being stopped.

The training order is a function of ``(seed, epoch)``. `ResumableDataLoader` has the ``state_dict`` that Lightning's fit
loop saves with every checkpoint, so that a run stopped in the middle of an epoch goes on with the batches it had left.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from slope_pl.data.squad import Split, SquadExample, find_squad_file, is_local, load_hub_split, read_squad
from slope_pl.data.squad_windows import SquadWindows, build_windows, check_lengths
from slope_pl.data.tokenizer import load_wordpiece

Batch = dict[str, Tensor]


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


def _as_is(batch: Batch) -> Batch:
    return batch


class EpochSampler(DistributedSampler[int]):
    """Shuffled indices of one rank, a function of ``(seed, epoch)`` and the number of ranks.

    Unlike its base class, which seeds with ``seed + epoch``, seed 0's second epoch is not seed 1's first. Ranks get the
    same number of indices; the first few are repeated where needed. Lightning leaves a `DistributedSampler` as it is
    and calls ``set_epoch``.
    """

    def __iter__(self) -> Iterator[int]:
        state = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]) >> 1)
        order = torch.randperm(len(self.dataset), generator=generator).numpy()  # type: ignore[arg-type]
        return iter(np.resize(order, self.total_size)[self.rank :: self.num_replicas].tolist())


class ResumableDataLoader(DataLoader[Batch]):
    """A data loader that can be saved after any batch and goes on with the next one.

    The state is the epoch of the sampler and the number of batches handed out (not those that workers have prepared).
    After `load_state_dict` the next pass over that epoch leaves out as many batches; other epochs are complete. The
    batches left out are made and thrown away, which takes well under a millisecond each here. ``len()`` is always that
    of the whole epoch, as Lightning expects.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Of its own: otherwise each pass draws the workers' seed from the numbers that dropout goes on with.
        kwargs.setdefault("generator", torch.Generator())
        super().__init__(*args, **kwargs)
        self._epoch = self._batches = 0
        self._resume: dict[str, int] | None = None

    def _layout(self) -> dict[str, int]:
        """What must not change for a position within an epoch to mean the same batches."""
        sampler = self.sampler
        names = {"seed": "seed", "num_replicas": "ranks"}
        found = {name: int(getattr(sampler, key)) for key, name in names.items() if hasattr(sampler, key)}
        return {"windows": len(self.dataset), "batch_size": self.batch_size or 0, **found}  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, int]:
        """Return the position: epoch, batches handed out, and the layout they belong to."""
        return self._resume or {"epoch": self._epoch, "batches": self._batches, **self._layout()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a position, the next time its epoch is iterated."""
        self._resume = dict(state_dict)

    def _skip(self, epoch: int) -> int:
        """How many batches of this epoch were handed out before the checkpoint.

        Raises:
            ValueError: The data, the seed, the batch size or the number of ranks changed in the middle of an epoch.
        """
        state, self._resume = self._resume, None
        if state is None or state["epoch"] != epoch or state["batches"] == 0:
            return 0
        changed = [
            f"{key} was {state[key]} and is {value}"
            for key, value in self._layout().items()
            if state.get(key, value) != value
        ]
        if changed:
            raise ValueError(
                f"the checkpoint lies in the middle of epoch {epoch}, after batch {state['batches']}, but "
                f"{', '.join(changed)}. Resume with the old values, or from a checkpoint at the end of an epoch."
            )
        return state["batches"]

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator on purpose: Lightning calls iter() before it tells the sampler the epoch, and sometimes again
        # after. Nothing below runs until the first batch is asked for, by which time the epoch is known.
        epoch = int(getattr(self.sampler, "epoch", 0))
        skip = self._skip(epoch)
        self._epoch, self._batches = epoch, skip
        for i, batch in enumerate(super().__iter__()):
            if i >= skip:
                self._batches = i + 1
                yield batch


class SquadDataModule(pl.LightningDataModule):
    """SQuAD v1.1 as windows of tokens.

    Batches are dictionaries of int64 tensors: ``input_ids``, ``attention_mask``, ``token_type_ids`` of shape
    ``(batch, max_length)`` and ``window_index`` ``(batch,)``; training batches also have ``start_positions`` and
    ``end_positions`` ``(batch,)``. Every window is padded to ``max_length``, so all full batches have one shape.

    Args:
        source: Where the data is: a hub data set id, or a folder with train*.json and dev*.json.
        tokenizer: A vocab.txt, a folder with tokenizer.json or vocab.txt, or a hub model id.
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
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}, expected an integer")
            if value < least.get(name, 1):
                hint = "; leave it out (null) for all questions" if name.endswith("_questions") else ""
                raise ValueError(f"{name} is {value}, expected {least.get(name, 1)} or more{hint}")
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
        load_wordpiece(self.tokenizer)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the splits that a stage needs, once.

        Args:
            stage: ``"fit"`` needs both splits; ``"validate"``, ``"test"`` and ``"predict"`` need dev; None means both.
        """
        if stage in ("fit", None) and self._train is None:
            examples = read_squad(self._place("train"), "train", self.on_bad_answer)
            self._train = self._windows("train", _subset(examples, self.max_train_questions, self.seed))
        if self._dev is None:
            examples = read_squad(self._place("dev"), "dev", self.on_bad_answer)
            self._dev = self._windows("dev", examples[: self.max_dev_questions])

    def _windows(self, split: str, examples: list[SquadExample]) -> SquadWindows:
        tokenizer = load_wordpiece(self.tokenizer)
        self._vocab_size, self._pad = tokenizer.get_vocab_size(), tokenizer.token_to_id("[PAD]")
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

    def _ready(self, value: Any, name: str) -> Any:
        if value is None:
            raise RuntimeError(f"{name} is not there yet: call prepare_data() and setup() first")
        return value

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

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "collate_fn": _as_is,
            "pin_memory": torch.cuda.is_available(),
            # Otherwise each pass draws a seed from the global generator, and a resumed run, which makes one pass more,
            # would see other dropout masks.
            "generator": torch.Generator(),
        }

    def train_dataloader(self) -> ResumableDataLoader:
        """Shuffled training windows of this rank; the order is a function of ``(seed, epoch)``."""
        dataset = WindowDataset(self.train_windows, positions=True)
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {"num_replicas": 1, "rank": 0}
        sampler = EpochSampler(dataset, **ranks, shuffle=True, seed=self.seed)
        return ResumableDataLoader(dataset, batch_size=self.batch_size, sampler=sampler, **self._loader_options())

    def val_dataloader(self) -> DataLoader[Batch]:
        """Evaluation windows in order."""
        dataset = WindowDataset(self.dev_windows, positions=False)
        return DataLoader(dataset, batch_size=self.eval_batch_size, **self._loader_options())

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Evaluation windows in order, the same as for validation."""
        return self.val_dataloader()


def _subset(examples: list[SquadExample], most: int | None, seed: int) -> list[SquadExample]:
    if most is None or most >= len(examples):
        return examples
    chosen = np.random.default_rng(seed).permutation(len(examples))[:most]
    return [examples[i] for i in np.sort(chosen)]
