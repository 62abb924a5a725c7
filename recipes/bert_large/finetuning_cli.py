"""What the command lines of SQuAD and GLUE share."""

from typing import Any

from recipes.cli import RecipeCLI


class FineTuningCLI(RecipeCLI):
    """With the first stage of a gradual start, which is a dense run although it names masks."""

    silent = ("weights", "bert", "encoder")

    @staticmethod
    def kind(settings: dict[str, Any]) -> str:
        """What a model with these settings is called."""
        return "dense" if settings.get("slope") is None or settings.get("fade") is not None else "2:4 sparse"
