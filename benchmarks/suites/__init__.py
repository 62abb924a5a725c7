"""The suites by name. Each module has ``cases(options)``, what it measures in order."""

from collections.abc import Callable

from benchmarks.options import Options
from benchmarks.suites import adapters, blocks, decode, host, layers, memory, peers, prefill, refresh, steps, tiling
from benchmarks.suites.case import Case

SUITES: dict[str, Callable[[Options], list[Case]]] = {
    "layers": layers.cases,
    "host": host.cases,
    "refresh": refresh.cases,
    "adapters": adapters.cases,
    "decode": decode.cases,
    "tiling": tiling.cases,
    "blocks": blocks.cases,
    "peers": peers.cases,
    "steps": steps.cases,  # after blocks and peers: it records refreshes in graphs, after which layers trust nothing
    "memory": memory.cases,
    "prefill": prefill.cases,
}

COMPILED = ("blocks", "steps", "memory", "prefill", "peers")
"""Those that run torch.compile."""

__all__ = ["COMPILED", "SUITES", "Case"]
