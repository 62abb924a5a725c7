"""A position in the data, taken over by another number of ranks."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from slope_pl.data.glue_datamodule import BucketSampler
from slope_pl.data.loading import EpochSampler, ResumableDataLoader

LENGTH = 96


class Numbers(Dataset):
    def __init__(self):
        self.rows = SimpleNamespace(lengths=torch.arange(LENGTH).remainder(7).numpy())

    def __len__(self):
        return LENGTH

    def __getitem__(self, i):
        return i


def loader(kind, ranks, rank, batch_size):
    data = Numbers()
    options = {"num_replicas": ranks, "rank": rank, "seed": 3}
    sampler = EpochSampler(data, **options) if kind == "plain" else BucketSampler(data, batch_size, **options)
    return ResumableDataLoader(data, batch_size=batch_size, sampler=sampler)


def batches(loaders):
    """The items of each step, of all ranks together."""
    return [sorted(torch.cat(step).tolist()) for step in zip(*loaders, strict=True)]


@pytest.mark.parametrize("kind", ["plain", "buckets"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 1), (2, 3)])
def test_other_ranks_go_on_with_the_same_items(kind, before, after):
    whole = batches([loader(kind, 1, 0, 12)])
    first = [loader(kind, before, rank, 12 // before) for rank in range(before)]
    iterators = [iter(one) for one in first]
    seen = [sorted(torch.cat([next(it) for it in iterators]).tolist()) for _ in range(3)]
    assert seen == whole[:3]
    second = [loader(kind, after, rank, 12 // after) for rank in range(after)]
    for one in second:
        one.load_state_dict(first[0].state_dict())
    assert batches(second) == whole[3:]


@pytest.mark.parametrize(("ranks", "batch_size"), [(2, 12), (1, 6)])
def test_another_batch_of_all_ranks_is_refused(ranks, batch_size):
    one = loader("plain", 1, 0, 12)
    next(iter(one))
    other = loader("plain", ranks, 0, batch_size)
    other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="in the middle of epoch 0, after batch 1"):
        next(iter(other))
