"""What is left after kills and damage: the newest whole checkpoint, and a run that ends as if nothing had been."""

import errno
import logging
import os
import re
import resource
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from slope_pl import CheckpointError, SLoPeCallback, SLoPeConfig
from slope_pl.checkpoint import saved_settings
from slope_pl.checkpoint.files import appearing_whole
from slope_pl.checkpoint.whole import damage
from slope_pl.lightning import LocalCheckpointIO, last_good_checkpoint, restore
from tests.lightning.toy import QUIET, Toy, make_trainer

pytestmark = QUIET


def test_a_run_that_is_killed_again_and_again_ends_as_the_whole_one():
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.kill", "--kills", "8", "--seed", "3"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 kills" in done.stdout
    assert "difference of the final weights: 0.0" in done.stdout


def save(folder, name, age, value=1.0):
    file = folder / name
    LocalCheckpointIO().save_checkpoint({"state_dict": {"a": torch.full((1000,), value)}}, file)
    os.utime(file, (1_000_000 - age, 1_000_000 - age))
    return file


def test_the_newest_whole_one_is_taken_and_the_damaged_are_named(tmp_path, caplog):
    old, middle, new, newest = (
        save(tmp_path, f"{name}.ckpt", age) for age, name in ((9, "d"), (5, "c"), (3, "b"), (1, "a"))
    )
    assert last_good_checkpoint(tmp_path) == newest
    content = bytearray(newest.read_bytes())
    place = content.index(torch.full((1000,), 1.0).numpy().tobytes()[:64]) + 100
    content[place] ^= 1  # one bit of one weight
    newest.write_bytes(content)
    new.write_bytes(new.read_bytes()[:-200])
    middle.write_bytes(b"")
    for file, age in ((newest, 1), (new, 3), (middle, 5)):
        os.utime(file, (1_000_000 - age, 1_000_000 - age))
    damaged = torch.load(newest, weights_only=True)["state_dict"]["a"]
    assert not torch.equal(damaged, torch.ones(1000)), "torch itself does not notice"
    with caplog.at_level(logging.WARNING):
        assert last_good_checkpoint(tmp_path) == old
    assert "a.ckpt is damaged and left out: the checksum of" in caplog.text
    assert "b.ckpt is damaged" in caplog.text
    assert "c.ckpt is damaged" in caplog.text
    assert newest.exists(), "nothing is removed"


def test_a_damaged_one_that_is_asked_for_is_an_error(tmp_path):
    trainer = make_trainer(tmp_path, SLoPeCallback(SLoPeConfig()), max_steps=6, plugins=[LocalCheckpointIO()])
    trainer.fit(Toy())
    file = tmp_path / "six.ckpt"
    trainer.save_checkpoint(file)
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:  # between its entries are bytes that mean nothing
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    name, extra = (int.from_bytes(content[largest.header_offset + at :][:2], "little") for at in (26, 28))
    content[largest.header_offset + 30 + name + extra] ^= 1
    file.write_bytes(content)
    again = make_trainer(tmp_path, SLoPeCallback(SLoPeConfig()), max_steps=8, plugins=[LocalCheckpointIO()])
    with pytest.raises(CheckpointError, match=rf"{file} is damaged: the checksum of .* is wrong. Name another one"):
        again.fit(Toy(), ckpt_path=file)


class Growing(pl.Callback):
    """Checkpoints of later steps are larger, as they are once adapters have moments."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if trainer.global_step >= 8:
            checkpoint["ballast"] = torch.zeros(200_000)


@pytest.fixture
def nearly_full():
    """Files may grow to 400,000 bytes: the system refuses the next one as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_run_and_costs_no_file(tmp_path, nearly_full):
    own = tmp_path / "own"
    saver = ModelCheckpoint(dirpath=own, filename="{step}", every_n_train_steps=4)
    settings = {"enable_checkpointing": True, "plugins": [LocalCheckpointIO()]}
    trainer = make_trainer(tmp_path, SLoPeCallback(SLoPeConfig()), Growing(), saver, **settings)
    with pytest.raises(OSError, match="could not be written") as stop:
        trainer.fit(Toy())
    assert stop.value.errno == errno.EFBIG
    said = str(stop.value)
    assert f"{own / 'step=8.ckpt'} could not be written: File too large. It takes about 8" in said
    assert int(re.search(r"([\d,]+) bytes are free", said)[1].replace(",", "")) > 0
    assert [path.name for path in own.iterdir()] == ["step=4.ckpt"], "the one before is still there, nothing else is"
    again = make_trainer(tmp_path, SLoPeCallback(SLoPeConfig()), plugins=[LocalCheckpointIO()])
    again.fit(module := Toy(), ckpt_path=last_good_checkpoint(own))
    assert len(module.losses) == 16


