"""A process of several leaves with status 0 when all went well, and does not wait without end when it did not."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.distributed.processes import free_port, report_of_two

ROOT = Path(__file__).parents[2]

WHAT_IS_LEFT = """
    import atexit, sys
    from pathlib import Path
    import torch.distributed as dist
    from slope_pl import SLoPeCallback
    from slope_pl.baselines import SRSTECallback
    from slope_pl.lightning.stopping import StopOnSignal
    from tests.lightning.toy import Toy, make_trainer

    folder = Path(sys.argv[1])
    callback = {"slope": SLoPeCallback, "srste": SRSTECallback, "signals": StopOnSignal}[sys.argv[2]]()
    # The first to be registered is the last to run.
    atexit.register(lambda: (folder / "left").write_text(str(dist.is_initialized())))
    make_trainer(folder, callback, devices=1, strategy="ddp", max_steps=2).fit(Toy())
    assert dist.get_backend() == "gloo"
"""


@pytest.mark.parametrize("callback", ["slope", "srste", "signals"])
def test_no_group_is_left_when_the_interpreter_ends(tmp_path, callback):
    command = [sys.executable, "-c", textwrap.dedent(WHAT_IS_LEFT), str(tmp_path), callback]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "left").read_text() == "False"


@pytest.mark.distributed
def test_messages_under_way_abort_nobody(tmp_path):
    """One of most such pairs ends with status 134 if the groups are left to the interpreter; three show it nearly always."""
    for attempt in range(3):
        (tmp_path / str(attempt)).mkdir()
        report_of_two("tests.distributed.leaving_worker", tmp_path / str(attempt), 100, "together")


@pytest.mark.distributed
def test_a_rank_leaves_though_the_other_does_not_answer(tmp_path):
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.distributed.leaving_worker", str(tmp_path), "alone"]
    zero, one = (subprocess.Popen(command, cwd=ROOT, env=common | {"LOCAL_RANK": rank}) for rank in "01")
    try:
        zero.wait(60)
        assert (tmp_path / "rank0.pt").exists(), "it failed before it had anything to leave"
        (tmp_path / "left").touch()
        assert one.wait(60) == 0, "rank 0 left while rank 1 was still there"
    finally:
        for process in (zero, one):
            process.kill()
            process.wait()
