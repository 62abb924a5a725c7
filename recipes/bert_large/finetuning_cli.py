"""What the command lines of SQuAD and GLUE share."""

import itertools
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import Tensor

from recipes.cli import RecipeCLI
from slope_pl.lightning.agreement import Agreement

Outputs = list[dict[str, Tensor]]


class FineTuningCLI(RecipeCLI, ABC):
    """With the first stage of a gradual start, which is a dense run although it names masks."""

    silent = ("weights", "bert", "encoder")

    @staticmethod
    def kind(settings: dict[str, Any]) -> str:
        """What a model with these settings is called."""
        return "dense" if settings.get("slope") is None or settings.get("fade") is not None else "2:4 sparse"

    def after_predict(self) -> None:
        """Write the answers of all ranks, on one."""
        found = self.trainer.predict_loop.predictions
        loaders = self.trainer.predict_dataloaders
        one_set = not isinstance(loaders, list) or len(loaders) == 1  # Lightning then leaves the outer list out
        own = [
            [{key: tensor.cpu() for key, tensor in batch.items()} for batch in batches]
            for batches in ([found] if one_set else found)
        ]
        agreement = Agreement()
        agreement.begin()
        ranks: list[list[Outputs]] = agreement.gather(own)
        agreement.end()
        folder = Path(
            self.trainer.log_dir or self.trainer.default_root_dir
        )  # on every rank: they agree on it by talking
        if self.trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            self.write_answers([list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)], folder)

    @abstractmethod
    def write_answers(self, sets: list[Outputs], folder: Path) -> None:
        """Write the outputs for each evaluation set, in any order and some twice, into a folder that is there."""
