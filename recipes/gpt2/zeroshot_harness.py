"""Running the tasks with the LM Evaluation Harness: its definitions, on the hub's data or on local files."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import lm_eval.api.task
import lm_eval.tasks
import lm_eval.utils
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from recipes.gpt2.zeroshot_tasks import TASKS, Splits, TaskFileError, find_file, read_splits
from slope_pl import ConfigError
from slope_pl.data import DataUnavailableError

_BOOTSTRAPS = 1000  # resamples for the standard error of the perplexity; accuracies have a formula
_FEWSHOT_SEED = 1234  # the harness' own default


_FOLDERS = ("arc", "hellaswag", "lambada", "mathqa", "mmlu/default", "openbookqa", "piqa", "race", "winogrande")


@cache
def task_manager() -> TaskManager:
    """The harness' list of our tasks, made once. All of its folders are some ten thousand files, 20 seconds of reading."""
    everything = Path(lm_eval.tasks.__file__).parent
    ours = [everything / folder for folder in _FOLDERS]
    if all(folder.is_dir() for folder in ours):
        manager = TaskManager(include_path=[str(folder) for folder in ours], include_defaults=False)
        if all(task.harness in manager.task_index for task in TASKS.values()):
            return manager
    return TaskManager()  # a version of the harness that keeps them elsewhere


class _LocalFile:
    """What stands in for the download of one task from the hub.

    Only where documents come from is changed: prompts, choices, targets, metrics and versions stay the harness' own.
    """

    def __init__(self, name: str, path: Path, shots: int) -> None:
        self.name, self.path, self.shots = name, path, shots
        self.splits = read_splits(name, path)

    def fill(self, task: ConfigurableTask) -> None:
        """Give the task its splits, and strike those that the file lacks."""
        splits = self._subject(task.DATASET_NAME) if TASKS[self.name].group else self.splits
        config = task.config
        examples = config.fewshot_split or config.training_split or config.validation_split or config.test_split
        # Without a split of their own, the harness draws one example more, in case one is the question.
        needed, there = self.shots + (not config.fewshot_split), len(splits.get(examples or "", ()))
        if self.shots and there < needed:
            raise ConfigError(
                f"--shots {self.shots}: the harness takes {needed} examples of {self.name} from the split {examples!r}, of "
                f"which {self.path} has {there} rows (splits: {', '.join(splits)}). Add rows with split={examples!r}, or use "
                "--shots 0."
            )
        for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
            if getattr(config, key) not in splits:
                task.set_config(key, None)
        if task.fewshot_cfg.split not in splits:
            task.fewshot_cfg.split = None
        task.dataset = datasets.DatasetDict({k: datasets.Dataset.from_list(rows) for k, rows in splits.items()})

    def _subject(self, subject: str | None) -> Splits:
        """The part of MMLU that one of the harness' 57 tasks is about."""
        part = {k: [row for row in rows if row["subject"] == subject] for k, rows in self.splits.items()}
        scored = TASKS[self.name].scored
        if not part[scored]:
            raise TaskFileError(
                f"{self.path} has no row with subject={subject!r} and split={scored!r}: {self.name} is the mean over all "
                "of its subjects."
            )
        return {k: rows for k, rows in part.items() if rows}


@contextmanager
def _reading(file: _LocalFile) -> Iterator[None]:
    """Tasks that the harness builds inside read ``file`` instead of the hub."""

    def download(self: ConfigurableTask, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        file.fill(self)

    with mock.patch.object(ConfigurableTask, "download", download):
        yield


def load_tasks(names: list[str], data: Path | None, shots: int) -> dict[str, Any]:
    """Load tasks with their documents, as the harness' ``TaskManager.load`` returns them.

    Args:
        names: keys of ``TASKS``.
        data: folder of local files, or None for the hub.
        shots: worked examples before each question.

    Raises:
        DataUnavailableError: if a file is missing, or the hub does not deliver.
        TaskFileError: if a file is not in the documented layout.
        ConfigError: if a file has no examples for ``shots``.
    """
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    paths = {} if data is None else {name: find_file(name, data) for name in names}  # all, before one is read
    for name in names:
        if data is None:
            part = _from_hub(name)
        else:
            with _reading(_LocalFile(name, paths[name], shots)):
                part = task_manager().load([TASKS[name].harness])
        for key, content in part.items():
            loaded[key].update(content)
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(_FEWSHOT_SEED)
    return loaded


def score(lm: LM, loaded: dict[str, Any], limit: int | None = None) -> dict[str, Any]:
    """Evaluate loaded tasks.

    Args:
        lm: the model.
        loaded: from :func:`load_tasks`.
        limit: first documents of each task, or of each subject of MMLU; None for all.

    Returns:
        The harness' results: ``results``, ``groups``, ``n-samples``, ``versions``, ``configs`` and more.
    """
    # Its pool of processes for the bootstrap would be forked from a process that holds threads and a GPU.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with _quiet(), _templates_compiled_once():
        return evaluate(lm, loaded, limit=limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False)


def _from_hub(name: str) -> dict[str, Any]:
    try:
        return task_manager().load([TASKS[name].harness])
    except Exception as error:  # the clients of the hub raise errors of several libraries
        raise DataUnavailableError(
            f"the hub did not deliver {name} ({type(error).__name__}: {error}). Without a network, give a folder with local "
            "files: --data FOLDER (layout: --help)."
        ) from error


@contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """The harness compiles a prompt's Jinja template anew for each document, three quarters of the time that prompts take."""
    templates = lm_eval.utils.env
    with mock.patch.object(templates, "from_string", cache(templates.from_string)):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness' notes and its bars for building prompts, 57 for MMLU alone; what it prints goes to stderr."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr), mock.patch.object(lm_eval.api.task, "tqdm", lambda items, **options: items):
            yield
    finally:
        logger.setLevel(level)
