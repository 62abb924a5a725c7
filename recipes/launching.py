"""What the launchers and runners share: processes of a recipe, the results that they leave, and whether two agree."""

import contextlib
import gc
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from recipes import children

ROOT = Path(__file__).parent.parent
SECONDS_TO_REACH_THE_HUB = 5
_SIGNALLED = {128 + signal.SIGTERM, 128 + signal.SIGUSR1}


class RunError(RuntimeError):
    """A run failed; the message has the end of its log."""


def hub_is_reachable() -> bool:
    """Whether a connection to the hub opens within a few seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=SECONDS_TO_REACH_THE_HUB):
            return True
    except OSError:
        return False


def one_thread() -> dict[str, str]:
    """For small models: one thread where there is no GPU, unless the environment says otherwise.

    Products of this size gain little from more threads (GPT-2 tiny.yaml: 14,800 tokens/s with one, 20,300 with two), and lose
    most of their speed where other programs want the same cores (3,500 with two): threads wait for each other.
    """
    return {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}


def threads_each(processes: int) -> int:
    """Threads for each of several processes, which together take as many as this one would alone; one at least."""
    return max(1, torch.get_num_threads() // processes)


def share_of_threads(processes: int) -> dict[str, str]:
    """The environment of processes side by side, in which each takes :func:`threads_each`.

    Without it each takes all, and they wait for each other: of five that scored checkpoints on 32 cores (load 121), one was
    done after 6 minutes; with 4 threads each, four were done in 3.
    """
    if processes == 1:
        return {}
    share = str(threads_each(processes))
    return {"OMP_NUM_THREADS": share, "RAYON_NUM_THREADS": share}  # torch; tokenizers


def one_gpu(index: int) -> dict[str, str]:
    """The environment in which a process sees one GPU: the ``index``-th of those that this one sees.

    Raises:
        SystemExit: if this process sees fewer.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen is not None else [str(i) for i in range(torch.cuda.device_count())]
    if not 0 <= index < len(names):
        raise SystemExit(f"--gpus {index}: there are {len(names)} GPUs here, counted from 0")
    return {"CUDA_VISIBLE_DEVICES": names[index].strip()}


@contextlib.contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process's environment for a while."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run(recipe: str, subcommand: str, arguments: Sequence[str], defaults: Mapping[str, str]) -> int:
    """Run a recipe's own command line, shown so that it can be repeated by hand; returns its status.

    Args:
        recipe: module, as after ``python -m``.
        subcommand: ``fit`` or ``validate``.
        arguments: after it.
        defaults: of the environment; what is set there stays.
    """
    command = [sys.executable, "-m", recipe, subcommand, *arguments]
    print(f"\n$ {shlex.join(['python', *command[1:]])}", flush=True)
    return children.run(command, cwd=ROOT, env={**defaults, **os.environ})


def without_resume(arguments: list[str]) -> list[str]:
    """A command line of ``fit`` without ``--resume auto``."""
    kept, after = [], False
    for argument in arguments:
        if not after and argument != "--resume" and not argument.startswith("--resume="):
            kept.append(argument)
        after = argument == "--resume"
    return kept


