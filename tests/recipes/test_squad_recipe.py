"""The SQuAD recipe as a user runs it, with a BERT of two layers: fit, resume, validate, predict, export, refuse."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from recipes.bert_large.module import BertSquad
from recipes.bert_large.squad import main
from recipes.gpt2 import pretrain
from slope_pl import CheckpointError, SLoPeConfig, sparse_layers
from slope_pl.checkpoint import convert
from slope_pl.data import read_squad, score_predictions
from slope_pl.models import BertConfig

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data" / "sample"
TINY = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 96,
}


def run(tmp_path: Path, subcommand: str, *arguments: str, config: str = "squad_sample.yaml") -> dict:
    """Run the recipe's own command line; returns what it wrote into its result file."""
    name = f"{subcommand}-{len(list(tmp_path.iterdir()))}"
    main(
        [
            *(subcommand, "--config", str(ROOT / "recipes/bert_large" / config), "--model.bert", json.dumps(TINY)),
            *("--model.weights", "null", "--data.source", str(SAMPLE), "--data.tokenizer", str(SAMPLE / "vocab.txt")),
            *("--data.max_length", "96", "--data.doc_stride", "48", "--data.max_question_length", "24"),
            *("--trainer.max_steps", "12", "--trainer.val_check_interval", "12", "--data.max_dev_questions", "12"),
            *("--data.batch_size", "4", "--data.num_workers", "0", "--trainer.precision", "32-true"),
            *("--trainer.accelerator", "cpu", "--trainer.num_sanity_val_steps", "0", "--trainer.max_epochs", "null"),
            *("--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.logger.init_args.name", name),
            *arguments,
        ]
    )
    files = list((tmp_path / name).glob(f"**/result-{subcommand}.json"))
    return json.loads(files[0].read_text()) if files else {"folder": str(tmp_path / name)}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("fit"), "fit")


def test_fit_ends_in_the_whole_table(fitted):
    assert fitted["steps"] == 12
    assert fitted["resetups"] == 1
    assert fitted["woke_at_step"] == 11
    assert set(fitted["scores"]) == {"val/exact_match", "val/f1", "val/questions"}
    assert fitted["scores"]["val/questions"] == 12
    for label in ("exact match / F1", "kept values of 2:4 weights", "stored bytes (if all dense)", "log", "checkpoint"):
        assert fitted["rows"][label]


def test_validate_from_the_checkpoint_gives_the_same_scores(fitted, tmp_path):
    assert run(tmp_path, "validate", "--ckpt_path", fitted["checkpoint"])["scores"] == fitted["scores"]


def test_resume_equals_the_uninterrupted_run(fitted, tmp_path):
    """From the checkpoint of step 6, in the middle of an epoch, to step 12: bit for bit."""
    middle = tmp_path / "middle"
    saving = ["--trainer.callbacks+", "lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.dirpath"]
    saving += [str(middle), "--trainer.callbacks.every_n_train_steps", "6", "--trainer.callbacks.save_top_k", "-1"]
    run(tmp_path, "fit", *saving)
    (checkpoint,) = middle.glob("*step=6.ckpt")
    resumed = run(tmp_path, "fit", "--ckpt_path", str(checkpoint), *saving)
    assert resumed["scores"] == fitted["scores"]
    a, b = (torch.load(path["checkpoint"], weights_only=True)["state_dict"] for path in (fitted, resumed))
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_predict_writes_answers_that_score_the_same(fitted, tmp_path):
    run(tmp_path, "predict", "--ckpt_path", fitted["checkpoint"])
    (file,) = tmp_path.glob("**/predictions.json")
    examples = read_squad(str(SAMPLE / "dev.json"), "dev")[:12]
    scores = score_predictions(json.loads(file.read_text()), examples)
    assert scores["f1"] == pytest.approx(fitted["scores"]["val/f1"], abs=1e-4)


