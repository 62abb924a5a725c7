"""Data modules of the recipes."""

from slope_pl.data.squad import Answer, DataUnavailableError, SquadExample, SquadFormatError, read_squad
from slope_pl.data.squad_datamodule import SquadDataModule
from slope_pl.data.squad_decode import NBest, SquadSpans, decode_predictions, score_predictions, write_predictions
from slope_pl.data.squad_windows import SquadWindows, build_windows
from slope_pl.data.tokenizer import load_wordpiece

__all__ = [
    "Answer",
    "DataUnavailableError",
    "NBest",
    "SquadDataModule",
    "SquadExample",
    "SquadFormatError",
    "SquadSpans",
    "SquadWindows",
    "build_windows",
    "decode_predictions",
    "load_wordpiece",
    "read_squad",
    "score_predictions",
    "write_predictions",
]
