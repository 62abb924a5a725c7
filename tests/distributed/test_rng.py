"""Every rank gets its own random state back, not rank 0's."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from slope_pl.lightning import rng

CPU = torch.device("cpu")


def draw_restore_draw(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(100 + rank)
    states = rng.collect(CPU)
    first = torch.rand(4)
    assert rng.restore(states, rank, 2, CPU) is None
    torch.save({"first": first, "again": torch.rand(4)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_each_rank_goes_on_with_its_own_numbers(tmp_path):
    mp.spawn(draw_restore_draw, (str(tmp_path),), nprocs=2)
    drawn = [torch.load(Path(tmp_path) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for one in drawn:
        assert torch.equal(one["first"], one["again"])
    assert not torch.equal(drawn[0]["first"], drawn[1]["first"])


def test_another_number_of_ranks_or_kind_of_device_is_said_and_changes_nothing():
    states = rng.collect(CPU)
    before = torch.get_rng_state()
    assert "of 1 ranks, this run has 2" in rng.restore(states, 0, 2, CPU)
    assert "another kind of device" in rng.restore(states, 0, 1, torch.device("cuda"))
    assert torch.equal(torch.get_rng_state(), before)
