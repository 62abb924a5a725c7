"""Zero-shot scores in a comparison: made from the runs' last checkpoints, kept in a CSV file beside the results, and shown."""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from recipes import children
from recipes.gpt2.ledger import Result, best_rates, read
from recipes.gpt2.plans import Plan, Queue, labels
from recipes.gpt2.zeroshot_report import PUBLISHED, PUBLISHED_METRIC, PUBLISHED_MODEL, RACE_NOTE
from recipes.gpt2.zeroshot_tasks import TASKS, find_file
from recipes.launching import ROOT, RunError, share_of_threads
from recipes.ledger import append_row, read_rows
from slope_pl.data import DataUnavailableError

HUB = "hub"
"""In place of a folder: tasks come from the hub."""


@dataclass(frozen=True)
class Zeroshot:
    """What is to be scored.

    Attributes:
        data: folder of local task files, or :data:`HUB`.
        tasks: keys of ``TASKS``.
        keep: whether checkpoints are kept once they are scored.
    """

    data: str
    tasks: list[str]
    keep: bool

    @classmethod
    def of(cls, data: str | None, tasks: Sequence[str] | None, keep: bool) -> "Zeroshot":
        """From the command line; without ``data``, the folder of SLOPE_DATA_DIR, else the hub.

        Raises:
            SystemExit: if a task is unknown, or the folder has none.
        """
        shared = Path(os.environ.get("SLOPE_DATA_DIR", "")) / "zeroshot"
        place = data or (str(shared) if os.environ.get("SLOPE_DATA_DIR") and shared.is_dir() else HUB)
        return cls(place, tasks_in(place, tasks), keep)


@dataclass(frozen=True)
class TaskScore:
    """One row: what one run scored in one task, in the metric that the published table has."""

    run: str
    task: str
    accuracy: float
    """Per cent."""
    stderr: float
    """Of the documents, in per cent; nan where there are too few."""
    documents: int


def scores_file(file: Path) -> Path:
    """Where a comparison's zero-shot scores are."""
    return file.with_name(f"{file.stem}-zeroshot.csv")


def read_scores(file: Path) -> dict[str, dict[str, TaskScore]]:
    """Scores beside ``file`` by run and task; of one that was scored twice, the last."""
    scores: dict[str, dict[str, TaskScore]] = defaultdict(dict)
    for row in read_rows(scores_file(file), TaskScore):
        scores[row.run][row.task] = row
    return scores


def tasks_in(data: str, wanted: Sequence[str] | None) -> list[str]:
    """The tasks to score: those asked for, else all of the hub, or those whose files are in the folder.

    Raises:
        SystemExit: if one is unknown, or there is none.
    """
    if unknown := [name for name in wanted or () if name not in TASKS]:
        raise SystemExit(f"--tasks: {', '.join(unknown)} unknown; expected some of {', '.join(TASKS)}")
    if wanted:
        return list(wanted)
    found = [name for name in TASKS if data == HUB or _is_there(name, data)]
    if not found:
        raise SystemExit(
            f"--zeroshot {data}: no file of any task there; python -m recipes.gpt2.zeroshot --help has names"
        )
    return found


def _is_there(name: str, folder: str) -> bool:
    try:
        find_file(name, Path(folder).expanduser())
    except DataUnavailableError:
        return False
    return True


def score(
    checkpoint: Path,
    run: str,
    folder: Path,
    data: str,
    tasks: Sequence[str],
    environment: Mapping[str, str],
    processes: int = 1,
) -> list[TaskScore]:
    """Score a checkpoint in a process of its own.

    Args:
        checkpoint: of the run; it names its tokenizer.
        run: name of the run.
        folder: its output goes into ``zeroshot.txt`` and ``zeroshot.json`` there.
        data: folder of local task files, or :data:`HUB`.
        tasks: keys of ``TASKS``.
        environment: set for the process.
        processes: how many of them are side by side.

    Raises:
        RunError: if it failed; with the end of its output.
    """
    output, log = folder / "zeroshot.json", folder / "zeroshot.txt"
    command = [sys.executable, "-m", "recipes.gpt2.zeroshot", "--ckpt", str(checkpoint), "--output", str(output)]
    command += [*([] if data == HUB else ["--data", str(Path(data).expanduser().absolute())]), "--tasks", *tasks]
    with log.open("w", encoding="utf-8") as stream:
        # A bar in a file is a line a move.
        settings = {
            "TQDM_MININTERVAL": "10",
            **share_of_threads(processes),
            **os.environ,
            **environment,
        }
        status = children.run(command, cwd=ROOT, env=settings, stdout=stream, stderr=subprocess.STDOUT)
    if status:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-10:])
        raise RunError(f"scoring {checkpoint}: status {status}; the end of {log}:\n{end}")
    found = json.loads(output.read_text(encoding="utf-8"))["scores"]
    return [
        TaskScore(
            run,
            s["task"],
            round(s["value"], 4),
            math.nan if s["stderr"] is None else round(s["stderr"], 4),
            s["documents"],
        )
        for s in found
        if s["metric"] == PUBLISHED_METRIC
    ]


