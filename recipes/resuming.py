"""``fit --resume auto``: which checkpoint a run goes on from, the same on all ranks.

A run is known by its folder and its settings. The folder is that of the logger, ``save_dir/name``, or ``save_dir/name/version``
where a version is given; a new start of the same command would make a new version, so the one that goes on stays in the version
of its checkpoint. The settings are ``model``, ``data`` and ``seed_everything`` in the config.yaml that every run leaves: the
same command, started again by SLURM or torchrun, is the same run, and a neighbour with another rate is not. What belongs
to the trainer (devices, callbacks, the number of steps) may change on the way.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from torch.distributed import TCPStore

from slope_pl import CheckpointError, ConfigError
from slope_pl.checkpoint.convert import read_rest
from slope_pl.checkpoint.whole import damage
from slope_pl.lightning.resume import newest_first

CONFIG = "config.yaml"
RESUMED_CONFIG = "config_resumed.yaml"
_SETTINGS = ("model", "data", "seed_everything")
_LOGGERS = ("TensorBoardLogger", "CSVLogger")
_MOST_NAMED = 3
_TO_MEET, _TO_READ = timedelta(minutes=5), timedelta(minutes=30)  # all of a large checkpoint is read
_stores: list[TCPStore] = []  # rank 0's has to live until the last rank has asked


@dataclass
class Choice:
    """What a run goes on from.

    Attributes:
        checkpoint: path; None to begin anew.
        version: name of the logger's folder that it goes on in; None for a new one.
        lines: what to tell the user.
    """

    checkpoint: str | None = None
    version: str | None = None
    lines: list[str] = field(default_factory=list)


def choose(trainer: Mapping[str, Any], settings: Mapping[str, Any]) -> Choice:
    """Look for the newest whole checkpoint of a run.

    Args:
        trainer: section of the config.
        settings: ``model``, ``data`` and ``seed_everything``, as config.yaml has them.

    Raises:
        ConfigError: if nothing says where the run's folder is.
    """
    folder, versioned = run_folder(trainer)
    found, others = Choice(), set()
    for path, home, named in _newest_first(folder, trainer):
        other = None if named else "no config.yaml above it says which"
        if home is not None:
            other = _difference(home / CONFIG, settings)
        if other is not None:
            if home not in others:  # one line a run
                found.lines.append(f"--resume auto: {path} is of another run and left out: {other}")
            others.add(home)
        elif (reason := damage(path)) is not None:
            found.lines.append(f"--resume auto: {path} IS DAMAGED and left out: {reason}")
        elif _holds_weights_alone(path):
            found.lines.append(f"--resume auto: {path} holds weights alone (save_weights_only) and is left out")
        else:
            found.checkpoint = str(path)
            found.version = home.name if versioned and home is not None and home.parent == folder else None
            found.lines.append(f"--resume auto: going on from {path}")
            return found
    found.lines.append(f"--resume auto: no whole checkpoint of this run below {folder}: IT BEGINS ANEW")
    return found


def run_folder(trainer: Mapping[str, Any]) -> tuple[Path, bool]:
    """Where a run's checkpoints lie.

    Returns:
        the folder, and whether each start of the run would make a new version below it.

    Raises:
        ConfigError: if the configuration does not say.
    """
    logger = trainer.get("logger")
    logger = logger[0] if isinstance(logger, list) and logger else logger
    root = trainer.get("default_root_dir")
    if isinstance(logger, Mapping):
        name, options = str(logger["class_path"]).rpartition(".")[2], logger.get("init_args") or {}
        save_dir = options.get("save_dir") or root
        if name in _LOGGERS and save_dir:
            folder = Path(save_dir) / (options.get("name") or "")
            version = options.get("version")
            if version is None:
                return folder, True
            return folder / (version if isinstance(version, str) else f"version_{version}"), False
    elif root:
        return Path(root), False
    raise ConfigError(
        "--resume auto does not know this run's folder: give trainer.logger a TensorBoardLogger or CSVLogger with a save_dir, "
        "or trainer.default_root_dir where there is no logger; or name a checkpoint with --ckpt_path"
    )


def _newest_first(folder: Path, trainer: Mapping[str, Any]) -> Iterator[tuple[Path, Path | None, bool]]:
    """Checkpoints, the folder of the run that each is of, and whether the configuration names a folder that it lies in."""
    given = [
        (cb.get("init_args") or {}).get("dirpath") for cb in trainer.get("callbacks") or [] if isinstance(cb, Mapping)
    ]
    found = {}
    for root, named in ((folder, False), *((Path(path), True) for path in given if path)):
        for path in root.glob("**/*.ckpt"):
            above = [parent for parent in path.parents if parent == root or root in parent.parents]
            home = next((parent for parent in above if (parent / CONFIG).is_file()), None)
            found[path] = (home, named)
    yield from ((path, *found[path]) for path in newest_first(found))


def _difference(config: Path, settings: Mapping[str, Any]) -> str | None:
    """How a run's settings differ from these, or None."""
    theirs = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    ours = dict(_leaves({key: settings.get(key) for key in _SETTINGS}))
    own = dict(_leaves({key: theirs.get(key) for key in _SETTINGS}))
    keys = [key for key in {**own, **ours} if own.get(key) != ours.get(key)]
    if not keys:
        return None
    told = [f"{key} = {own.get(key)} there, {ours.get(key)} here" for key in keys[:_MOST_NAMED]]
    return "; ".join(told) + (f"; and {len(keys) - _MOST_NAMED} more" if len(keys) > _MOST_NAMED else "")