def test_none_where_there_is_none(tmp_path):
    assert last_good_checkpoint(tmp_path / "not there") is None
    (tmp_path / "x.ckpt").write_text("no checkpoint")
    assert last_good_checkpoint(tmp_path) is None


def test_a_sharded_checkpoint_without_its_end_is_not_whole(tmp_path):
    folder = tmp_path / "step=3.ckpt"
    folder.mkdir()
    torch.save({}, folder / "meta.pt")
    assert "no .metadata" in damage(folder)
    (folder / ".metadata").write_bytes(b"x")
    assert ".metadata is damaged" in damage(folder)
    (folder / "meta.pt").write_bytes(b"cut")
    assert "meta.pt" in damage(folder)


def test_a_link_whose_target_is_gone_is_named_and_left_out(tmp_path, caplog):
    """As ``ModelCheckpoint(save_last="link")`` leaves one, if the run was killed between removing the old and linking."""
    there = save(tmp_path, "a.ckpt", 1)
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "step=2.ckpt")
    with caplog.at_level(logging.WARNING):
        assert last_good_checkpoint(tmp_path) == there
    assert f"a link to {tmp_path / 'step=2.ckpt'}, which is not there" in caplog.text


def test_training_goes_on_from_what_is_found(tmp_path):
    trainer = make_trainer(tmp_path, SLoPeCallback(SLoPeConfig()), max_steps=6, plugins=[LocalCheckpointIO()])
    trainer.fit(Toy())
    trainer.save_checkpoint(tmp_path / "six.ckpt")
    again = make_trainer(tmp_path, SLoPeCallback(SLoPeConfig()), max_steps=8)
    module = Toy()
    again.fit(module, ckpt_path=last_good_checkpoint(tmp_path))
    assert len(module.losses) == 2


# Beyond what Linux gives; of somebody else; this process, in a container that was started anew with the same numbers.
@pytest.mark.parametrize(("process", "stays"), [(2**22 + 7, False), (os.getppid(), True), (os.getpid(), False)])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_leftovers_of_dead_processes_go_those_of_living_ones_stay(tmp_path, process, stays, kind):
    left = tmp_path / f".x.ckpt.{socket.gethostname()}.{process}.unfinished"
    left.mkdir() if kind == "folder" else left.write_bytes(b"half")
    LocalCheckpointIO().save_checkpoint({}, tmp_path / "y.ckpt")
    assert left.exists() == stays


def test_what_another_thread_is_writing_stays(tmp_path):
    with appearing_whole(tmp_path / "x.ckpt") as unfinished:
        unfinished.write_bytes(b"half")
        LocalCheckpointIO().save_checkpoint({}, tmp_path / "y.ckpt")
        assert unfinished.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.ckpt", "y.ckpt"]


def test_a_folder_of_deepspeed_is_whole_once_it_says_so(tmp_path):
    parts = tmp_path / "step=3.ckpt" / "checkpoint"
    parts.mkdir(parents=True)
    for name in ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        said = {"ds_config": {"zero_optimization": {"stage": 2}}, "dp_world_size": 1, "hyper_parameters": {"rate": 1}}
        torch.save({"a": torch.ones(3), **said}, parts / name)
    assert "latest" in damage(parts.parent)
    (parts.parent / "latest").write_text("checkpoint")
    assert damage(parts.parent) is None
    assert saved_settings(parts.parent) == {"rate": 1}
    (parts / name).write_bytes((parts / name).read_bytes()[:-50])
    assert name in damage(parts.parent)
    torch.save(said | {"ds_config": "stage 2"}, parts / "mp_rank_00_model_states.pt")
    assert "does not say its stage of ZeRO" in damage(parts.parent)


def test_what_rank_zero_alone_looks_at_is_an_error_of_all(tmp_path, monkeypatch):
    """Not an exception there, for whose answer the others would wait."""
    monkeypatch.setattr(restore, "why_unreadable", lambda *_: (tmp_path / "gone").read_bytes())
    trainer = make_trainer(tmp_path, SLoPeCallback(SLoPeConfig()), max_steps=2)
    trainer.fit(Toy())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    again = make_trainer(tmp_path, SLoPeCallback(SLoPeConfig()), max_steps=3)
    told = []
    broadcast = SingleDeviceStrategy.broadcast
    monkeypatch.setattr(
        SingleDeviceStrategy, "broadcast", lambda self, obj, src=0: (told.append(obj), broadcast(self, obj, src))[1]
    )
    with pytest.raises(CheckpointError, match=r"two.ckpt cannot be read \(FileNotFoundError: "):
        again.fit(Toy(), ckpt_path=tmp_path / "two.ckpt")
    assert any("cannot be read" in str(one) for one in told)
