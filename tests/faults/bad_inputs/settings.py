"""Settings: of the method, the baselines, the optimizer, models, callbacks and data modules."""

from functools import partial
from typing import Any

import torch
from torch import nn

from slope_pl import SLoPeCallback, SLoPeConfig
from slope_pl.baselines import FSTCallback, FSTConfig, SRSTECallback, SRSTEConfig
from slope_pl.config import as_config
from slope_pl.data import GlueDataModule, MlmDataModule, SquadDataModule, TextDataModule
from slope_pl.lightning import Distillation, FadeCallback, SLoPeDDPStrategy
from slope_pl.models import BertConfig, GPT2Config
from slope_pl.optim import Lamb
from tests.faults.bad_inputs.case import Case

NAN, INF = float("nan"), float("inf")


def of(kind: Any, says: str | tuple[str, ...], *args: Any, **settings: Any) -> Case:
    """A constructor with settings that it has to refuse."""
    shown = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in settings.items())])
    name = f"{kind.__name__}({shown})"
    return Case(name, lambda folder: kind(*args, **settings), (says,) if isinstance(says, str) else says)


def lamb(says: tuple[str, ...], **settings: Any) -> Case:
    """Lamb over one parameter."""
    return Case(f"Lamb({settings})", lambda folder: Lamb([nn.Parameter(torch.zeros(2))], **settings), says)