def _holds_weights_alone(path: Path) -> bool:
    try:
        return "loops" not in read_rest(path)
    except CheckpointError:  # of a newer version, say: chosen, so that it is an error and not an older one's turn
        return False


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


# ---------------------------------------------------------------------------------------------------- all ranks


def decided_by_rank_zero(decide: Callable[[], Choice], num_nodes: int) -> Choice:
    """What rank 0 decides, on every rank.

    Checkpoints are chosen before the model is made, and so before ranks know each other: they meet at the address that their
    launcher gives them. Ranks that Lightning starts itself are no concern: they get the command line of the process that
    starts them, in which the choice is made.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True) and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]):
        raise ConfigError(
            "torchrun --max-restarts, all starts with one store: a restarted process finds the addresses of dead ones in it, "
            "and waits for them (torch 2.13). Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and use torchrun --standalone, or "
            "--rdzv-backend c10d on several machines; or leave --max-restarts out"
        )
    rank, address, port = _place(num_nodes)
    if rank is None:
        return decide()
    # The same server that torch.distributed will ask for at this port, or the launcher's own.
    ours = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    store = TCPStore(address, port, None, ours, _TO_MEET, wait_for_workers=False, multi_tenant=True)
    store.set_timeout(_TO_READ)
    _stores.append(store)
    key = f"slope_pl/resume/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if rank == 0:
        try:
            choice = decide()
        except Exception as error:
            store.set(key, json.dumps({"error": str(error)}))
            raise
        store.set(key, json.dumps(vars(choice)))
        return choice
    told = json.loads(store.get(key))
    if "error" in told:
        raise ConfigError(f"rank 0 could not choose a checkpoint: {told['error']}")
    return Choice(**told)


def _place(num_nodes: int) -> tuple[int | None, str, int]:
    """Rank, address and port of this process; no rank where it is alone."""
    kinds: tuple[type[ClusterEnvironment], ...] = (
        TorchElasticEnvironment,
        SLURMEnvironment,
        LSFEnvironment,
        MPIEnvironment,
    )
    for kind in kinds:  # in Lightning's order
        if kind.detect():
            environment = kind()
            alone = environment.world_size() == 1
            return None if alone else environment.global_rank(), environment.main_address, environment.main_port
    by_hand = "LOCAL_RANK" in os.environ and "MASTER_PORT" in os.environ
    if not by_hand and num_nodes == 1:
        return None, "", 0
    place = int(os.environ.get("LOCAL_RANK", 0)) + int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", 0)))
    return place, os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", 0))
