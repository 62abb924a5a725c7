"""A checkpoint appears whole or not at all."""

import pytest
import torch

from slope_pl import SLoPeCallback
from slope_pl.lightning import LocalCheckpointIO
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
