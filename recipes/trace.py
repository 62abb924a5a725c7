"""Where a training run's time goes, on the host and on the device: a callback for any recipe.

    --trainer.callbacks '[recipes.trace.Trace]'
    --trainer.callbacks '[{class_path: recipes.trace.Trace, init_args: {first: 40, folder: traces}}]'

Torch's profiler slows the host down: compare shares and counts, and take times of steps from a run without it.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger(__name__)
WIDTH = 90


class Trace(pl.Callback):
    """Records some optimizer steps of rank 0, and writes ``trace.txt`` (tables) and ``trace.json.gz`` (for a viewer).

    Args:
        first: optimizer steps to leave out before: compilation, first uses.
        steps: optimizer steps to record.
        folder: for the two files; default: the Trainer's root.
        rows: of each table.
    """

    def __init__(self, first: int = 20, steps: int = 3, folder: str | None = None, rows: int = 40) -> None:
        if first < 1 or steps < 1:
            raise ValueError(f"Trace(first={first}, steps={steps}): 1 or more of each is expected")
        self.first, self.steps, self.folder, self.rows = first, steps, folder, rows
        self._profiler: profile | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so at once if the run is too short to be recorded."""
        if 0 < trainer.estimated_stepping_batches < self.first + self.steps:
            raise ValueError(
                f"Trace(first={self.first}, steps={self.steps}): {self.first + self.steps} steps or more are expected, "
                f"the run has {trainer.estimated_stepping_batches}; give Trace a smaller first"
            )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Begin."""
        if self._profiler is None and trainer.is_global_zero and trainer.global_step == self.first:
            activities = [ProfilerActivity.CPU]
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """End, and write."""
        if self._profiler is None or trainer.global_step < self.first + self.steps:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self._profiler.stop()
        folder = Path(self.folder or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trace.txt").write_text(tables(self._profiler, self.steps, self.rows))
        self._profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        log.info("Steps %d to %d: %s", self.first, self.first + self.steps - 1, folder / "trace.txt")
        self._profiler = None
        self.first = -1  # once


def tables(recorded: profile, steps: int, rows: int) -> str:
    """Host, by what an operator does itself; device, by kernel; and how long the device had nothing to do."""
    events = recorded.events()
    assert events is not None
    host, device = defaultdict(lambda: [0.0, 0]), defaultdict(lambda: [0.0, 0])  # type: ignore[var-annotated]
    spans, wall = [], (float("inf"), 0.0)
    for event in events:
        began, ended = event.time_range.start, event.time_range.end
        wall = min(wall[0], began), max(wall[1], ended)
        on_host = event.device_type == torch.autograd.DeviceType.CPU
        if event.is_user_annotation and not on_host:
            continue  # a span of the host, drawn over its kernels
        entry = (host if on_host else device)[event.name]
        entry[0] += event.self_cpu_time_total if on_host else ended - began
        entry[1] += 1
        if not on_host:
            spans.append((began, ended))
    per = 1e3 * steps
    lines = [f"{(wall[1] - wall[0]) / per:.2f} ms a step, under the profiler; device busy {busy(spans) / per:.2f} ms"]
    for name, found in (("device", device), ("host, itself", host)):
        lines += ["", f"{name}: ms a step, times a step"]
        for key, (time, count) in sorted(found.items(), key=lambda item: -item[1][0])[:rows]:
            lines.append(f"{time / per:9.3f} {count / steps:7.1f}x  {key[:WIDTH]}")
    return "\n".join(lines) + "\n"


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, end))
        end = max(end, ended)
    return total
