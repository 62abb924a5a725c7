"""What can happen to a checkpoint: mutations of a tiny sparse run's file, each a function of a seed."""

import copy
import io
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Checkpoint = dict[str, Any]


@dataclass(frozen=True)
class Mutation:
    """One kind of change.

    Attributes:
        name: what happens.
        content: changes the loaded checkpoint in place; returns it, or what is in the file instead.
        raw: changes the bytes of the file, after that.
        harmless: the result is a checkpoint again, which has to load to exactly what it says; None: it may be one.
    """

    name: str
    content: Callable[[Checkpoint, random.Random], Any] | None = None
    raw: Callable[[bytes, random.Random], bytes] | None = None
    harmless: bool | None = False

    def write(self, original: Checkpoint, path: Path, seed: int) -> Any:
        """Write the mutated file; returns what was saved into it, before its bytes were changed."""
        dice, checkpoint = random.Random(f"{self.name} {seed}"), copy.deepcopy(original)
        if self.content is not None:
            changed = self.content(checkpoint, dice)
            checkpoint = checkpoint if changed is None else changed
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        data = buffer.getvalue()
        path.write_bytes(data if self.raw is None else self.raw(data, dice))
        return checkpoint


def pick(checkpoint: Checkpoint, dice: random.Random, *endings: str) -> str:
    """The name of a tensor that ends in one of these."""
    return dice.choice([name for name in checkpoint["state_dict"] if name.endswith(endings)])


def replaced(
    change: Callable[[Tensor, random.Random], Any], *endings: str
) -> Callable[[Checkpoint, random.Random], None]:
    """One tensor of the state dict, replaced by another."""

    def mutate(checkpoint: Checkpoint, dice: random.Random) -> None:
        name = pick(checkpoint, dice, *endings)
        checkpoint["state_dict"][name] = change(checkpoint["state_dict"][name], dice)

    return mutate


def put(*path: str | int, value: Any) -> Callable[[Checkpoint, random.Random], None]:
    """Another value at a place in the checkpoint."""

    def mutate(checkpoint: Checkpoint, dice: random.Random) -> None:
        place: Any = checkpoint
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return mutate


def removed(*path: str | int) -> Callable[[Checkpoint, random.Random], None]:
    """Something missing."""

    def mutate(checkpoint: Checkpoint, dice: random.Random) -> None:
        place: Any = checkpoint
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return mutate


