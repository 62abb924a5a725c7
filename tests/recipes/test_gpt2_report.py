"""The report of a comparison: tables, names, pictures."""

import csv
import math
import sys

from recipes import loss_plot
from recipes.gpt2 import report
from recipes.gpt2.ledger import Curve, Result, append_curve, curves_file, read, read_curves
from recipes.gpt2.plans import labels
from recipes.ledger import append_row
from recipes.loss_plot import _less, loss_curves
from tests.recipes.test_gpt2_compare import row


def test_report_has_the_best_rate_and_the_spread(tmp_path):
    rows = [row(rate=rate, val_loss=loss) for rate, loss in ((1e-3, 4.2), (2e-3, 4.0), (4e-3, math.nan))]
    rows += [row(rate=2e-3, seed=seed, val_loss=loss) for seed, loss in ((1, 4.1), (2, 3.9))]
    rows.append(row(method="slope r=0", settings="novels_slope.yaml", val_loss=4.5, tokens_per_second=123456.0))
    rows.append(row(settings="novels_dense.yaml --model.size medium", val_loss=3.5))
    rows.append(row(method="fst", settings="novels_fst.yaml --model.fst.decay 0", val_loss=3.7))
    rows.append(row(method="fst", settings="novels_fst.yaml", val_loss=math.nan))
    for result in rows:
        append_row(tmp_path / "my.csv", result)
    assert [r for r in read(tmp_path / "my.csv") if r.val_loss == r.val_loss] == [
        r for r in rows if r.val_loss == r.val_loss
    ]
    lines = report.report(read(tmp_path / "my.csv")).splitlines()
    assert lines[2] == (
        "| dense | 0.002 | 3 | 4.0000 ± 0.1000 | 54.60 | 100 | 10 | 1.00 | 0.001: 4.2000, 0.002: 4.0000, 0.004: inf |"
    )
    assert lines[3] == "| slope r=0 | 0.001* | 1 | 4.5000 | 90.02 | 123,456 | 10 | 1.00 | 0.001: 4.5000 |"
    assert lines[4] == "| fst | 0.001* | 1 | inf | inf | 100 | 10 | 1.00 | 0.001: inf |"
    assert "a better one may lie beyond" in lines[6]
    assert lines[10].startswith("| dense | 0.001* | 1 | 3.5000 |"), "another size is another table"
    assert "1,000 tokens a run, all with `--model.size medium`. " in lines[12]
    assert lines[16].startswith("| fst | 0.001* | 1 | 3.7000 |")
    assert report.report([]) == "No results yet."


def test_a_curve_that_was_begun_twice_is_the_second(tmp_path):
    """A run is cut between its curve and its row: it is made again, and its curve is written again."""
    result, file = row(), tmp_path / "my.csv"
    append_curve(file, Curve(result.run, [(1, 10, 5.0, math.nan), (2, 20, 4.0, math.nan)]))
    append_curve(file, Curve(result.run, [(1, 10, 5.5, math.nan), (2, 20, 4.5, math.nan), (2, 20, math.nan, 4.6)]))
    append_row(file, result)
    points = read_curves(file)[result.run].points
    assert [(step, loss) for step, _, loss, _ in points if loss == loss] == [(1, 5.5), (2, 4.5)]
    with curves_file(file).open() as stream:
        assert csv.DictReader(stream).fieldnames == ["run", "step", "tokens", "train_loss", "val_loss"]
    assert "my-curves.svg" in report.draw(file)


def test_curves_are_drawn_in_the_order_of_their_losses_and_against_dense(tmp_path):
    file = tmp_path / "my.csv"
    for result in (row(), row(method="slope r=0", settings="novels_slope.yaml", val_loss=3.9)):
        points = [(1, 10, result.val_loss + 1, math.nan), (2, 20, result.val_loss, math.nan), (2, 20, math.nan, 4.6)]
        append_curve(file, Curve(result.run, points))
        append_row(file, result)
        report.draw(file)
        picture = (tmp_path / "my-curves.svg").read_text()
        assert ("loss minus that of" in picture) == (
            result.method != "dense"
        )  # one alone has nothing to be compared with
    assert picture.index(">slope r=0, rate 0.001<") < picture.index(">dense, rate 0.001<")
    curves = [([(1.0, 5.0), (2.0, 4.0), (3.0, 3.5)], [(2.0, 4.5)]), ([(1.0, 6.0), (2.0, 4.5)], [(2.0, 4.25)])]
    assert _less(*curves) == ([(1.0, -1.0), (2.0, -0.5)], [(2.0, 0.25)])


def test_a_curve_is_the_mean_over_seeds(tmp_path):
    """Not that of the best one; where one of them ended early (diverged), up to there."""
    nan = math.nan
    first = Curve("a", [(1, 10, 5.0, nan), (2, 20, 4.0, nan), (2, 20, nan, 4.5), (3, 30, 3.0, nan)])
    second = Curve("b", [(1, 10, 6.0, nan), (2, 20, 4.5, nan), (2, 20, nan, 4.25)])
    points = report.mean_curve([first, second])
    assert str(points) == str([(1, 10, 5.5, nan), (2, 20, 4.25, nan), (2, 20, nan, 4.375)])
    file = tmp_path / "my.csv"
    for result in (row(), row(seed=1, val_loss=3.9), row(rate=2e-3, val_loss=4.6)):
        append_curve(file, Curve(result.run, first.points))
        append_row(file, result)
    report.draw(file)
    picture = (tmp_path / "my-curves.svg").read_text()
    assert ">dense, rate 0.001, 2 seeds<" in picture
    assert "0.002" not in picture


