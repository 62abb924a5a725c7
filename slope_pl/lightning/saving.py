"""Checkpoints that are folders, FSDP2's and DeepSpeed's, written whole or not at all.

Lightning's strategies write into the final folder. Where one is there already, as ``last.ckpt`` at the end of each epoch, a
kill in the middle would leave parts of both, which look like one.
"""

from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch.distributed.checkpoint import CheckpointException

from slope_pl.checkpoint.files import not_written, put_in_place, remove, unfinished_beside
from slope_pl.lightning.checkpoint_io import refuse_other_folder


def save_folders_whole(strategy: Any) -> None:
    """Let a strategy write a folder beside the final one, which takes its place once every rank is through.

    Args:
        strategy: the Trainer's; of FSDP2 and DeepSpeed, Lightning's or ours, ``save_checkpoint`` is replaced, on the instance.
            Where DeepSpeed's ``use_node_local_storage`` gives each machine a folder of its own, its way is kept.
    """
    if not isinstance(strategy, DeepSpeedStrategy | ModelParallelStrategy):
        return
    save: Any = type(strategy).save_checkpoint
    in_one_file = isinstance(strategy, ModelParallelStrategy) and not strategy._save_distributed_checkpoint

    def on_rank_zero(task: Any, *paths: Path) -> Any:
        """What the task returns there; an error of it is one of all ranks."""
        result: Any = None
        if strategy.is_global_zero:
            try:
                result = task(*paths)
            except OSError as error:
                result = error
        result = strategy.broadcast(result)
        if isinstance(result, OSError):
            raise result
        return result

    def save_checkpoint(checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        final = Path(strategy.broadcast(filepath))
        elsewhere = storage_options is not None or bool(urlparse(str(filepath)).scheme) or _on_each_machine(strategy)
        if elsewhere or (in_one_file and not on_rank_zero(Path.is_dir, final)):
            save(strategy, checkpoint, filepath, storage_options)
            return
        on_rank_zero(refuse_other_folder, final)
        unfinished = on_rank_zero(unfinished_beside, final)
        try:
            save(strategy, checkpoint, unfinished)
        except (Exception, CheckpointException) as error:
            if strategy.is_global_zero:
                remove(unfinished)
            told = not_written(final, error)
            if told is None:
                raise
            raise told from error
        strategy.barrier("SLoPe: the parts of a checkpoint")
        on_rank_zero(put_in_place, unfinished, final)

    strategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]


def _on_each_machine(strategy: Any) -> bool:
    config = strategy.config if isinstance(strategy, DeepSpeedStrategy) else None
    return isinstance(config, dict) and bool(config.get("checkpoint", {}).get("use_node_local_storage"))
