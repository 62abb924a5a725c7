"""The numbers of MiniLM in the READMEs are those of the CSV files beside them."""

import csv
import statistics
from pathlib import Path

import pytest

from recipes import convergence
from recipes.bert_large import compare
from recipes.bert_large.glue_report import best_rates, paired, published, report, scores_at_best_rates
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
    assert len(rows) == 11
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
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("**", "")
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
        assert f"| {words} | {' | '.join(cells)} |" in readme
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


def test_glue_over_three_seeds():
    """At its own best rates, and at those that were best on the rows of another recovery, which were there before."""
    rows = [r for r in read(RESULTS / "glue_minilm.csv") if r.task in GLUE]
    hidden = "--model.teacher.weight 1 --model.teacher.hidden_weight 16"
    new, before = (
        f"2:4 wanda, r = 0, teacher + recovered={name}-{steps}, {hidden}"
        for name, steps in (("mixed", 3500), ("novels", 3600))
    )
    rates = {(task, label): rate for (_, task, label), rate in best_rates(rows).items()}

    def differences(chosen: str) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for task in GLUE:
            own = {r.seed: r.published for r in rows if (r.task, r.label, r.rate) == (task, new, rates[task, chosen])}
            dense = {
                r.seed: r.published for r in rows if (r.task, r.label, r.rate) == (task, "dense", rates[task, "dense"])
            }
            found[task] = [own[seed] - dense[seed] for seed in range(3)]
        return found

    own, earlier = differences(new), differences(before)
    by_seed = [statistics.mean(own[task][seed] for task in GLUE) for seed in range(3)]
    mean = statistics.mean(by_seed)
    assert -1 < mean < 0
    assert f"{-mean:.2f} below** on GLUE" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (
        f"GLUE ends {-mean:.2f} below dense\n  over three seeds** ({', '.join(f'{d:+.2f}' for d in by_seed)})" in README
    )
    assert f"chosen before, {-statistics.mean(map(statistics.mean, earlier.values())):.2f} below" in README
    cola = -statistics.mean(own.pop("cola"))
    others = -statistics.mean(map(statistics.mean, own.values()))
    assert f"CoLA loses {cola:.1f} of it, the other four tasks\n  {others:.1f} in the mean" in README


def test_dense_runs_of_the_other_machine_end_alike():
    """The 2:4 runs of three seeds are from another machine than the dense ones that they are set beside."""
    rows = {(r.task, r.rate, r.seed): r.score for r in read(RESULTS / "glue_minilm.csv") if r.method == "dense"}
    with (RESULTS / "glue_minilm_teachers_h200.csv").open(encoding="utf-8") as stream:
        again = {(r["task"], float(r["rate"]), int(r["seed"])): float(r["score"]) for r in csv.DictReader(stream)}
    assert sorted({(task, seed) for task, _, seed in again}) == sorted(
        (task, seed) for task in GLUE for seed in range(3)
    )
    differences = [score - rows[run] for run, score in again.items()]
    assert f"their scores end {-statistics.mean(differences):.2f} lower" in README
    assert f"at most {max(map(abs, differences)):.1f} in one run" in README


def test_adapters_of_bert_large_keep_their_direction():
    points = convergence.read(RESULTS / "pretrain_novels/adapters.csv")
    assert {point.kind for point in points} >= {"query", "key", "value", "output"}
    awake = [point for point in points if point.since_wake > 0]
    assert min(point.cosine_down for point in points) > 0.999
    assert min(min(point.cosine_up, point.cosine_product) for point in awake) > 0.99


def test_bert_large_from_its_own_pretraining():
    results = [r for name in ("glue", "squad") for r in read(RESULTS / f"{name}_bert_large.csv")]
    found = {(r.method, r.task): r for r in results}
    assert len(found) == len(results) == 6
    with (RESULTS / "pretrain_novels/runs.csv").open(encoding="utf-8") as stream:
        runs = {row["run"]: row for row in csv.DictReader(stream)}
    for words, method, end in (("dense", "dense", "_dense"), ("2:4, r = 16", "sparse", "")):
        losses = ", ".join(runs[f"{phase}_mixed{end}"]["val_loss"] for phase in ("phase1", "phase2"))
        squad, mrpc, rte = (found[method, task] for task in ("squad", "mrpc", "rte"))
        cells = [words, losses, f"{squad.f1:.2f} ({squad.exact_match:.2f})", f"{mrpc.f1:.2f} ({mrpc.accuracy:.2f})"]
        assert f"| {' | '.join(cells)} | {rte.accuracy:.2f} |" in README
        assert {r.commit for r in (squad, mrpc, rte)} == {runs[f"phase1_mixed{end}"]["commit"]}
    asleep = {name: int(row["tokens_per_second_asleep"]) for name, row in runs.items()}
    speed = [f"{asleep[f'{phase}_mixed'] / asleep[f'{phase}_mixed_dense']:.2f}" for phase in ("phase1", "phase2")]
    assert f"on two H200s at bd88bd0: {' and '.join(speed)}." in README
    awake = int(runs["phase2_mixed"]["tokens_per_second_awake"]) / int(runs["phase2_mixed_dense"]["tokens_per_second"])
    assert f"({awake:.2f} on the H200)" in README


def test_kernels_and_reference_end_within_a_point():
    kernels, reference = (
        {(r.label, r.rate, r.seed): r.f1 for r in read(RESULTS / f"{name}.csv")}
        for name in ("squad_minilm", "squad_minilm_h200")
    )
    common = kernels.keys() & reference.keys()
    assert len(common) == 15
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