def test_differences_to_dense_are_over_common_seeds(tmp_path, monkeypatch):
    """Seed 1 sees other batches: what its dense run is taken from has to be of seed 1 too."""
    file, seen = tmp_path / "my.csv", {}
    for result in (row(), row(seed=1), row(method="fst", settings="novels_fst.yaml", seed=1)):
        loss = 5.0 + 2 * result.seed + (result.method == "fst")
        append_curve(file, Curve(result.run, [(1, 10, loss, math.nan), (1, 10, math.nan, loss)]))
        append_row(file, result)
    monkeypatch.setattr(report, "loss_curves", lambda *given: seen.update(given[4]) or given[3])
    report.draw(file)
    assert seen == {"fst, rate 0.001": ([(10.0, 7.0)], [(10.0, 7.0)])}
    curves = {"dense": ([(1.0, 6.0)], []), "fst": ([(1.0, 8.0)], [])}
    drawn, draw = [], loss_plot._draw
    monkeypatch.setattr(loss_plot, "_draw", lambda axes, lines: drawn.append(lines) or draw(axes, lines))
    assert loss_curves(tmp_path / "a.svg", curves, "", "dense", {"fst": ([(1.0, 7.0)], [])})
    assert drawn[1] == {"dense": ([(1.0, 0.0)], []), "fst": ([(1.0, 1.0)], [])}


def two_sizes() -> list[Result]:
    """Small and medium models of one CSV file, at the same rate; the reader's own method among them."""
    methods = {
        "dense": "novels_dense.yaml",
        "slope r=0": "novels_slope.yaml --model.slope.adapter_rank 0",
        "early": "novels_slope.yaml --model.slope.adapter_rank 16 --model.slope.adapter_start 0.5",
    }
    sizes = (("", 4.0), (" --model.size medium", 3.0))
    return [
        row(method=name, settings=own + size, val_loss=loss + i / 10)
        for size, loss in sizes
        for i, (name, own) in enumerate(methods.items())
    ]


def test_two_sizes_in_a_file_are_two_tables_and_two_pictures(tmp_path):
    file = tmp_path / "my.csv"
    for result in two_sizes():
        append_curve(file, Curve(result.run, [(1, 10, result.val_loss, math.nan), (1, 10, math.nan, result.val_loss)]))
        append_row(file, result)
    small, medium = report.report(read(file)).split("\n\n| method")
    for table, losses in ((small, ("4.0", "4.1", "4.2")), (medium, ("3.0", "3.1", "3.2"))):
        for method, loss in zip(("dense", "slope r=0", "early"), losses, strict=True):
            assert f"| {method} | 0.001* | 1 | {loss}000 |" in table
    assert report.draw(file).splitlines() == [f"Loss curves: {tmp_path}/my-curves{n}.svg" for n in ("", "-2")]
    first, second = ((tmp_path / f"my-curves{n}.svg").read_text() for n in ("", "-2"))
    assert "medium" not in first
    assert "GPT-2 (--model.size medium), G" in second
    for picture in (first, second):
        assert picture.count(">early, rate 0.001<") == 1
        assert "loss minus that of" in picture


def test_two_texts_in_a_file_are_two_tables(tmp_path):
    rows = [
        row(rate=rate, text=text, val_loss=loss)
        for text, rate, loss in (("a", 1e-3, 4.0), ("a", 2e-3, 3.0), ("b", 1e-3, 2.0))
    ]
    first, second = report.report(rows).split("\n\n| method")
    assert "| dense | 0.002* | 1 | 3.0000 |" in first
    assert first.endswith("Text: a.")
    assert "| dense | 0.001* | 1 | 2.0000 |" in second
    assert second.endswith("Text: b.")


def test_a_method_of_the_readers_own_is_not_compared_with_another_size():
    """Even where it is the only one of its size."""
    results = [
        row(),
        row(method="mine", settings="novels_slope.yaml --model.values_weight_decay 0 --model.size medium"),
    ]
    assert report.report(results).count("| method |") == 2


def test_labels_tell_apart_what_has_one_name():
    results = two_sizes()
    found = labels(results)
    assert [*found.values()][::3] == ["dense", "dense (`--model.size medium`)"]
    assert [*found.values()][2::3] == ["early", "early (`--model.size medium`)"]
    assert {*labels(results[:3]).values()} == {"dense", "slope r=0", "early"}
    other = row(method="early", settings="novels_slope.yaml --model.slope.adapter_rank 64")
    assert labels([results[2], other])[other.settings] == "early (`--model.slope.adapter_rank 64`)"


def test_without_matplotlib_the_report_says_so(tmp_path, monkeypatch):
    append_curve(tmp_path / "my.csv", Curve(row().run, [(1, 10, 5.0, math.nan)]))
    append_row(tmp_path / "my.csv", row())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed" in report.draw(tmp_path / "my.csv")