def score_runs(
    plans: Sequence[Plan],
    file: Path,
    place: Callable[[Plan], Path],
    settings: "Zeroshot",
    lanes: Sequence[Mapping[str, str]],
    budget: tuple[float | None, float],
) -> list[str]:
    """Score what was trained and has no scores yet, one run after the other in each lane; the names of those that failed.

    Args:
        plans: runs asked for.
        file: of the comparison.
        place: gives the folder of a run, below which its checkpoint lies.
        settings: which tasks, from where.
        lanes: environments, for runs side by side.
        budget: minutes, and when they began by ``time.perf_counter()``.
    """
    done, scored = {(r.settings, r.rate, r.seed): r.run for r in read(file)}, read_scores(file)
    wanted = [
        plan for plan in plans if plan.key in done and set(settings.tasks) - scored.get(done[plan.key], {}).keys()
    ]
    found = {plan.key: max(place(plan).glob("**/*.ckpt"), key=os.path.getmtime, default=None) for plan in wanted}
    if lost := [plan.label for plan in wanted if found[plan.key] is None]:
        print(f"Not scored, for their checkpoints are not there: {'; '.join(lost)}. Another --csv makes them anew.")
    queue = Queue([plan for plan in wanted if found[plan.key] is not None], *budget)
    if queue.plans:
        print(
            f"Zero-shot scores of {len(queue.plans)} runs: {', '.join(settings.tasks)}, from {settings.data}.",
            flush=True,
        )

    processes = max(1, min(len(lanes), len(queue.plans)))

    def work(lane: Mapping[str, str]) -> None:
        while (plan := queue.take()) is not None:
            began, checkpoint = time.perf_counter(), found[plan.key]
            assert checkpoint is not None, "queued are those that have one"
            try:
                rows = score(checkpoint, done[plan.key], place(plan), settings.data, settings.tasks, lane, processes)
            except RunError as error:
                queue.failed.append(f"scores of {plan.label}")
                print(f"Scores of {plan.label} FAILED: {error}", flush=True)
                continue
            with queue.lock:
                for row in rows:
                    append_row(scores_file(file), row)
                queue.took(plan, time.perf_counter() - began)
            if not settings.keep:
                checkpoint.unlink()
            mean = statistics.mean(row.accuracy for row in rows)
            print(f"{plan.label}: {mean:.2f} % in the mean of {len(rows)} tasks", flush=True)

    with ThreadPoolExecutor(len(lanes)) as pool:
        for one in [pool.submit(work, lane) for lane in lanes]:
            one.result()
    if queue.plans:
        print(f"Budget: {len(queue.plans)} runs are left to score; the same command goes on.")
    return queue.failed


def score_table(results: Sequence[Result], scores: Mapping[str, Mapping[str, TaskScore]]) -> str | None:
    """Each method at its best rate beside the published one, as Markdown; None without scores.

    A cell is the mean over the seeds that were scored, with their deviation; the mean of a row is that of the tasks which
    every row has and the paper has too.
    """
    best, names = best_rates(results), labels(results)
    rows: dict[str, list[Mapping[str, TaskScore]]] = defaultdict(list)
    for result in results:
        if result.rate == best[result.settings] and scores.get(result.run):
            rows[f"{names[result.settings]}, rate {result.rate:g}"].append(scores[result.run])
    if not rows:
        return None
    scored = [by_task for group in rows.values() for by_task in group]
    tasks = [task for task in TASKS if any(task in by_task for by_task in scored)]
    published = next(iter(PUBLISHED.values()))
    shared = [task for task in tasks if task in published and all(task in by_task for by_task in scored)]
    lines = [
        f"| | seeds | {' | '.join(tasks)} | mean of {len(shared)} |",
        f"|---|---|{'---|' * len(tasks)}---|",
    ]
    for label, group in rows.items():
        cells = [_cell([by_task[task].accuracy for by_task in group if task in by_task]) for task in tasks]
        means = [statistics.mean(by_task[task].accuracy for task in shared) for by_task in group] if shared else []
        lines.append(f"| {label} | {len(group)} | {' | '.join(cells)} | **{_cell(means, 2)}** |")
    lines.append(_line("chance", {task: TASKS[task].chance for task in tasks}, tasks, shared))
    lines += [_line(f"published: {name}", column, tasks, shared) for name, column in PUBLISHED.items()]
    documents = {task: max(by_task[task].documents for by_task in scored if task in by_task) for task in tasks}
    notes = [
        f"Accuracy (`acc`) in per cent; published: {PUBLISHED_MODEL}.",
        f"Documents: {', '.join(f'{task} {count:,}' for task, count in documents.items())}.",
        *([RACE_NOTE] if "race" in tasks else []),
    ]
    return "\n".join([*lines, "", " ".join(notes)])


def _line(label: str, column: Mapping[str, float], tasks: Sequence[str], shared: Sequence[str]) -> str:
    cells = [f"{column[task]:.1f}" if column.get(task) else "" for task in tasks]
    mean = f"{statistics.mean(column[task] for task in shared):.2f}" if shared else ""
    return f"| {label} | | {' | '.join(cells)} | {mean} |"


def _cell(values: Sequence[float], digits: int = 1) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
