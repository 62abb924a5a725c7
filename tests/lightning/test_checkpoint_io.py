"""A checkpoint appears whole or not at all."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

from slope_pl import SLoPeCallback, SLoPeDeepSpeedStrategy
from slope_pl.checkpoint.files import put_in_place
from slope_pl.lightning import LocalCheckpointIO, last_good_checkpoint
from slope_pl.lightning.saving import save_folders_whole
from tests.lightning.toy import CONFIG, QUIET, Toy, assert_same, make_trainer

pytestmark = QUIET


class Unwritable:
    """Fails when it is pickled, in the middle of the file."""

    def __reduce__(self):
        raise OSError("No space left on device")


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path):
    file = tmp_path / "folder" / "last.ckpt"
    LocalCheckpointIO().save_checkpoint({"a": torch.ones(3)}, file)
    with pytest.raises(OSError, match="No space left"):
        LocalCheckpointIO().save_checkpoint({"a": torch.zeros(3), "b": Unwritable()}, file)
    assert torch.equal(torch.load(file, weights_only=True)["a"], torch.ones(3))
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


def test_a_trainer_saves_and_resumes_through_it(tmp_path):
    module = Toy()
    trainer = make_trainer(tmp_path, SLoPeCallback(CONFIG), plugins=[LocalCheckpointIO()])
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = Toy()
    make_trainer(tmp_path, SLoPeCallback(CONFIG)).validate(again, ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert_same(again.state_dict(), module.state_dict())
    assert isinstance(trainer.strategy.checkpoint_io, LocalCheckpointIO)


def test_the_final_file_is_replaced_and_never_rewritten(tmp_path):
    """Who has the old file open reads it to its end: a kill at any moment finds one of the two, whole."""
    file = tmp_path / "last.ckpt"
    LocalCheckpointIO().save_checkpoint({"a": torch.ones(1000)}, file)
    content, number = file.read_bytes(), file.stat().st_ino
    with file.open("rb") as stream:
        LocalCheckpointIO().save_checkpoint({"a": torch.zeros(1000)}, file)
        assert stream.read() == content
    assert file.stat().st_ino != number
    assert torch.equal(torch.load(file, weights_only=True)["a"], torch.zeros(1000))


def test_a_kill_between_two_folders_leaves_the_old_one_to_be_found(tmp_path, monkeypatch):
    old, new = tmp_path / "last.ckpt", tmp_path / ".unfinished"
    for folder, size in ((old, 1), (new, 2)):
        (folder / "checkpoint").mkdir(parents=True)
        said = {"ds_config": {"zero_optimization": {"stage": 2}}, "dp_world_size": 1, "a": torch.ones(size)}
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
            torch.save(said, folder / "checkpoint" / name)
        (folder / "latest").write_text("checkpoint")
    rename, moments = Path.rename, []

    def renamed(path, target):
        moments.append(last_good_checkpoint(tmp_path).name)
        done = rename(path, target)
        moments.append(last_good_checkpoint(tmp_path).name)
        return done

    monkeypatch.setattr(Path, "rename", renamed)
    put_in_place(new, old)
    assert moments == ["last.ckpt", "last-replaced.ckpt", "last-replaced.ckpt", "last.ckpt"]
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert (torch.load(old / "checkpoint" / name, weights_only=True)["a"]).numel() == 2


def test_a_file_takes_the_place_of_a_folder_that_is_a_checkpoint(tmp_path):
    """A run that goes on under another strategy saves ``last.ckpt`` once more."""
    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    torch.save({}, folder / "meta.pt")
    LocalCheckpointIO().save_checkpoint({"a": torch.ones(3)}, folder)
    assert torch.equal(torch.load(folder, weights_only=True)["a"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    (tmp_path / "other" / "notes").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="other is a folder that holds notes, and no checkpoint: it stays"):
        LocalCheckpointIO().save_checkpoint({"a": torch.ones(3)}, tmp_path / "other")


def test_folders_on_each_machines_own_disk_are_left_to_deepspeed(tmp_path, monkeypatch):
    """One rank could not rename those of the other machines."""
    written = []
    monkeypatch.setattr(DeepSpeedStrategy, "save_checkpoint", lambda self, content, path, options: written.append(path))
    monkeypatch.setattr(DeepSpeedStrategy, "broadcast", lambda self, obj, src=0: obj)
    own = {"zero_optimization": {"stage": 2}, "checkpoint": {"use_node_local_storage": True}}
    strategy = SLoPeDeepSpeedStrategy(deepspeed_config=own)
    save_folders_whole(strategy)
    strategy.save_checkpoint({}, tmp_path / "last.ckpt")
    assert written == [tmp_path / "last.ckpt"]