slope = partial(of, SLoPeConfig)
METHOD = [
    slope(("mask='Magnitude'", "choose one of magnitude"), mask="Magnitude"),
    slope(("mask=['magnitude']", "choose one of"), mask=["magnitude"]),
    slope(("mask=2", "choose one of"), mask=2),
    slope(("backend=None", "choose one of"), backend=None),
    slope(("seed='0'", "an integer of at least 0"), seed="0"),
    slope(("seed=None", "an integer"), seed=None),
    slope(("seed=True", "an integer"), seed=True),
    slope(("backward_refresh_steps=100.0", "an integer"), backward_refresh_steps=100.0),
    slope(("backward_refresh_steps=-1", "None never"), backward_refresh_steps=-1),
    slope(("backward_refresh_steps='never'", "None never"), backward_refresh_steps="never"),
    slope(("adapter_rank=None", "0 means no adapters"), adapter_rank=None),
    slope(("adapter_rank='auto'", "0 means no adapters"), adapter_rank="auto"),
    slope(("adapter_rank_fraction=1.5", "at most 1"), adapter_rank_fraction=1.5),
    slope(("adapter_rank_fraction=True", "a fraction"), adapter_rank_fraction=True),
    slope(("adapter_rank_fraction=inf", "at most 1"), adapter_rank_fraction=INF),
    slope(("adapter_start=0", "above 0"), adapter_rank=4, adapter_start=0),
    slope(("adapter_start=nan", "a fraction"), adapter_rank=4, adapter_start=NAN),
    slope(("adapter_start=None", "a fraction"), adapter_rank=4, adapter_start=None),
    slope(("adapter_start_step=1.0", "an integer"), adapter_rank=4, adapter_start_step=1.0),
    slope(("mask_calibration_batches=-1", "0 chooses"), mask_calibration_batches=-1),
    slope(("mask_calibration_batches=2.5", "an integer"), mask_calibration_batches=2.5),
    slope(("mask_calibration_batches=4", "mask='random'"), mask="random", mask_calibration_batches=4),
    slope(("layer_masks=['a']", "a mapping of patterns to kinds"), layer_masks=["a"]),
    slope(("layer_masks={1: 'random'}", "a mapping of patterns"), layer_masks={1: "random"}),
    slope(("layer_masks['a']='best'", "choose one of"), layer_masks={"a": "best"}),
    slope(("mask_calibration_batches=4", "random"), layer_masks={"a": "random"}, mask_calibration_batches=4),
    slope(("include={'a'}", "a list of patterns"), include={"a"}),
    slope(("include=[None]", "a list of patterns"), include=[None]),
    slope(("exclude=b'x'", "a list of patterns"), exclude=b"x"),
    slope(("fuse_gelu=1", "True or False"), fuse_gelu=1),
    slope(("fuse_gelu='no'", "True or False"), fuse_gelu="no"),
    slope(("keep_first_dense=0", "True or False"), keep_first_dense=0),
    slope(("keep_heads_dense='false'", "True or False"), keep_heads_dense="false"),
    slope(("keep_first_dense=None", "True or False"), keep_first_dense=None),
    of(SLoPeConfig.from_dict, ("list", "a mapping"), [("mask", "random")]),
    of(SLoPeConfig.from_dict, ("unknown SLoPe setting '3'", "known are mask"), {3: 4}),
    of(SLoPeConfig.from_dict, ("NoneType", "a mapping"), None),
    of(as_config, ("type", "a mapping"), SLoPeConfig),
    of(SLoPeCallback, ("int", "a mapping"), 4),
    of(SLoPeCallback, ("unknown SLoPe setting 'rank'", "adapter_rank"), {"rank": 4}),
    of(SLoPeDDPStrategy, ("str", "a mapping"), config="random"),
]
BASELINES = [
    of(SRSTEConfig, ("decay=-1", "at least 0"), decay=-1),
    of(SRSTEConfig, ("decay=nan", "at least 0"), decay=NAN),
    of(SRSTEConfig, ("mask_refresh_steps=0", "at least 1"), mask_refresh_steps=0),
    of(SRSTEConfig, ("backward_pruning='both'", "choose one of weight"), backward_pruning="both"),
    of(SRSTEConfig, ("adapter_fraction=2", "at most 1"), adapter_rank=4, adapter_fraction=2),
    of(SRSTEConfig, ("adapter_rank=-1", "at least 0"), adapter_rank=-1),
    of(SRSTEConfig, ("no effect", "set adapter_rank"), adapter_start_step=5),
    of(FSTConfig, ("targets='mlp'", "a list of patterns"), targets="mlp"),
    of(FSTConfig, ("mvue='yes'", "True or False"), mvue="yes"),
    of(FSTConfig, ("dense_finish_fraction=-0.1", "0 never ends"), dense_finish_fraction=-0.1),
    of(FSTConfig, ("dense_finish_step=-1", "at least 0"), dense_finish_step=-1),
    of(FSTConfig, ("dense_finish_fraction=0.5", "give one of them"), dense_finish_fraction=0.5, dense_finish_step=9),
    of(SRSTECallback, ("FSTConfig", "SRSTEConfig"), FSTConfig()),
    of(FSTCallback, ("unknown FSTConfig setting 'mask'", "known are targets"), {"mask": "random"}),
]
OPTIMIZER = [
    lamb(("lr=-1", "0 or more"), lr=-1),
    lamb(("lr=nan", "0 or more"), lr=NAN),
    lamb(("lr='0.1'", "0 or more"), lr="0.1"),
    lamb(("lr=None", "0 or more"), lr=None),
    lamb(("betas=0.9", "two numbers"), betas=0.9),
    lamb(("betas=(0.9,)", "two numbers"), betas=(0.9,)),
    lamb(("betas=(0.9, 1.0)", "two numbers"), betas=(0.9, 1.0)),
    lamb(("betas=('a', 'b')", "two numbers"), betas=("a", "b")),
    lamb(("eps=0", "above 0"), eps=0),
    lamb(("weight_decay=-0.1", "0 or more"), weight_decay=-0.1),
    lamb(("weight_decay=[0.1]", "0 or more"), weight_decay=[0.1]),
    lamb(("state_dtype='float32'", "floating-point dtype"), state_dtype="float32"),
    lamb(("state_dtype=torch.int8", "floating-point dtype"), state_dtype=torch.int8),
]


def distil(says: tuple[str, ...], **settings: Any) -> Case:
    """Distillation from any teacher."""
    options = {"task": "classification", **settings}
    return Case(f"Distillation({settings})", lambda folder: Distillation(nn.Linear(2, 2), **options), says)


