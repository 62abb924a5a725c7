"""Where a number comes from: machine, versions, commit. Read once a run."""

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import slope_pl

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Environment:
    """The columns of a row that are the same for a whole run."""

    gpu: str
    driver: str
    torch: str
    cuda: str
    cusparselt: str
    slope_pl: str
    commit: str

    def __str__(self) -> str:
        return (
            f"{self.gpu}, driver {self.driver}, torch {self.torch}, CUDA {self.cuda}, cuSPARSELt {self.cusparselt}, "
            f"slope_pl {self.slope_pl}, commit {self.commit}"
        )


def collect(device: torch.device) -> Environment:
    """Ask the machine."""
    cuda = device.type == "cuda"
    return Environment(
        gpu=torch.cuda.get_device_name(device) if cuda else f"CPU {platform.processor() or platform.machine()}",
        driver=_driver() if cuda else "none",
        torch=torch.__version__,
        cuda=torch.version.cuda or "none",
        cusparselt=_cusparselt(),
        slope_pl=slope_pl.__version__,
        commit=commit(),
    )


def commit() -> str:
    """The commit that runs: SLOPE_COMMIT where the code was copied without its history, else the checkout's."""
    given = os.environ.get("SLOPE_COMMIT")
    if given:
        return given
    known = _output("git", "rev-parse", "--short", "HEAD")
    if not known:
        return "unknown"
    return known + ("+dirty" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def _driver() -> str:
    text = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return text.splitlines()[0] if text else "unknown"


def _cusparselt() -> str:
    """As ``0.8.0``: torch gives major * 1000 + minor * 100 + patch."""
    number = torch.backends.cusparselt.version()
    return f"{number // 1000}.{number // 100 % 10}.{number % 100}" if number else "none"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
