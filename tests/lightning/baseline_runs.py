"""What the tests of the baselines in a Trainer share: configs with short schedules, and a run."""

from types import SimpleNamespace

from lightning.pytorch.callbacks import ModelCheckpoint

from slope_pl.baselines import (
    FSTCallback,
    FSTConfig,
    SRSTECallback,
    SRSTEConfig,
    masked_layers,
)
from tests.lightning.toy import Toy, make_trainer

BLOCKS = ("net.blocks.*",)
SRSTE = SRSTEConfig(decay=0.01, adapter_rank=4, adapter_start_step=12)
SRSTE_SLOW = SRSTEConfig(decay=0.01, mask_refresh_steps=3, adapter_rank=4, adapter_start_step=12)
FST = FSTConfig(targets=BLOCKS, decay=0.01, mask_refresh_steps=5, dense_finish_step=14)
ALL = {"srste": SRSTE, "srste_slow": SRSTE_SLOW, "fst": FST}


def callback_of(config):
    return SRSTECallback(config) if isinstance(config, SRSTEConfig) else FSTCallback(config)


def fit(tmp_path, config, module=None, *callbacks, ckpt_path=None, **settings):
    module, callback = Toy() if module is None else module, callback_of(config)
    trainer = make_trainer(tmp_path, callback, *callbacks, **settings)
    trainer.fit(module, ckpt_path=ckpt_path)
    return SimpleNamespace(module=module, trainer=trainer, callback=callback, layers=masked_layers(module))


def saver(folder):
    return ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