def test_settings_come_from_a_folder_as_from_a_file(fitted, tmp_path, capsys):
    """What FSDP2 or DeepSpeed has saved is no other run for it."""
    folder = convert(fitted["checkpoint"], tmp_path / "sharded.ckpt", to="sharded")
    (tmp_path / "runs").mkdir()
    for path in (fitted["checkpoint"], str(folder)):
        found = run(tmp_path / "runs", "validate", "--ckpt_path", path, "--model.warmup", "0.5")
        assert found["scores"] == fitted["scores"]
        assert "From the checkpoint: model.warmup = 0.1 (not 0.5)" in capsys.readouterr().err
    with pytest.raises(
        CheckpointError, match=f"{folder} is a checkpoint of another recipe: its settings .*gpt2.pretrain"
    ):
        pretrain.main(["validate", "--config", str(ROOT / "recipes/gpt2/tiny.yaml"), "--ckpt_path", str(folder)])
    with pytest.raises(CheckpointError, match=r"use squad.yaml with sparse checkpoints"):
        run(tmp_path / "runs", "validate", "--ckpt_path", str(folder), "--model.slope", "null")


def test_load_from_checkpoint_and_export_give_the_same_logits(fitted, tmp_path):
    transformers = pytest.importorskip("transformers")
    module = BertSquad.load_from_checkpoint(fitted["checkpoint"], weights_only=True).eval()
    assert all(layer.adapters_awake for layer in sparse_layers(module).values())
    convert(fitted["checkpoint"], tmp_path / "sharded.ckpt", to="sharded")  # as FSDP2 leaves it
    main(["export", "--ckpt_path", str(tmp_path / "sharded.ckpt"), "--folder", str(tmp_path / "hf")])
    dense = transformers.BertForQuestionAnswering.from_pretrained(tmp_path / "hf").eval()
    ids = torch.randint(0, 2048, (2, 96))
    with torch.no_grad():
        start, end = module({"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids * 0})
        theirs = dense(ids)
    torch.testing.assert_close(start, theirs.start_logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(end, theirs.end_logits, rtol=0, atol=1e-5)


def test_sparse_checkpoint_is_refused_by_the_dense_config(fitted, tmp_path):
    with pytest.raises(CheckpointError, match="of a 2:4 sparse model, the configuration is dense"):
        run(tmp_path, "validate", "--ckpt_path", fitted["checkpoint"], config="squad_dense.yaml")


def test_dense_checkpoint_is_refused_by_the_sparse_config(tmp_path):
    dense = run(tmp_path, "fit", config="squad_dense.yaml")
    assert dense["model"] == "dense"
    with pytest.raises(CheckpointError, match="of a dense model, the configuration is 2:4 sparse"):
        run(tmp_path, "validate", "--ckpt_path", dense["checkpoint"])


def test_foreign_checkpoint_is_refused(tmp_path):
    file = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(2)}, "pytorch-lightning_version": "2.6.6"}, file)
    with pytest.raises(CheckpointError, match="of another model: none of its 1 tensors"):
        run(tmp_path, "validate", "--ckpt_path", str(file))


def test_vocabulary_larger_than_the_models_is_named(tmp_path):
    with pytest.raises(ValueError, match="the tokenizer has 2048 tokens, the model's vocabulary 1000"):
        run(tmp_path, "fit", "--model.bert", json.dumps(TINY | {"vocab_size": 1000}))


@pytest.mark.parametrize("required", [False, True])
def test_unreachable_hub_is_a_loud_warning_or_an_error(monkeypatch, required):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(BertConfig, "large", lambda: BertConfig(**TINY))
    module = BertSquad(weights="no-one/no-such-model", require_weights=required, slope=SLoPeConfig())
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    expected = (
        pytest.raises(OSError, match="no-one/no-such-model")
        if required
        else pytest.warns(UserWarning, match="STARTING FROM RANDOM WEIGHTS.*no-one/no-such-model")
    )
    with expected:
        module.configure_model()
