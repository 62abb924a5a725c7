"""A run whose file system fills up: an error that says so, and the checkpoint before it whole.

    unshare -rm sh -c "mount -t tmpfs -o size=400k tmpfs FOLDER && python -m tests.faults.full_disk FOLDER"

Prints the error and what is left in the folder; the exit status is 1 if no save failed, or none that is left is whole.
"""

import sys
import warnings
from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint

from slope_pl import SLoPeCallback, SLoPeConfig
from slope_pl.lightning import LocalCheckpointIO, last_good_checkpoint
from tests.lightning.toy import Toy, make_trainer


def main(folder: Path) -> int:
    """Save after every step, and keep everything, until nothing more fits."""
    warnings.simplefilter("ignore")
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    settings = {"enable_checkpointing": True, "plugins": [LocalCheckpointIO()], "max_steps": 1000}
    try:
        make_trainer(folder, SLoPeCallback(SLoPeConfig()), saver, **settings).fit(Toy())
    except OSError as error:
        print(f"{type(error).__name__}: {error}")
    else:
        return 1
    left = last_good_checkpoint(folder)
    print(f"{len(list(folder.iterdir()))} files are left, the newest whole one is {left}")
    return int(left is None)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
