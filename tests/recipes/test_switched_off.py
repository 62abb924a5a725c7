"""The Trainer's switches on every recipe's command line: what is off is left out of the config's callbacks."""

import json
import signal

import pytest
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar

from recipes.bert_large import glue, pretrain, squad
from recipes.bert_large.glue_sample import write_sample
from recipes.cli import RecipeCLI
from recipes.gpt2 import pretrain as gpt2
from slope_pl import ConfigError
from slope_pl.lightning import StopOnSignal
from tests.recipes.test_gpt2_recipe import ROOT, SMALL, STORIES
from tests.recipes.test_pretrain_recipe import SMALL as SMALL_BERT
from tests.recipes.test_pretrain_recipe import write_stories
from tests.recipes.test_squad_recipe import SAMPLE, TINY

FOLDER = ROOT / "recipes" / "bert_large"
VOCABULARY = str(SAMPLE / "vocab.txt")
BERT = ["--model.weights", "null", "--model.bert", json.dumps(TINY), "--data.tokenizer", VOCABULARY]
OFF = {name: [f"--trainer.enable_{name}", "false"] for name in ("progress_bar", "model_summary", "checkpointing")}


def command(name: str, tmp_path) -> tuple:
    """A recipe's main, and the arguments of two short steps after its subcommand."""
    if name == "gpt2":
        own = ["--config", str(ROOT / "recipes/gpt2/tiny_dense.yaml"), *SMALL, "--data.context", "32"]
        own += ["--data.source", str(STORIES / "stories.txt"), "--data.tokenizer", str(STORIES / "tokenizer.json")]
        own += ["--data.cache_dir", str(tmp_path / "cache"), "--model.sample_tokens", "0"]
    elif name == "pretrain":
        own = ["--config", str(FOLDER / "pretrain_tiny_dense.yaml"), "--model.bert", json.dumps(SMALL_BERT)]
        own += ["--data.source", str(write_stories(tmp_path / "stories.txt")), "--data.tokenizer", VOCABULARY]
        own += ["--data.cache_dir", str(tmp_path / "cache")]
    elif name == "squad":
        own = ["--config", str(FOLDER / "squad_dense.yaml"), *BERT, "--data.source", str(SAMPLE)]
        own += ["--data.max_length", "96", "--data.doc_stride", "48", "--data.max_question_length", "24"]
    else:
        own = ["--config", str(FOLDER / "glue_dense.yaml"), *BERT, "--data.task", "rte"]
        own += ["--data.source", str(write_sample(tmp_path / "glue")), "--data.max_length", "64"]
    own += ["--data.batch_size", "4", "--data.num_workers", "0", "--trainer.max_steps", "2"]
    own += ["--trainer.limit_val_batches", "0", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    own += ["--trainer.logger.init_args.save_dir", str(tmp_path / "runs")]
    main = {"gpt2": gpt2, "pretrain": pretrain, "squad": squad, "glue": glue}[name].main
    return main, own


@pytest.fixture
def trainers(monkeypatch):
    """The Trainers that were made."""
    made, instantiate = [], RecipeCLI.instantiate_trainer

    def remember(cli, **kwargs):
        made.append(instantiate(cli, **kwargs))
        return made[-1]

    monkeypatch.setattr(RecipeCLI, "instantiate_trainer", remember)
    return made


@pytest.mark.parametrize("name", ["gpt2", "pretrain", "squad", "glue"])
def test_what_is_off_is_left_out_and_the_rest_stays(name, tmp_path, trainers):
    main, arguments = command(name, tmp_path)
    main(["fit", *arguments])
    main(["fit", *arguments, *(word for words in OFF.values() for word in words)])
    on, off = ([type(callback) for callback in trainer.callbacks] for trainer in trainers)
    left_out = (ProgressBar, Checkpoint, ModelSummary)
    assert [sum(issubclass(found, kind) for found in on) for kind in left_out] == [1, 2, 1]
    assert off == [found for found in on if not issubclass(found, left_out)]
    assert [trainer.global_step for trainer in trainers] == [2, 2]
    homes = sorted((tmp_path / "runs").glob("*/version_*"))
    assert [len(list(home.glob("**/*.ckpt"))) > 0 for home in homes] == [True, False]
    assert [len(list(home.glob("result-fit.json"))) for home in homes] == [1, 1]
    saves = [cb.saves for trainer in trainers for cb in trainer.callbacks if isinstance(cb, StopOnSignal)]
    assert saves == [True, False]


@pytest.mark.parametrize("switch", OFF)
def test_one_switch_turns_off_no_other(switch, tmp_path, trainers):
    main, arguments = command("glue", tmp_path)
    main(["fit", *arguments, *OFF[switch]])
    kinds = {"progress_bar": ProgressBar, "model_summary": ModelSummary, "checkpointing": Checkpoint}
    found = {key: any(isinstance(cb, kind) for cb in trainers[0].callbacks) for key, kind in kinds.items()}
    assert found == {key: key != switch for key in kinds}


def test_a_signal_then_saves_nothing_and_says_so(tmp_path, capfd):
    main, arguments = command("gpt2", tmp_path)
    strike = ["--trainer.callbacks+", "tests.faults.strike.Strike", "--trainer.callbacks.mark", str(tmp_path / "mark")]
    strike += ["--trainer.callbacks.step", "1", "--trainer.callbacks.name", "SIGTERM", "--trainer.max_steps", "4"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, *OFF["checkpointing"], *strike])
    assert stop.value.code == 128 + signal.SIGTERM
    assert "SIGTERM: stopped after step 2. Checkpoints are switched off, so nothing is saved." in capfd.readouterr().out
    assert not list((tmp_path / "runs").glob("**/*.ckpt"))


def test_resume_auto_without_checkpoints_is_refused(tmp_path):
    main, arguments = command("gpt2", tmp_path)
    with pytest.raises(ConfigError, match="a run that saves nothing leaves nothing to go on from"):
        main(["fit", *arguments, *OFF["checkpointing"], "--resume", "auto"])
