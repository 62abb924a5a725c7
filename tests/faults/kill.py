"""A training run that is killed again and again must end as the one that never was.

    python -m tests.faults.kill --kills 100

Each attempt is a forked process that goes on from the newest whole checkpoint. Half of the kills come within a save, the
others anywhere. Prints what happened; the exit status is 1 if the final weights differ.
"""

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from slope_pl import SLoPeCallback
from slope_pl.lightning import LocalCheckpointIO, last_good_checkpoint
from tests.lightning.toy import CONFIG, Net, Toy, make_trainer

STEPS = 40


class Dropping(Toy):
    """Draws random numbers in every step, and is slow enough to be hit anywhere."""

    def __init__(self, seed, pause):
        net = Net(seed)
        net.blocks[0] = torch.nn.Sequential(net.blocks[0], torch.nn.Dropout(0.2))
        super().__init__(net)
        self.pause = pause

    def training_step(self, batch, batch_idx):
        time.sleep(self.pause)
        return super().training_step(batch, batch_idx)


class Announcing(LocalCheckpointIO):
    """Tells the parent when a save begins, and takes its time over it."""

    def __init__(self, pipe):
        self.pipe = pipe

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        os.write(self.pipe, b"s")
        super().save_checkpoint(checkpoint, path, storage_options)


def train(folder, pipe, seed, pause):
    """One attempt, to the end if nobody kills it; a run that goes on must not depend on the seed."""
    checkpoint = last_good_checkpoint(folder)
    seed = 0 if checkpoint is None else seed
    torch.manual_seed(seed)
    saver = ModelCheckpoint(
        dirpath=folder, filename="{step}", save_top_k=3, monitor="step", mode="max", every_n_train_steps=1
    )
    trainer = make_trainer(
        folder, SLoPeCallback(CONFIG), saver, enable_checkpointing=True, max_steps=STEPS, plugins=[Announcing(pipe)]
    )
    module = Dropping(seed, pause)
    trainer.fit(module, ckpt_path=checkpoint)
    torch.save(module.state_dict(), folder / "final.pt")


def attempt(folder, seed, pause):
    """Fork one; returns its process and the pipe on which it announces saves."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    status = 1
    try:
        os.close(read)
        log = os.open(folder.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        train(folder, write, seed, pause)
        status = 0
    finally:
        os._exit(status)


def killed_run(folder, kills, rng):
    """Kill until the number is reached, then let it end; returns how many kills came within a save."""
    within, done = 0, 0
    while done < kills:
        before = set(folder.glob(".*.unfinished"))
        child, pipe = attempt(folder, rng.randrange(1 << 30), 0.002)
        in_save = done % 2 == 0
        if in_save:
            for _ in range(rng.randrange(1, 4)):
                if not os.read(pipe, 1):
                    break
            time.sleep(rng.random() * 0.002)
        else:
            os.read(pipe, 1)
            time.sleep(rng.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(pipe)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                raise SystemExit("an attempt failed:\n" + (folder.parent / "log.txt").read_text()[-3000:])
            for file in folder.glob("*"):  # it had ended before the kill came: begin another run
                file.unlink()
            continue
        done += 1
        within += bool(set(folder.glob(".*.unfinished")) - before)
    child, pipe = attempt(folder, 1, 0.0)
    _, status = os.waitpid(child, 0)
    os.close(pipe)
    if status:
        raise SystemExit("the last attempt failed:\n" + (folder.parent / "log.txt").read_text()[-3000:])
    return within


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # forks with threads hang
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        whole, hit = Path(name) / "whole" / "run", Path(name) / "hit" / "run"
        for folder in (whole, hit):
            folder.mkdir(parents=True)
        child, pipe = attempt(whole, 0, 0.0)
        assert os.waitpid(child, 0)[1] == 0, (whole.parent / "log.txt").read_text()[-3000:]
        os.close(pipe)
        began = time.perf_counter()
        within = killed_run(hit, options.kills, rng)
        a, b = (torch.load(folder / "final.pt", weights_only=True) for folder in (whole, hit))
        worst = max((a[key].double() - b[key].double()).abs().max().item() for key in a)
    print(
        f"{options.kills} kills, {within} of them within a save, in {time.perf_counter() - began:.0f} s; largest difference "
        f"of the final weights: {worst}"
    )
    return int(worst != 0)


if __name__ == "__main__":
    sys.exit(main())