CALLBACKS = [
    of(FadeCallback, ("steps=0", "at least 1"), 0),
    of(FadeCallback, ("steps=1.5", "an integer"), 1.5),
    of(FadeCallback, ("start_step=-1", "at least 0"), 5, start_step=-1),
    of(FadeCallback, ("mask='random'", "choose mask='magnitude'"), 5, SLoPeConfig(mask="random")),
    of(FadeCallback, ("str", "a mapping"), 5, "magnitude"),
    distil(("task='tagging'", "choose one of"), task="tagging"),
    distil(("temperature=0", "above 0"), temperature=0),
    distil(("temperature='hot'", "above 0"), temperature="hot"),
    distil(("temperature=nan", "above 0"), temperature=NAN),
    distil(("weight=0", "leave distillation out"), weight=0),
    distil(("weight='half'", "at most 1"), weight="half"),
    distil(("temperature=2", "no effect in regression"), task="regression", temperature=2),
]
MODELS = [
    of(BertConfig, ("hidden_size=16.0", "an integer"), hidden_size=16.0),
    of(BertConfig, ("num_attention_heads=5", "a divisor of hidden_size=16"), hidden_size=16, num_attention_heads=5),
    of(BertConfig, ("hidden_dropout_prob=1", "[0, 1)"), hidden_dropout_prob=1),
    of(BertConfig, ("hidden_act=['gelu']", "one of"), hidden_act=["gelu"]),
    of(BertConfig, ("pad_token_id=-1", "None or an integer"), pad_token_id=-1),
    of(BertConfig.from_dict, ("model_type", "'bert'"), {"model_type": "roberta"}),
    of(BertConfig.from_dict, ("list", "config.json"), [1]),
    of(GPT2Config, ("n_head", "7"), n_head=7),
    of(GPT2Config, ("n_layer", "0"), n_layer=0),
    of(GPT2Config, ("activation_function", "'swish'"), activation_function="swish"),
    of(GPT2Config.from_dict, ("model_type", "'gpt2'"), {"model_type": "llama"}),
    of(GPT2Config.from_dict, ("str", "config.json"), "gpt2"),
]
DATA = [
    of(TextDataModule, ("context is 0", "1 or more"), context=0),
    of(TextDataModule, ("context is '64'", "an integer"), context="64"),
    of(TextDataModule, ("batch_size is None", "an integer"), batch_size=None),
    of(TextDataModule, ("val_fraction is 1", "less than 1"), val_fraction=1),
    of(TextDataModule, ("val_fraction is nan", "less than 1"), val_fraction=NAN),
    of(TextDataModule, ("separator is ''", "None for one document"), separator=""),
    of(TextDataModule, ("separator is 3", "a string"), separator=3),
    of(TextDataModule, ("source is None", "a string"), source=None),
    of(TextDataModule, ("source is ''", "a path"), source=""),
    of(TextDataModule, ("tokenizer is None", "a string"), tokenizer=None),
    of(TextDataModule, ("cache_dir is 3", "a string"), cache_dir=3),
    of(TextDataModule, ("verify is 'no'", "True or False"), verify="no"),
    of(TextDataModule, ("shard_tokens is -1", "1 or more"), shard_tokens=-1),
    of(TextDataModule, ("prepare_processes is 0", "1 or more"), prepare_processes=0),
    of(MlmDataModule, ("prepare_processes is 'all'", "an integer"), prepare_processes="all"),
    of(MlmDataModule, ("max_length is 4", "8 or more"), max_length=4),
    of(MlmDataModule, ("max_predictions is 200", "max_length=128 or less"), max_predictions=200),
    of(MlmDataModule, ("short_probability is 1.5", "from 0 to 1"), short_probability=1.5),
    of(MlmDataModule, ("sentences is 'words'", "'prose' or 'lines'"), sentences="words"),
    of(MlmDataModule, ("rows_per_document is 0", "1 or more"), rows_per_document=0),
    of(MlmDataModule, ("tokenizer is 7", "a string"), tokenizer=7),
    of(SquadDataModule, ("max_length is 8", "expected"), max_length=8, max_question_length=64),
    of(SquadDataModule, ("doc_stride is 0", "expected"), doc_stride=0),
    of(SquadDataModule, ("batch_size is 2.0", "an integer"), batch_size=2.0),
    of(SquadDataModule, ("source is None", "a string"), source=None),
    of(SquadDataModule, ("tokenizer is 7", "a string"), tokenizer=7),
    of(SquadDataModule, ("on_bad_answer is 'drop'", "'skip'"), on_bad_answer="drop"),
    of(GlueDataModule, ("task is 'ax'", "expected one of cola"), task="ax"),
    of(GlueDataModule, ("task is ['cola']", "expected one of cola"), task=["cola"]),
    of(GlueDataModule, ("max_length is 2", "5 or more"), max_length=2),
    of(GlueDataModule, ("pad_to is 0", "1 or more"), pad_to=0),
    of(GlueDataModule, ("max_dev_rows is 0", "leave it out"), max_dev_rows=0),
    of(GlueDataModule, ("on_bad_row is None", "'raise' or 'skip'"), on_bad_row=None),
    of(GlueDataModule, ("source is 3", "a string"), source=3),
]
CASES = [*METHOD, *BASELINES, *OPTIMIZER, *CALLBACKS, *MODELS, *DATA]
