"""The same GPT-2 run under every strategy, by one process and by several: time of a step, memory, and the same loss.

    python -m recipes.gpt2.strategies --csv my.csv --data FOLDER --devices 1 2
    python -m recipes.gpt2.strategies --csv my.csv --report

Each run is one of the recipe's own command line, with re-setups on the way and adapters that wake before its end; one process a
GPU, each with the config's batch. What is in the file is not made again. Options that are not this runner's own go to every
run (--model.size medium). Without a GPU, or a text, it is tiny.yaml on the bundled stories.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from recipes.children import answering_signals
from recipes.gpt2.compare import train
from recipes.gpt2.launch import data_arguments
from recipes.gpt2.ledger import Result, append_curve, read
from recipes.gpt2.plans import Plan
from recipes.launching import RunError
from recipes.ledger import append_row

FAMILY, DEVICES = "strategies", "--trainer.devices"
SINGLE = "single device"
UNCHECKED = "ZeRO-2 unchecked"
_OF_ZERO2 = {
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 2},
    # DeepSpeed 0.19 looks at each gradient by itself after bf16 steps, in a dozen launches.
    "bf16": {"enabled": True, "check_grad_overflow": False},
}
STRATEGIES = {
    SINGLE: "slope",
    "DDP": "slope_ddp",
    "FSDP2": "slope_fsdp2",
    "ZeRO-1": "slope_deepspeed_stage_1",
    "ZeRO-2": "slope_deepspeed_stage_2",
    UNCHECKED: "slope_pl.SLoPeDeepSpeedStrategy",
    "ZeRO-3": "slope_deepspeed_stage_3",
}
FSDP2 = "lightning.pytorch.strategies.ModelParallelStrategy"
DENSE = {
    SINGLE: "auto",
    "DDP": "ddp",
    "FSDP2": FSDP2,
    "ZeRO-1": "deepspeed_stage_1",
    "ZeRO-2": "deepspeed_stage_2",
    "ZeRO-3": "deepspeed_stage_3",
}
HEADER = (
    "| strategy | processes | ms a step | to one device | tokens/s | peak GiB | validation loss | re-setups, wake |\n"
    "|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        strategy: a key of :data:`STRATEGIES`.
        devices: number of processes.
        dense: the dense sibling, under Lightning's own strategy.
        compiled: whether the step is.
    """

    strategy: str
    devices: int
    dense: bool = False
    compiled: bool = True

    @property
    def method(self) -> str:
        """The name of the row, without the number of processes."""
        return f"{'dense, ' if self.dense else ''}{self.strategy}{'' if self.compiled else ', eager'}"

    def settings(self, config: str, steps: int) -> str:
        """Config and arguments of the run."""
        names = DENSE if self.dense else STRATEGIES
        parts = [_dense_sibling(config) if self.dense else config]
        parts += ["--trainer.strategy", names[self.strategy], DEVICES, str(self.devices)]
        if names[self.strategy] == FSDP2:
            parts += ["--trainer.strategy.data_parallel_size", str(self.devices)]
            parts += ["--trainer.strategy.tensor_parallel_size", "1"]
        if self.strategy == UNCHECKED:
            parts += ["--trainer.strategy.deepspeed_config", json.dumps(_OF_ZERO2)]
        parts += ["--model.compile", str(self.compiled).lower(), "--model.warmup", "0.1"]
        parts += ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
        if not self.dense:
            parts += ["--model.slope.adapter_rank", "16", "--model.slope.adapter_start", "0.75"]
            parts += ["--model.slope.backward_refresh_steps", str(steps // 3)]
        return shlex.join(parts)


def _dense_sibling(config: str) -> str:
    """novels_slope.yaml has novels_dense.yaml, tiny.yaml has tiny_dense.yaml."""
    return f"{config.removesuffix('.yaml').removesuffix('_slope')}_dense.yaml"


def main(arguments: list[str] | None = None) -> int:
    """Make the runs that are missing, then report; exit status 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.gpt2.strategies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--csv", type=Path, required=True, help="results; curves go into a second file beside it")
    add("--report", action="store_true", help="only the table of what is in the file")
    add(
        "--devices",
        nargs="+",
        type=int,
        default=[1],
        help="numbers of processes; one device alone is always in the table",
    )
    add("--strategies", nargs="+", choices=[*STRATEGIES], default=[*STRATEGIES], help="default: all")
    add("--eager", nargs="*", choices=[*STRATEGIES], default=[], help="strategies to run without torch.compile, too")
    add("--dense", nargs="*", choices=[*DENSE], default=[], help="strategies to run dense, too")
    add("--steps", type=int, default=160, help="of each run; adapters wake after three quarters of them")
    add("--rate", type=float, default=1.8e-3, help="peak of the learning rate")
    add("--seed", type=int, default=0, help="of weights and order of the data")
    add("--data", help="a text: file or folder; default: the novels of SLOPE_DATA_DIR")
    add("--tokenizer", help="default: GPT-2's, of SLOPE_DATA_DIR or from the hub")
    add("--runs", type=Path, default=Path("runs/gpt2-strategies"), help="logs")
    options, overrides = parser.parse_known_args(arguments)
    if options.report:
        if overrides:
            parser.error(f"unknown arguments of --report: {' '.join(overrides)}")
        print(report(read(options.csv)))
        return 0
    if options.steps < 8:
        parser.error(f"--steps {options.steps}: 8 or more are expected, for re-setups and a wake on the way")
    options.at = options.rate, options.seed
    options.in_process, options.checkpoints, options.trace_adapters, options.curve_every = False, False, False, 1
    failed = _run_all(options, overrides)
    print(report(read(options.csv)))
    return min(len(failed), 1)


def wanted(options: argparse.Namespace) -> list[Setting]:
    """The runs asked for; what others are compared with comes first."""
    kinds = [(options.strategies, {}), (options.eager, {"compiled": False}), (options.dense, {"dense": True})]
    found = [Setting(SINGLE, 1, **kind) for names, kind in kinds if names]
    for devices in options.devices:
        found += [Setting(name, devices, **kind) for names, kind in kinds for name in names if name != SINGLE]
    return found


def _run_all(options: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """Make the runs that are missing; the names of those that failed."""
    location = data_arguments(options.data, options.tokenizer)
    real = bool(location) and torch.cuda.is_available()
    config = "novels_slope.yaml" if real else "tiny.yaml"
    if not real and options.data is None:
        location = []  # the bundled stories
    plans = [
        Plan(
            FAMILY,
            setting.method,
            f"{setting.settings(config, options.steps)} {shlex.join(overrides)}".strip(),
            *options.at,
        )
        for setting in wanted(options)
    ]
    done, failed = {(r.settings, r.rate, r.seed) for r in read(options.csv)}, []
    missing = [plan for plan in plans if plan.key not in done]
    print(f"{config}: {len(plans)} runs, {len(plans) - len(missing)} of them done.", flush=True)
    for plan in missing:
        label = f"{plan.method}, by {_devices(plan.settings)}"
        try:
            result, curve, _ = train(plan, location, options, {})
        except RunError as error:
            failed.append(label)
            print(f"{label} FAILED: {error}", flush=True)
            continue
        append_curve(options.csv, curve)
        append_row(options.csv, result)
        print(f"{label}: {result.tokens_per_second:,.0f} tokens/s, {result.seconds:.0f} s", flush=True)
    if failed:
        print(f"{len(failed)} runs failed: {'; '.join(failed)}. The same command makes them again.")
    return failed


def report(results: Sequence[Result]) -> str:
    """The table, as Markdown; the time of a step against the mean of those on one device, of the same kind (dense, eager)."""
    if not results:
        return "No results yet."
    times: dict[str, list[float]] = defaultdict(list)
    for result in results:
        if SINGLE in result.method:
            times[result.method].append(_ms(result))
    alone = {method: statistics.mean(found) for method, found in times.items()}
    lines = [HEADER]
    for result in results:
        strategy = max((name for name in STRATEGIES if name in result.method), key=len)
        base = alone.get(result.method.replace(strategy, SINGLE), math.nan)
        events = f"{result.resetups}, step {result.switched_at_step}" if result.switched_at_step >= 0 else "-"
        lines.append(
            f"| {result.method} | {_devices(result.settings)} | {_ms(result):.1f} | {_ms(result) / base:.3f} | "
            f"{result.tokens_per_second:,.0f} | {result.peak_bytes / 2**30:.2f} | {result.val_loss:.4f} | {events} |"
        )
    notes = [f"{results[0].steps:,} steps. "]
    notes += [
        f"{name.capitalize()}: {', '.join(dict.fromkeys(getattr(result, name) for result in results))}. "
        for name in ("gpu", "torch", "commit", "text")
    ]
    return "\n".join([*lines, "", "".join(notes).strip()])


def _devices(settings: str) -> int:
    words = shlex.split(settings)
    return int(words[words.index(DEVICES) + 1])


def _ms(result: Result) -> float:
    """Milliseconds of a step, from the median of the speed."""
    return 1e3 * result.tokens / result.steps / result.tokens_per_second


if __name__ == "__main__":
    sys.exit(answering_signals(main))