def flipped(data: bytes, dice: random.Random) -> bytes:
    """One bit, anywhere in the file's tensors or text."""
    place = dice.randrange(len(data) // 10, len(data) * 8 // 10)
    return data[:place] + bytes([data[place] ^ (1 << dice.randrange(8))]) + data[place + 1 :]


def flipped_in_data(data: bytes, dice: random.Random) -> bytes:
    """One bit of the largest tensor."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        content = archive.read(largest)
    place = data.index(content) + dice.randrange(len(content))
    return data[:place] + bytes([data[place] ^ (1 << dice.randrange(8))]) + data[place + 1 :]


def overwritten(data: bytes, dice: random.Random) -> bytes:
    """A block of zeros, as a disk leaves it."""
    start = dice.randrange(len(data) // 10, len(data) // 2)
    return data[:start] + bytes(512) + data[start + 512 :]


def dropped(checkpoint: Checkpoint, dice: random.Random) -> None:
    del checkpoint["state_dict"][pick(checkpoint, dice, "")]


def renamed(checkpoint: Checkpoint, dice: random.Random) -> None:
    name = pick(checkpoint, dice, "")
    checkpoint["state_dict"][name.replace("net.", "model.")] = checkpoint["state_dict"].pop(name)


def added(checkpoint: Checkpoint, dice: random.Random) -> None:
    name = pick(checkpoint, dice, ".values")
    checkpoint["state_dict"][name.replace("values", dice.choice(["weight", "mask", "values2"]))] = torch.zeros(3)


def swapped(ending: str) -> Callable[[Checkpoint, random.Random], None]:
    """Two layers' tensors of different shapes."""

    def mutate(checkpoint: Checkpoint, dice: random.Random) -> None:
        state = checkpoint["state_dict"]
        first = pick(checkpoint, dice, ending)
        others = [name for name in state if name.endswith(ending) and state[name].shape != state[first].shape]
        second = dice.choice(others)
        state[first], state[second] = state[second], state[first]

    return mutate


def nibble(value: int) -> Callable[[Tensor, random.Random], Tensor]:
    """One group's two positions."""

    def change(tensor: Tensor, dice: random.Random) -> Tensor:
        tensor = tensor.clone()
        place = dice.randrange(tensor.numel())
        tensor.view(-1)[place] = (int(tensor.view(-1)[place]) & 0xF0) | value
        return tensor

    return change


def other_columns(tensor: Tensor, dice: random.Random) -> Tensor:
    """A choice of columns that nobody made, but a valid one."""
    return torch.full_like(tensor, dice.choice([0x44, 0x88, 0xEE]))


def with_nan(tensor: Tensor, dice: random.Random) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[dice.randrange(tensor.numel())] = float("nan")
    return tensor


def moment(change: Callable[[Tensor], Any]) -> Callable[[Checkpoint, random.Random], None]:
    """A moment of Adam's."""

    def mutate(checkpoint: Checkpoint, dice: random.Random) -> None:
        states = checkpoint["optimizer_states"][0]["state"]
        matrix = dice.choice([key for key, state in states.items() if state["exp_avg"].dim() == 2])
        states[matrix]["exp_avg"] = change(states[matrix]["exp_avg"])

    return mutate


CALLBACK = ("callbacks", "SLoPeCallback")
FILES = [
    Mutation("cut off", raw=lambda data, dice: data[: dice.randrange(1, len(data) - 1)]),
    Mutation("a bit flipped", raw=flipped, harmless=None),  # between the records of the archive nobody looks at it
    Mutation("a bit of a weight flipped", raw=flipped_in_data),
    Mutation("a block of zeros", raw=overwritten),
    Mutation("empty", raw=lambda data, dice: b""),
    Mutation("text", raw=lambda data, dice: b"epoch,loss\n0,1.5\n" * dice.randrange(1, 9)),
    Mutation("random bytes", raw=lambda data, dice: dice.randbytes(2048)),
    Mutation("its first half twice", raw=lambda data, dice: data[: len(data) // 2] * 2),
]
CONTENTS = [
    Mutation("a list", lambda c, dice: [1, 2, 3]),
    Mutation("nothing but weights", lambda c, dice: c["state_dict"]),
    Mutation("without version", removed("pytorch-lightning_version")),
    Mutation("without state dict", removed("state_dict")),
    Mutation("a state dict of a list", put("state_dict", value=[1])),
    Mutation("without optimizer", removed("optimizer_states")),
    Mutation("without loops", removed("loops")),
    Mutation("no schedulers", removed("lr_schedulers")),
    Mutation("two optimizers", lambda c, dice: c["optimizer_states"].append(c["optimizer_states"][0])),
    Mutation("a moment of another shape", moment(lambda t: t[:, : t.shape[1] // 2].clone())),
    Mutation("a moment transposed", moment(lambda t: torch.zeros(t.shape[1] + 8, t.shape[0]))),
]
TENSORS = [
    Mutation("a tensor is missing", dropped),
    Mutation("a tensor is called otherwise", renamed),
    Mutation("a tensor too many", added),
    Mutation("values swapped", swapped(".values")),
    Mutation("indices swapped", swapped(".indices")),
    Mutation("columns swapped", swapped("backward_indices")),
    Mutation("adapters swapped", swapped("adapter_up")),
    Mutation("values of half the width", replaced(lambda t, dice: t[:, ::2].clone(), ".values")),
    Mutation("a weight of half the height", replaced(lambda t, dice: t[::2].clone(), "first.weight", "head.weight")),
    Mutation("values flattened", replaced(lambda t, dice: t.flatten(), ".values")),
    Mutation("values of integers", replaced(lambda t, dice: t.to(torch.int32), ".values")),
    Mutation("a bias of booleans", replaced(lambda t, dice: t > 0, "blocks.1.bias", "blocks.0.bias")),
    Mutation("values of a list", replaced(lambda t, dice: t.tolist(), ".values")),
    Mutation("indices of int64", replaced(lambda t, dice: t.long(), "indices")),
    Mutation("indices of int8", replaced(lambda t, dice: t.view(torch.int8), "indices")),
    Mutation("indices of floats", replaced(lambda t, dice: t.float(), "indices")),
    Mutation("equal positions", replaced(nibble(0b0101), "indices")),
    Mutation("equal positions of zero", replaced(nibble(0), "indices")),
    Mutation("unsorted positions", replaced(nibble(0b0001), "indices")),
    Mutation("indices of noise", replaced(lambda t, d: torch.randint(0, 4, t.shape, dtype=torch.uint8), "indices")),
    Mutation("a mask of bool", replaced(lambda t, dice: torch.ones(t.shape[0], t.shape[1] * 8).bool(), ".indices")),
    Mutation("a phase of 7", replaced(lambda t, dice: torch.tensor(7, dtype=torch.uint8), "adapter_active")),
    Mutation("a phase of float", replaced(lambda t, dice: t.float(), "adapter_active")),
    Mutation("a phase of four", replaced(lambda t, dice: torch.ones(4, dtype=torch.uint8), "adapter_active")),
    Mutation("one layer asleep", replaced(lambda t, dice: torch.zeros_like(t), "adapter_active")),
    Mutation("an adapter of another rank", replaced(lambda t, dice: t[:2].clone(), "adapter_down")),
]
MARKS = [
    Mutation("a newer format", put("slope_pl", "format", value=99)),
    Mutation("a format of text", put("slope_pl", "format", value="1")),
    Mutation("format 0", put("slope_pl", "format", value=0)),
    Mutation("no format", removed("slope_pl", "format")),
    Mutation("a mark of text", put("slope_pl", value="sparse")),
    Mutation("no config", removed("slope_pl", "config")),
    Mutation("a config of text", put("slope_pl", "config", value="magnitude")),
    Mutation("another mask", put("slope_pl", "config", "mask", value="random")),
    Mutation("another rank", put("slope_pl", "config", "adapter_rank", value=8)),
    Mutation("other layers", put("slope_pl", "layers", value=["net.blocks.7"])),
    Mutation("random state of text", put("slope_pl", "rng", value="seed 0")),
    Mutation("random state cut off", put("slope_pl", "rng", value=[{"cpu": torch.zeros(3, dtype=torch.uint8)}])),
    Mutation("random state of floats", put("slope_pl", "rng", value=[{"cpu": torch.zeros(5056)}])),
    Mutation("no counters", put(*CALLBACK, value={})),
    Mutation("counters of text", put(*CALLBACK, "resetups", value="3")),
    Mutation("counters below 0", put(*CALLBACK, "last_resetup_step", value=-5)),
    Mutation("a wake that was not", put(*CALLBACK, "woke_at_step", value="yes")),
]
HARMLESS = [
    Mutation("untouched", harmless=True),
    Mutation("columns chosen otherwise", replaced(other_columns, "backward_indices"), harmless=True),
    Mutation("another valid mask", replaced(other_columns, ".indices"), harmless=True),
    Mutation("values of float64", replaced(lambda t, dice: t.double(), ".values"), harmless=True),
    Mutation("NaN in the values", replaced(with_nan, ".values"), harmless=True),
    Mutation("a tensor that is a view", replaced(lambda t, d: t.t().contiguous().t(), ".values"), harmless=True),
    Mutation("a note of somebody's", put("note", value="hello"), harmless=True),
    Mutation("no random state", removed("slope_pl", "rng"), harmless=True),
    Mutation("a learning rate of its own", put("optimizer_states", 0, "param_groups", 0, "lr", value=0.5), harmless=True),
    Mutation("without the callback's mark", removed("slope_pl"), harmless=True),
    Mutation("the order of the tensors", lambda c, dice: put("state_dict", value=shuffled(c, dice))(c, dice), harmless=True),
]  # fmt: skip


def shuffled(checkpoint: Checkpoint, dice: random.Random) -> dict[str, Tensor]:
    names = list(checkpoint["state_dict"])
    dice.shuffle(names)
    return {name: checkpoint["state_dict"][name] for name in names}


MUTATIONS = [*FILES, *CONTENTS, *TENSORS, *MARKS, *HARMLESS]
