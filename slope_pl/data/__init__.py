"""Data modules of the recipes."""

from slope_pl.data.bpe import TextTokenizer, load_bpe
from slope_pl.data.squad import Answer, DataUnavailableError, SquadExample, SquadFormatError, read_squad
from slope_pl.data.squad_datamodule import SquadDataModule
from slope_pl.data.squad_decode import NBest, SquadSpans, decode_predictions, score_predictions, write_predictions
from slope_pl.data.squad_windows import SquadWindows, build_windows
from slope_pl.data.text_datamodule import TextDataModule, TokenWindows
from slope_pl.data.text_prepare import prepare_shards
from slope_pl.data.text_shards import PackedTokens, ShardError, ShardIndex
from slope_pl.data.text_sources import HubText, LocalText, TextFormatError
from slope_pl.data.tokenizer import load_wordpiece

__all__ = [
    "Answer",
    "DataUnavailableError",
    "HubText",
    "LocalText",
    "NBest",
    "PackedTokens",
    "ShardError",
    "ShardIndex",
    "SquadDataModule",
    "SquadExample",
    "SquadFormatError",
    "SquadSpans",
    "SquadWindows",
    "TextDataModule",
    "TextFormatError",
    "TextTokenizer",
    "TokenWindows",
    "build_windows",
    "decode_predictions",
    "load_bpe",
    "load_wordpiece",
    "prepare_shards",
    "read_squad",
    "score_predictions",
    "write_predictions",
]
