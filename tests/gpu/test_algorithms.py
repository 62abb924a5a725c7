"""The search on the GPU: what it finds is right, wrong and foreign ids are refused, the file is used."""

import json
import logging

import pytest
import torch

from slope_pl.ops import algorithm_cache as cache
from slope_pl.ops import algorithms
from slope_pl.ops.algorithm_cache import Algorithm, Order
from slope_pl.ops.cusparselt import order_of
from tests.gpu.compiled_cases import make, require_extension

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache, in a folder of its own."""
    from slope_pl.ops import cusparselt

    require_extension()
    monkeypatch.setenv("SLOPE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "_loaded", None)
    monkeypatch.setattr(algorithms, "_VERIFIED", {})
    monkeypatch.setattr(cusparselt, "_LAUNCHES", {})


def problem(n=256, d_in=128, d_out=192):
    layer = make(d_in, d_out)
    order = order_of(d_out, d_in, layer.values.device)
    x = torch.randn(n, d_in, device="cuda", dtype=torch.bfloat16)
    layer(x.requires_grad_()).sum().backward()
    operand = layer._operands._pairs[torch.bfloat16, "cusparselt"].forward
    return algorithms.Problem(x.detach(), operand, layer.indices, None, order)


def test_what_is_found_is_written_and_read_again(monkeypatch, tmp_path):
    layer = make(128, 192)
    x = torch.randn(256, 128, device="cuda", dtype=torch.bfloat16)
    layer(x)
    entries = json.loads((tmp_path / "algorithms.json").read_text())["entries"]
    assert len(entries) == 1
    name = next(iter(entries))
    assert torch.cuda.get_device_name() in name
    assert "bfloat16 256x128->192 bias" in name
    monkeypatch.setattr(cache, "_loaded", None)
    monkeypatch.setattr(algorithms, "_VERIFIED", {})
    monkeypatch.setattr(algorithms, "_searched", lambda *_: pytest.fail("searched although it is in the file"))
    from slope_pl.ops import cusparselt

    cusparselt._LAUNCHES.clear()
    layer(x)
    assert list(algorithms._VERIFIED.values()) == [Algorithm(*entries[name])]


def test_every_algorithm_of_this_library_is_right_or_refused():
    case = problem()
    count = torch.ops.slope_cuda.max_algorithm(case.x, 192)
    for order in (case.order, Order.DIRECT):
        case = problem(256, *((128, 192) if order is case.order else (1552, 2048)))
        reasons = {a: algorithms.refusal(case.run, a, case) for a in algorithms.candidates(count, order)}
        assert any(reason is None for reason in reasons.values())
        assert not [reason for reason in reasons.values() if reason and not reason.startswith("cannot run")], reasons


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("one entry", lambda y: y.index_put((torch.tensor(200).cuda(), torch.tensor(100).cuda()), y.max() * 3)),
        ("a tile", lambda y: torch.cat((y[:-8], y[:-8][:8] * 2))),
        ("everything", lambda y: y * 1.05),
        ("NaN", lambda y: y / 0 * 0),
    ],
)
def test_an_algorithm_with_wrong_results_is_refused(name, spoil):
    case = problem()
    wrong, right = Algorithm(3), algorithms.candidates(1, case.order)[0]

    def run(algorithm):
        (y,) = case.run(right)
        return (spoil(y) if algorithm == wrong else y,)

    reason = algorithms.refusal(run, wrong, case)
    assert reason is not None
    assert "wrong" in reason or "bits" in reason
    assert algorithms.refusal(run, Algorithm(4), case) is None


def test_an_algorithm_that_does_not_repeat_itself_is_refused():
    case, calls = problem(), []
    right = algorithms.candidates(1, case.order)[0]

    def run(algorithm):
        calls.append(1)
        return (case.run(right)[0] * (1 + 2**-7 * len(calls)),)

    assert algorithms.refusal(run, Algorithm(0), case) == "gives other bits each time"


@pytest.mark.parametrize("id_", [999, -7])
def test_a_wrong_id_in_the_file_is_refused_and_replaced(id_, caplog, tmp_path):
    layer = make(128, 192)
    x = torch.randn(256, 128, device="cuda", dtype=torch.bfloat16)
    name = cache.key(x.device, x.dtype, 256, 192, 128, True, order_of(192, 128, x.device))
    cache.store(name, Algorithm(id_, 1, 0) if id_ > 0 else Algorithm(0, 64, 2))
    with caplog.at_level(logging.WARNING):
        layer(x)
    assert "searching again" in caplog.text
    assert json.loads((tmp_path / "algorithms.json").read_text())["entries"][name][0] != 999


def test_the_search_leaves_the_users_random_numbers_alone():
    layer = make(128, 192)
    x = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.get_rng_state()
    layer(x)
    assert torch.equal(torch.cuda.get_rng_state(), before)
