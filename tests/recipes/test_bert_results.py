"""The numbers of MiniLM in the READMEs are those of the CSV files beside them."""

import csv
import statistics
from pathlib import Path

import pytest

from recipes.bert_large import compare
from recipes.bert_large.glue_report import paired, published, report, scores_at_best_rates
from recipes.bert_large.ledger import read

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "recipes/bert_large/results"
README = (ROOT / "recipes/bert_large/README.md").read_text(encoding="utf-8")
GLUE = ["cola", "sst2", "mrpc", "stsb", "rte"]


def tables(text: str) -> list[str]:
    blocks = [block.strip() for block in text.split("\n\n")]
    return [block for block in blocks if block.startswith("|")]


@pytest.mark.parametrize("name", ["glue_minilm", "squad_minilm", "squad_minilm_h200"])
def test_tables_are_those_of_the_report(name):
    results = read(RESULTS / f"{name}.csv")
    found = tables((report if "glue" in name else compare.report)(results))
    assert len(found) >= 2
    missing = [
        table for table in found if table not in README and not (name.endswith("h200") and "seeds | SQuAD" in table)
    ]
    assert missing == []


def test_the_published_table_is_of_the_same_tasks():
    assert published(GLUE, GLUE) in README


def test_recoveries():
    with (RESULTS / "recovery_minilm.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 10
    names = {"wanda": "Wanda"}
    for row in rows:
        mask = names.get(row["mask"], row["mask"])
        what = f"{mask}, adapters of rank {row['rank']} awake" if row["rank"] != "0" else mask
        text = f"{row['source'].partition('.')[0]} | {row['length']}, {row['hidden_tokens']} | {int(row['steps']):,}"
        numbers = (
            f"{float(row['missed']):.4f} | {float(row['seconds']):.0f} | {round(int(row['tokens_per_second']), -3):,}"
        )
        assert f"| {what} | {text} | {numbers} | {int(row['peak_bytes']) / 2**30:.2f} |" in README
        assert int(row["tokens"]) == int(row["steps"]) * {"128": 256 * 128, "384": 85 * 384}[row["length"]]


def of_seed_0(name: str) -> dict[str, float]:
    """The mean over tasks of each method at its best rate."""
    rows = [result for result in read(RESULTS / f"{name}.csv") if result.seed == 0]
    scores: dict[str, list[float]] = {}
    for (label, _), by_seed in scores_at_best_rates(rows).items():
        scores.setdefault(label, []).append(by_seed[0])
    return {label: statistics.mean(found) for label, found in scores.items()}


def test_the_first_readme_shows_what_each_step_gives():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    glue, squad = of_seed_0("glue_minilm"), of_seed_0("squad_minilm")
    steps: dict[str, str | tuple[str, str]] = {
        "2:4, cut in one go": "",
        "+ [recovery on plain text](recipes/bert_large/README.md#from-a-dense-pretrained-model)": ", recovered=novels-3000",
        "+ a dense teacher's outputs": ", teacher + recovered=novels-3000",
        "+ its hidden states": ", teacher + recovered=novels-3000, --model.teacher.hidden_weight 1",
        "+ whole text and the windows' length in the recovery, hidden states weigh 16, no labels": tuple(
            f", teacher + recovered={place}-3600, --model.teacher.weight 1 --model.teacher.hidden_weight 16"
            for place in ("novels", "novels384")
        ),
    }
    assert f"| dense | {glue['dense']:.2f} | | {squad['dense']:.2f} | |" in readme
    for words, start in steps.items():
        cells = []
        for own, where in zip((glue, squad), (start, start) if isinstance(start, str) else start, strict=True):
            label = f"2:4 wanda, r = 0{where}"
            cells += [f"{own[label]:.2f}", f"{own[label] - own['dense']:+.2f}"]
        assert f"| {words} | {' | '.join(cells)} |" in readme.replace("**", "")
    scores = scores_at_best_rates(read(RESULTS / "squad_minilm.csv"))
    last = ", teacher + recovered=mixed384-3600, --model.teacher.weight 1 --model.teacher.hidden_weight 16"
    for words, start, digits in (
        ("the last line but one is 1.6 below dense on SQuAD", steps["+ its hidden states"], 1),
        ("with another text to recover on, ends 0.01 below", last, 2),
    ):
        own = scores[f"2:4 wanda, r = 0{start}", "squad"]
        assert len(own) == 3
        assert f"{-paired(own, scores['dense', 'squad']):.{digits}f}" in words
        assert words in readme
    differences = [f"{own[seed] - scores['dense', 'squad'][seed]:+.2f}" for seed in range(3)]
    assert f"over three seeds** ({', '.join(differences)})" in README


def test_kernels_and_reference_end_within_a_point():
    kernels, reference = (
        {(r.label, r.rate, r.seed): r.f1 for r in read(RESULTS / f"{name}.csv")}
        for name in ("squad_minilm", "squad_minilm_h200")
    )
    common = kernels.keys() & reference.keys()
    assert len(common) == 11
    assert max(abs(kernels[run] - reference[run]) for run in common) < 1.0
    for words, run in {
        "dense 2e-4": ("dense", 2e-4, 0),
        "magnitude 4e-4": ("2:4 magnitude, r = 0", 4e-4, 0),
        "transposable 4e-4": ("2:4 transposable, r = 0", 4e-4, 0),
    }.items():
        assert f"{words}: {reference[run]:.2f} and {kernels[run]:.2f}" in README


def test_pretraining_on_the_novels():
    with (RESULTS / "pretrain_novels/runs.csv").open(encoding="utf-8") as stream:
        rows = {row["run"]: row for row in csv.DictReader(stream)}
    for name, what, awake in (
        ("phase1_dense", "1, dense", ""),
        ("phase1", "1, 2:4", ""),
        ("phase2_dense", "2, dense", ""),
        ("phase2", "2, 2:4, r = 16 for 50 steps", " awake"),
    ):
        row = rows[name]
        cells = [what, f"{row['steps']}, {int(row['tokens']) / 1e6:.1f}M", f"{float(row['val_loss']):.4f}"]
        cells += [f"{round(int(row['tokens_per_second']), -2):,}{awake}", f"{int(row['stored_bytes']) / 1e6:,.0f}"]
        assert f"| {' | '.join(cells)} | {int(row['peak_bytes']) / 2**30:.2f} |" in README
        with (RESULTS / f"pretrain_novels/{name}.csv").open(encoding="utf-8") as stream:
            last = list(csv.DictReader(stream))[-1]
        assert (last["step"], last["tokens"], f"{float(last['val_loss']):.4f}") == (
            row["steps"],
            row["tokens"],
            row["val_loss"],
        )
    speed = {name: int(row["tokens_per_second"]) for name, row in rows.items()}
    asleep = {name: int(row["tokens_per_second_asleep"]) for name, row in rows.items()}
    both = {f"{asleep[phase] / asleep[f'{phase}_dense']:.2f}" for phase in ("phase1", "phase2")}
    assert len(both) == 1
    assert f"{both.pop()} times dense in either phase" in README
    assert f"phase 2: {round(asleep['phase2'], -2):,} tokens/s" in README
    assert f"slower than dense, {speed['phase2'] / speed['phase2_dense']:.2f} times" in README
    again = [f"{speed[f'{phase}_again'] / speed[f'{phase}_again_dense']:.2f}" for phase in ("phase1", "phase2")]
    assert f"{' and '.join(again)}\n  times" in README


def test_pretraining_in_small_batches():
    with (RESULTS / "pretrain_novels/runs.csv").open(encoding="utf-8") as stream:
        rows = {row["run"]: row for row in csv.DictReader(stream)}
    dense, sparse = rows["phase1_small_dense"], rows["phase1_small"]
    assert f"{float(dense['val_loss']):.4f} and {float(sparse['val_loss']):.4f} at step 1,600" in README
    speed = [int(row["tokens_per_second"]) for row in (sparse, dense)]
    assert f"slower than dense, {speed[0] / speed[1]:.2f} times** ({round(speed[0], -2):,} tokens/s" in README
    assert f"against {round(speed[1], -2):,})" in README
    for row in (dense, sparse):
        with (RESULTS / f"pretrain_novels/{row['run']}.csv").open(encoding="utf-8") as stream:
            last = list(csv.DictReader(stream))[-1]
        assert (last["step"], f"{float(last['val_loss']):.4f}") == (row["steps"], row["val_loss"])
