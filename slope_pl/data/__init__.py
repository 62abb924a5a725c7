"""Data modules of the recipes."""

from slope_pl.data.bpe import TextTokenizer, load_bpe, save_bpe
from slope_pl.data.glue import GlueExample, GlueFormatError, read_glue
from slope_pl.data.glue_datamodule import GlueDataModule
from slope_pl.data.glue_metrics import GlueScores, glue_scores
from slope_pl.data.glue_tasks import TASKS, TaskInfo
from slope_pl.data.mlm_datamodule import MlmDataModule
from slope_pl.data.mlm_pairs import MlmPairs
from slope_pl.data.mlm_sentences import load_sentence_tokenizer
from slope_pl.data.pair_tokenizer import PairTokenizer, load_pair_tokenizer
from slope_pl.data.signals import outlive_signals
from slope_pl.data.squad import Answer, DataUnavailableError, SquadExample, SquadFormatError, read_squad
from slope_pl.data.squad_datamodule import SquadDataModule
from slope_pl.data.squad_decode import NBest, SquadSpans, decode_predictions, score_predictions, write_predictions
from slope_pl.data.squad_windows import SquadWindows, build_windows
from slope_pl.data.text_datamodule import TextDataModule, TokenWindows
from slope_pl.data.text_prepare import prepare_shards
from slope_pl.data.text_sentences import split_sentences
from slope_pl.data.text_shards import PackedTokens, ShardError, ShardIndex
from slope_pl.data.text_sources import HubText, LocalText, TextFormatError
from slope_pl.data.text_workers import WorkerError
from slope_pl.data.tokenizer import load_wordpiece

__all__ = [
    "TASKS",
    "Answer",
    "DataUnavailableError",
    "GlueDataModule",
    "GlueExample",
    "GlueFormatError",
    "GlueScores",
    "HubText",
    "LocalText",
    "MlmDataModule",
    "MlmPairs",
    "NBest",
    "PackedTokens",
    "PairTokenizer",
    "ShardError",
    "ShardIndex",
    "SquadDataModule",
    "SquadExample",
    "SquadFormatError",
    "SquadSpans",
    "SquadWindows",
    "TaskInfo",
    "TextDataModule",
    "TextFormatError",
    "TextTokenizer",
    "TokenWindows",
    "WorkerError",
    "build_windows",
    "decode_predictions",
    "glue_scores",
    "load_bpe",
    "load_pair_tokenizer",
    "load_sentence_tokenizer",
    "load_wordpiece",
    "outlive_signals",
    "prepare_shards",
    "read_glue",
    "read_squad",
    "save_bpe",
    "score_predictions",
    "split_sentences",
    "write_predictions",
]
