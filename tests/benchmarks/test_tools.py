"""What stands beside the suites: square tiles, and the profile of a step."""

import pytest
import torch
from torch import nn

from benchmarks import profile
from benchmarks.suites.tiling import joined, square_tiles
from benchmarks.variants import slope_linear


@pytest.mark.parametrize(("d_in", "d_out", "count"), [(16, 64, 4), (16, 72, 5)])
def test_square_tiles_give_what_the_whole_layer_gives(d_in, d_out, count):
    dense = nn.Linear(d_in, d_out, dtype=torch.float64)
    tiles = square_tiles(dense, "reference")
    assert len(tiles) == count
    assert all(tile.out_features <= d_in for tile in tiles)
    x = torch.randn(5, d_in, dtype=torch.float64)
    torch.testing.assert_close(joined(tiles, x), slope_linear(dense, "reference")(x))


def test_a_profile_ranks_kernels_of_both_sides(capsys):
    profile.main(["tiny-gpt2-small", "--quick", "--device", "cpu", "--compiler", "none", "--rows", "3"])
    text = capsys.readouterr().out
    assert text.count("ms in all") == 2
    times = [float(line.split()[0]) for line in text.splitlines() if " ms " in line and "in all" not in line]
    assert len(times) == 6
    assert times[:3] == sorted(times[:3], reverse=True)


def test_a_profile_of_an_unknown_model_names_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        profile.main(["bert-lage"])
    assert "unknown model 'bert-lage'; there are gpt2-small, bert-large" in capsys.readouterr().err