def results(runs: str | Path, stage: str) -> dict[Path, int]:
    """The result files of a stage that are there, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in Path(runs).glob(f"**/result-{stage}.json")}


def newest(runs: str, stage: str, before: Mapping[Path, int]) -> Path:
    """The result file that the command just run has written; a run that was resumed writes it again."""
    written = dict(results(runs, stage).items() - before.items())
    if not written:
        raise SystemExit(
            f"The command left no result-{stage}.json under {runs}/. Move the runs with --runs, not with the logger's save_dir."
        )
    return max(written, key=lambda path: path.stat().st_mtime)


def fit(
    run_stage: Callable[[str, list[str]], int], runs: str, arguments: list[str]
) -> tuple[int, Path | None, str | None]:
    """Train; returns the status, the result file, and the checkpoint if the run wrote one."""
    before = results(runs, "fit")
    status = run_stage("fit", arguments)
    if status:
        return status, None, None
    file = newest(runs, "fit", before)
    return 0, file, json.loads(file.read_text())["checkpoint"]


def validate(
    run_stage: Callable[[str, list[str]], int], runs: str, arguments: list[str], checkpoint: str
) -> tuple[int, Path | None]:
    """Validate a checkpoint in a process of its own; returns the status and the result file."""
    before = results(runs, "validate")
    status = run_stage("validate", [*without_resume(arguments), "--ckpt_path", checkpoint])
    return status, None if status else newest(runs, "validate", before)


def same_scores(fitted: Path, validated: Path, key: str, words: tuple[str, str], digits: int) -> bool:
    """Say whether a checkpoint gives the scores that training ended with.

    Args:
        fitted: result file of the training.
        validated: of the validation.
        key: of the score to show.
        words: what it is called at the end of training, and of the checkpoint.
        digits: to show.
    """
    a, b = (json.loads(path.read_text())["scores"] for path in (fitted, validated))
    print(f"\n{words[0]} {a[key]:.{digits}f}, {words[1]} {b[key]:.{digits}f}: ", end="")
    print("the same." if a == b else "THEY DIFFER.")
    return bool(a == b)


# ---------------------------------------------------------------------------------------------------- comparisons


def train_and_read(
    recipe: str,
    main: Callable[[list[str]], Any],
    arguments: list[str],
    folder: Path,
    in_process: bool,
    defaults: Mapping[str, str],
    settings: Mapping[str, str] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Make one run of a comparison.

    Args:
        recipe: module, as after ``python -m``.
        main: its main function, for ``in_process``.
        arguments: subcommand included; logs go below ``folder``.
        folder: log.txt is written there.
        in_process: in this process, which saves the start of Python and torch.
        defaults: of the environment of a process of its own; what is set there stays.
        settings: of that environment, whatever is set there.

    Returns:
        the result file and its content.

    Raises:
        RunError: if the run failed, or did not validate its last step.
    """
    children.refuse_if_stopped()
    folder.mkdir(parents=True, exist_ok=True)
    before, log = results(folder, "fit"), folder / "log.txt"
    command = [sys.executable, "-m", recipe, *arguments]
    with log.open("w", encoding="utf-8") as stream:
        print(shlex.join(["python", *command[1:]]), file=stream, flush=True)
        if in_process:
            with children.training_here():
                status = _here(main, arguments, stream)
        else:
            environment = {**defaults, **os.environ, **(settings or {})}
            status = children.run(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    written = dict(results(folder, "fit").items() - before.items())
    if status or not written:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise RunError(f"status {status}; the end of {log}:\n{end}")
    (file,) = written
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["val_step"] != found["steps"]:
        raise RunError(f"{file}: the last validation was at step {found['val_step']} of {found['steps']}")
    return file, found


def _here(main: Callable[[list[str]], Any], arguments: list[str], stream: Any) -> int:
    with _everything_into(stream):
        try:
            with contextlib.chdir(ROOT):
                main(arguments)
            return 0
        except SystemExit as stop:
            # What was wrong with a command line stands in the log already: a traceback would push it out of the log's end.
            if stop.code in _SIGNALLED:
                raise  # this process is to end, not to begin the next run
            if isinstance(stop.code, str):
                print(stop.code)
            return 1
        except Exception:
            traceback.print_exc()
            return 1
        finally:
            # The next run begins with an empty device, and compiles anew: graphs hold on to the last run's model.
            torch.compiler.reset()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@contextlib.contextmanager
def _everything_into(stream: Any) -> Iterator[None]:
    """Python's streams, and the process's own: Lightning's log handlers keep the ones that they were made with."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            yield
    finally:
        stream.flush()
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)
