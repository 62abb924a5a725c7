"""The picture of several runs' loss curves: what it takes, what it refuses."""

import sys

import pytest

from recipes.curves import main, read
from recipes.meter import HEADER


@pytest.fixture
def runs(tmp_path):
    for name, loss in (("a", 5.0), ("b", 4.0)):
        folder = tmp_path / name
        folder.mkdir()
        steps = "".join(f"{i},{10 * i},{loss / i:.3f},\n" for i in range(1, 5))
        (folder / "curve.csv").write_text(HEADER + steps + f"4,40,,{loss}\n")
    return tmp_path


def test_draws_runs_against_the_first(runs, capsys):
    out = runs / "new" / "both.svg"
    assert (
        main(["--out", str(out), "--title", "Two", f"dense, rate 1: {runs / 'a'}", f"2:4: {runs / 'b' / 'curve.csv'}"])
        == 0
    )
    picture = out.read_text()
    for words in (">dense, rate 1<", ">2:4<", ">Two<", "(line: training", "loss minus that of"):
        assert words in picture
    assert str(out) in capsys.readouterr().out
    assert main(["--out", str(out), f"alone: {runs / 'a'}"]) == 0
    assert "loss minus that of" not in out.read_text()
    assert read(runs / "a") == ([(10.0, 5.0), (20.0, 2.5), (30.0, 1.667), (40.0, 1.25)], [(40.0, 5.0)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["{runs}/a"], "'LABEL: FOLDER' is expected"),
        (["x: {runs}/a", "x: {runs}/b"], "'x' comes twice"),
        (["x: {runs}/c"], "no such file; a folder with curve.csv"),
        (["x: {runs}/other.csv"], "its columns are a, b, expected step, tokens, train_loss, val_loss"),
    ],
)
def test_what_is_no_run_is_refused(runs, given, message, capsys):
    (runs / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(runs / "x.svg"), *(text.format(runs=runs) for text in given)])
    said = capsys.readouterr().err if stop.value.code == 2 else str(stop.value)
    assert message in said
    assert not (runs / "x.svg").exists()


def test_without_matplotlib_it_says_so(runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--out", str(runs / "x.svg"), f"a: {runs / 'a'}"]) == 1
    assert "matplotlib is not installed" in capsys.readouterr().err
