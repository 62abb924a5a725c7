"""Every suite runs on the CPU with tiny shapes, and what fails on the way becomes a row."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import run
from benchmarks.options import Options
from benchmarks.recorder import Point
from benchmarks.rows import Row, read
from benchmarks.session import Session
from benchmarks.suites import SUITES
from benchmarks.timing import Stats
from benchmarks.variants import TRANSFORMS

QUICK = ["--quick", "--device", "cpu", "--compiler", "none"]


def measured(tmp_path: Path, *arguments: str) -> list[Row]:
    file = tmp_path / "rows.csv"
    assert run.main([*arguments, *QUICK, "--out", str(file)]) == 0
    return read([file])


@pytest.mark.parametrize("suite", SUITES)
def test_each_suite_measures_dense_and_slope_or_says_why_not(suite: str, tmp_path: Path) -> None:
    rows = measured(tmp_path, suite)
    assert {row.suite for row in rows} == {suite}
    numbers = {row.variant for row in rows if row.median is not None}
    assert "slope" in numbers
    assert suite == "refresh" or "dense" in numbers
    for row in rows:
        assert row.case.startswith("tiny")
        assert (row.median is None) == (row.note.startswith(("failed: ", "skipped: ")))
        assert row.gpu.startswith("CPU")
        assert row.torch == torch.__version__
        if row.median is not None:
            assert row.p10 is not None
            assert row.p90 is not None
            assert 0 < row.p10 <= row.median <= row.p90


def test_both_precisions_train(tmp_path: Path) -> None:
    rows = measured(tmp_path, "steps", "--only", "tiny-llama*", "--precision", "bf16-true", "bf16-mixed")
    steps = {(row.precision, row.variant) for row in rows if row.measure == "step" and row.median}
    assert steps == {(p, v) for p in ("bf16-true", "bf16-mixed") for v in ("dense", "slope")}


def test_a_step_with_its_share_of_the_resetup_is_longer_than_the_step(tmp_path: Path) -> None:
    rows = {(r.measure, r.variant): r.median or 0.0 for r in measured(tmp_path, "steps", "--only", "tiny-gpt2*")}
    added = rows["step+resetup", "slope"] - rows["step", "slope"]
    assert added == pytest.approx(rows["resetup", "slope"] / 100, rel=1e-2)


def test_peers_that_are_not_there_are_rows_and_the_others_are_measured(tmp_path: Path) -> None:
    rows = measured(tmp_path, "peers", "--only", "tiny-gpt2*")
    torchao = [row for row in rows if row.variant.startswith("torchao")]
    assert {row.variant for row in torchao} == {"torchao_semisparse_eager", "torchao_semisparse_compiled"}
    assert all(row.note.startswith("failed: ") for row in torchao)
    assert {row.variant for row in rows if row.median is not None} == {"dense", "slope", "dense_eager"}


def test_memory_counts_the_state_of_a_training_step(tmp_path: Path) -> None:
    rows = {(r.measure, r.variant, r.precision): r for r in measured(tmp_path, "memory")}
    dense = rows["training, fp32 Adam", "dense", "bf16-true"]
    slope = rows["training, fp32 Adam", "slope", "bf16-true"]
    assert dense.median == 16 + 16 + 64
    assert slope.median is not None
    assert slope.median >= 8 + 8 + 32 + 1 + 1  # values, gradient, moments, both index arrays; operands on top
    assert slope.ratio == pytest.approx(slope.median / dense.median, rel=1e-4)
    assert rows["training, fp32 Adam", "dense", "bf16-mixed"].median == 128
    assert rows["checkpoint, inference", "slope", "bf16-true"].median == 9


def test_filters_leave_the_rest_out(tmp_path: Path) -> None:
    rows = measured(tmp_path, "layers", "prefill", "--only", "tiny", "--rows", "dgrad*", "--variants", "slope")
    assert {(row.suite, row.variant) for row in rows} == {("layers", "dense"), ("layers", "slope")}
    assert {row.measure for row in rows} == {"dgrad eager", "dgrad graph"}


def test_whole_graphs_compile(tmp_path: Path) -> None:
    arguments = ["blocks", "prefill", "--only", "tiny-gpt2*", "--variants", "slope", "--compiler", "aot_eager"]
    file = tmp_path / "rows.csv"
    assert run.main([*arguments, "--quick", "--device", "cpu", "--out", str(file)]) == 0
    assert {(r.suite, r.variant) for r in read([file]) if r.median} == {
        (suite, variant) for suite in ("blocks", "prefill") for variant in ("dense", "slope")
    }


def test_compile_only_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.csv"
    assert run.main(["all", "--only", "tiny-gpt2*", *QUICK, "--compile-only", "--jobs", "1", "--out", str(file)]) == 0
    assert not file.exists()
    assert "Inductor's cache" in capsys.readouterr().out


@pytest.fixture
def quick(tmp_path: Path) -> Session:
    return Session(Options(device="cpu", quick=True, compiler="none"), tmp_path / "rows.csv")


POINT = Point("layers", "tiny", 1, 1, 1, "bf16-true")


def test_a_candidate_that_fails_is_a_row_with_the_first_line_of_its_error(quick: Session) -> None:
    def crash(_: int) -> None:
        raise RuntimeError("\nno such kernel\nand a long story")

    stats = quick.compare(POINT, "forward", {"dense": lambda _: None, "peer": crash})
    assert [*stats] == ["dense"]
    assert [(row.variant, row.note) for row in quick.rows] == [
        ("peer", "failed: RuntimeError: no such kernel"),
        ("dense", ""),
    ]


def test_a_case_that_fails_does_not_stop_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module, backend: str) -> nn.Module:
        raise ValueError("out of luck")

    monkeypatch.setitem(TRANSFORMS, "slope", broken)
    rows = measured(tmp_path, "blocks")
    assert {(row.case, row.variant, row.median is None) for row in rows} == {
        (case, variant, variant == "slope")
        for case in ("tiny-gpt2-small", "tiny-llama-3-8b")
        for variant in ("dense", "slope")
    }


def test_a_case_that_fails_as_a_whole_is_a_row_and_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no data")

    monkeypatch.setattr("benchmarks.suites.prefill.data", broken)
    file = tmp_path / "rows.csv"
    assert run.main(["prefill", "host", *QUICK, "--out", str(file)]) == 1
    notes = {(row.suite, row.note) for row in read([file]) if row.median is None}
    assert ("prefill", "failed: ValueError: no data") in notes
    assert any(row.suite == "host" and row.median for row in read([file]))


@pytest.mark.parametrize(
    ("metric", "expected"), [("ms", 2.0), ("us", 2.0), ("bytes", 0.5), ("bits", 0.5)], ids=["ms", "us", "bytes", "bits"]
)
def test_a_ratio_says_how_much_faster_or_how_much_of_the_size(quick: Session, metric: str, expected: float) -> None:
    dense, own = Stats(4.0, 4.0, 4.0, 1), Stats(2.0, 2.0, 2.0, 1)
    quick.keep(POINT, "slope", "x", own, dense, metric=metric)
    assert quick.rows[0].ratio == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["layers"], "no CUDA GPU here"),
        (["layers", "--only", "nosuch", *QUICK], "matches no case"),
        (["host", "--compile-only", *QUICK], "nothing to compile"),
    ],
    ids=["no GPU", "no case", "nothing compiled"],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=words):
        run.main(arguments)


def test_slope_is_measured_with_every_layer_sparse_or_not_at_all(quick: Session) -> None:
    make: Callable[[nn.Module, str], nn.Module] = TRANSFORMS["slope"]
    with pytest.raises(RuntimeError, match="1 of 2 linear layers"):
        make(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 7)), "reference")
