"""The picture of differences to dense: what it draws, and what it refuses."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from recipes.bert_large import gaps
from recipes.bert_large.ledger import read
from tests.recipes.test_glue_all import result
from tests.recipes.test_readme import commands

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "recipes/bert_large/results"


def rows():
    """RTE and WNLI, dense by three seeds, sparse by two of them; the second rate is the better one."""
    return [
        *(result("rte", seed=seed, score=score) for seed, score in ((0, 60.0), (1, 70.0), (2, 80.0))),
        *(result("wnli", seed=seed, score=50.0) for seed in (0, 1, 2)),
        result("rte", "sparse", rate=1e-3, seed=0, score=10.0),
        *(result("rte", "sparse", seed=seed, score=score) for seed, score in ((0, 58.0), (1, 69.0), (5, 99.0))),
        replace(result("mrpc", "sparse", seed=0, score=1.0), mask="wanda"),  # no dense run of it
    ]


def test_differences_are_of_each_seed_at_the_best_rate():
    assert gaps.gaps(rows(), ["rte"]) == {
        "dense": {0: 0.0, 1: 0.0, 2: 0.0},
        "2:4 magnitude, r = 0": {0: -2.0, 1: -1.0},
    }


def test_a_seed_counts_where_all_tasks_are():
    more = [result("mrpc", score=80.0, f1=85.0), replace(result("mrpc", "sparse", score=70.0), f1=81.0)]
    assert gaps.gaps([*rows(), *more], ["rte", "mrpc"]) == {"dense": {0: 0.0}, "2:4 magnitude, r = 0": {0: -3.0}}


def test_a_panel_for_each_set_of_settings():
    other = [replace(r, settings="other.yaml") for r in rows()[:9]]
    panels = gaps.panels_of([*rows()[:9], *other, replace(result("rte"), task="squad", settings="s", f1=70.0)])
    assert list(panels) == ["GLUE, mean of 1 tasks", "GLUE, mean of 1 tasks\nother.yaml", "SQuAD, F1"]


def test_the_picture_of_the_readme_is_of_these_files(tmp_path, monkeypatch):
    (line,) = commands("python -m recipes.bert_large.gaps")
    words = shlex.split(line)[3:]
    kept = ROOT / words[words.index("--out") + 1]
    words[words.index("--out") + 1] = str(tmp_path / "gaps.svg")
    monkeypatch.chdir(ROOT)
    assert gaps.main(words) == 0
    # Another version of matplotlib may write other digits; points and labels stay.
    drawn, known = ((place / name).read_text() for place, name in ((tmp_path, "gaps.svg"), (kept.parent, kept.name)))
    assert drawn.count("<use") == known.count("<use")
    for name in ("glue_minilm", "squad_minilm"):
        (found,) = gaps.panels_of(read(RESULTS / f"{name}.csv")).values()
        assert len(found) > 10
        for label in found:
            assert f">{gaps._short(label)}</text>" in known


def test_what_cannot_be_drawn_is_said(tmp_path):
    with pytest.raises(SystemExit, match=r"no\.csv: no such file; a CSV of recipes\.bert_large\.glue_all"):
        gaps.main(["--out", str(tmp_path / "x.svg"), str(tmp_path / "no.csv")])
    empty = tmp_path / "empty.csv"
    empty.write_text((RESULTS / "glue_minilm.csv").read_text().splitlines()[0] + "\n")
    with pytest.raises(SystemExit, match="nothing to draw"):
        gaps.main(["--out", str(tmp_path / "x.svg"), str(empty)])
    assert not (tmp_path / "x.svg").exists()
