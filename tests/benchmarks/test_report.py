"""Clocks, tables, verdicts and the page they are written into."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import environment, report, rows, tables, targets, timing, training, warm
from benchmarks.options import Options
from benchmarks.rows import Row
from benchmarks.shapes import BLOCKS, LINEARS, TARGET_BLOCKS

ROW = Row(
    time="2026-01-01T00:00:00+00:00", suite="steps", case="gpt2-small", d_in=768, d_out=3072, tokens=32768,
    precision="bf16-true", variant="slope", measure="step+resetup", metric="ms", median=5.0, p10=4.9, p90=5.1, n=10,
    ratio=1.11, gpu="Made Up 1", driver="1", torch="1", cuda="1", cusparselt="1", slope_pl="1", commit="abc", seed=0,
    note="",
)  # fmt: skip


def test_rows_come_back_from_the_file_as_they_went(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.csv"
    failed = replace(ROW, median=None, p10=None, p90=None, n=0, ratio=None, note='failed: a "quoted", long | story')
    for row in (ROW, failed):
        rows.append(file, row)
    assert rows.read([file]) == [ROW, failed]


def test_a_file_with_other_columns_is_not_appended_to(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="write to another file"):
        rows.append(file, ROW)


def test_the_newest_row_counts_and_so_does_a_newer_failure() -> None:
    newer = replace(ROW, time="2026-01-02T00:00:00+00:00", median=None, note="failed: x")
    other = replace(ROW, gpu="Made Up 2")
    assert rows.latest([newer, ROW, other]) == [newer, other] or rows.latest([newer, ROW, other]) == [other, newer]


def test_percentiles() -> None:
    stats = timing.summarise([float(i) for i in range(1, 12)])
    assert (stats.median, stats.p10, stats.p90, stats.n) == (6, 2, 10, 11)
    assert timing.summarise([3.0]) == timing.Stats(3, 3, 3, 1)


def test_candidates_take_turns() -> None:
    calls: list[str] = []
    runs = {"a": lambda _: calls.append("a"), "b": lambda _: calls.append("b")}
    stats = timing.interleave(runs, torch.device("cpu"), seconds=0, least=3, most=3)
    assert {name: value.n for name, value in stats.items()} == {"a": 3, "b": 3}
    order = [name for name, before in zip(calls, ["", *calls], strict=False) if name != before]
    assert order[-6:] == ["a", "b"] * 3


def test_the_commit_of_a_copy_without_history_is_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOPE_COMMIT", "1234567")
    assert environment.commit() == "1234567"


@pytest.mark.parametrize(
    ("ratio", "words"), [(1.13, "met, aim too"), (1.11, "met"), (1.045, "missed by 5 %")], ids=["aim", "met", "missed"]
)
def test_a_verdict_says_by_how_much(ratio: float, words: str) -> None:
    target = next(t for t in targets.TARGETS if t.case == "gpt2-small" and t.suite == "steps")
    assert targets.verdict(target, [replace(ROW, ratio=ratio)]).words == words


def test_the_worst_case_is_judged_and_tiny_ones_are_not() -> None:
    target = next(t for t in targets.TARGETS if t.against and "dgrad, every shape" in t.title)
    own = replace(ROW, suite="layers", measure="dgrad graph", case="x", median=1.0)
    peer = replace(own, variant="torch_sparse_best", median=2.0)
    worse = replace(own, case="y", median=3.0), replace(peer, case="y", median=2.0)
    tiny = replace(own, case="tiny", median=9.0), replace(peer, case="tiny", median=1.0)
    found = targets.verdict(target, [own, peer, *worse, *tiny])
    assert (found.value, found.case) == (1.5, "y")
    assert targets.verdict(target, [own, *tiny]).words == "not measured"


def test_targets_name_models_and_measures_that_exist() -> None:
    names = {shape.name for shape in BLOCKS}
    assert {t.case for t in targets.TARGETS if t.case} == set(TARGET_BLOCKS) <= names
    assert len({shape.name for shape in LINEARS}) == len(LINEARS)


def test_the_page_is_written_between_its_comments_and_names_failures(tmp_path: Path) -> None:
    file, page = tmp_path / "rows.csv", tmp_path / "README.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    dense = replace(ROW, variant="dense", median=5.55, ratio=1.0)
    failed = replace(ROW, suite="peers", variant="torchao", median=None, ratio=None, note="failed: a | b")
    for row in (ROW, dense, failed):
        rows.append(file, row)
    report.main(["--csv", str(file), "--readme", str(page), "--no-plots"])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    assert "| training step against dense: gpt2-small | >= 1.1 | 1.12 | 1.11 | met |" in text
    assert "| gpt2-small | 32768 | 5 ms (1.110) | 5.55 ms |" in text
    assert "failed: a \\| b" in text
    report.main(["--readme", str(page)])
    assert report.NOTHING in page.read_text()


def test_the_project_s_page_has_the_comments() -> None:
    page = report.README.read_text()
    assert report.insert(page, "x").count("x") > 0


def test_a_page_without_comments_is_refused() -> None:
    with pytest.raises(ValueError, match="once each"):
        report.insert("nothing here", "x")


def test_plots_are_drawn_and_the_same_rows_give_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib (pip install matplotlib)")
    from benchmarks import plots

    layer = replace(ROW, suite="layers", case="gpt2-small-fc", measure="forward graph")
    for name in ("a", "b"):
        assert plots.speedups([ROW], tmp_path / f"{name}-1.svg")
        assert plots.products([layer], tmp_path / f"{name}-2.svg")
    for number in (1, 2):
        assert (tmp_path / f"a-{number}.svg").read_bytes() == (tmp_path / f"b-{number}.svg").read_bytes()
    assert not plots.products([ROW], tmp_path / "none.svg")


def test_text_tables_merge_cases_that_agree_and_count_failures() -> None:
    same = [replace(ROW, case=f"layer{i}", suite="memory", metric="bits", median=9.0, ratio=0.5625) for i in range(3)]
    failed = [replace(ROW, case=f"m{i}", median=None, note="failed: x") for i in range(2)]
    text = tables.text([*same, *failed])
    assert "3 alike" in text
    assert "steps slope: failed: x (x2)" in text


def test_warming_up_compiles_every_block_once() -> None:
    todo = warm.tasks(["blocks", "peers", "steps", "prefill"], Options())
    by_family = {family: [t for t in todo if t.variants == family] for family in warm.FAMILIES}
    assert [len(tasks) for tasks in by_family.values()] == [9, 9, 9]  # Mistral's block is LLaMA's
    assert {t.suites for t in by_family["slope*",]} == {("prefill", "blocks")}
    assert {t.suites for t in by_family["torch*",]} == {("prefill",), ("prefill", "peers")}
    assert [t.nbytes for t in todo] == sorted((t.nbytes for t in todo), reverse=True)
    assert all(t.nbytes < 78 << 30 for t in todo)


def test_processes_share_the_memory_there_is() -> None:
    budget = warm.Budget(10)
    assert budget.take(99) == 10
    budget.give(10)
    assert budget.take(4) == 4


def test_a_larger_block_needs_more_memory() -> None:
    sizes = [training.footprint(shape, 1, "bf16-true") for shape in BLOCKS if shape.name in ("gpt2-small", "opt-66b")]
    assert sizes[0] < sizes[1]
