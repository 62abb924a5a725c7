"""The pretraining recipe as a user runs it, with a small BERT: two phases, resume, validate, export, refuse."""

import json
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

from recipes.bert_large.pretrain import main
from recipes.bert_large.pretrain_module import BertPretraining
from slope_pl import CheckpointError, SLoPeConfig, sparse_layers
from slope_pl.models import BertConfig
from slope_pl.optim import Lamb

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes/bert_large"
SMALL = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
WORDS = ["river", "bridge", "mayor", "town", "stone", "winter", "harvest", "lamb", "ferry", "baker"]


def write_stories(file: Path, stories: int = 60) -> Path:
    """Documents of a few sentences, for runs that do not need the bundled text."""
    made = []
    for i in range(stories):
        sentences = [
            f"The {WORDS[(i + s) % 10]} saw the {WORDS[(i * 3 + s * 7) % 10]} of the {WORDS[(i * i + s) % 10]}."
            for s in range(4 + i % 5)
        ]
        made.append(" ".join(sentences))
    file.write_text("\n\n".join(made))
    return file


def run(
    tmp_path: Path, subcommand: str, *arguments: str, config: str = "pretrain_tiny.yaml", bert: dict | None = SMALL
) -> dict:
    """Run the recipe's own command line; returns what it wrote into its result file."""
    name = f"{subcommand}-{len(list(tmp_path.iterdir()))}"
    text = tmp_path / "stories.txt"
    if not text.exists():
        write_stories(text)
    main(
        [
            *(subcommand, "--config", str(FOLDER / config), "--data.tokenizer", str(ROOT / "data/sample/vocab.txt")),
            *(() if bert is None else ("--model.bert", json.dumps(bert))),
            *(
                "--data.source",
                str(text),
                "--data.cache_dir",
                str(tmp_path.parent / "cache"),
                "--data.val_fraction",
                "0.2",
            ),
            *("--trainer.max_steps", "12", "--trainer.val_check_interval", "6", "--data.batch_size", "8"),
            *(
                "--trainer.accelerator",
                "cpu",
                "--trainer.log_every_n_steps",
                "4",
                "--model.slope.backward_refresh_steps",
                "5",
            )[: 4 if "dense" in config else 6],
            *("--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.logger.init_args.name", name),
            *arguments,
        ]
    )
    (file,) = (tmp_path / name).glob(f"**/result-{subcommand}.json")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("fit"), "fit")


@pytest.fixture(scope="module")
def second(fitted, tmp_path_factory):
    return run(
        tmp_path_factory.mktemp("second"), "fit", "--model.start_from", fitted["checkpoint"],
        "--model.slope.adapter_start", "0.7", config="pretrain_tiny_phase2.yaml",
    )  # fmt: skip


def state_of(result: dict) -> dict:
    return torch.load(result["checkpoint"], weights_only=True)["state_dict"]


def test_fit_ends_in_the_whole_table(fitted):
    assert (fitted["steps"], fitted["resetups"], fitted["model"]) == (12, 2, "2:4 sparse")
    assert fitted["tokens"] == 12 * 8 * 32
    assert fitted["tokens_per_second"] > 0
    assert set(fitted["scores"]) == {
        f"val/{k}" for k in ("loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy")
    }
    scores = fitted["scores"]
    assert scores["val/loss"] == pytest.approx(scores["val/mlm_loss"] + scores["val/nsp_loss"], rel=1e-6)
    assert 0 <= scores["val/mlm_accuracy"] <= 1
    assert 0 < scores["val/nsp_accuracy"] < 1
    for label in ("masked words right", "kept values of 2:4 weights", "tokens per second", "log", "checkpoint"):
        assert fitted["rows"][label]


def test_it_learns(fitted, tmp_path):
    longer = run(tmp_path, "fit", "--trainer.max_steps", "120", "--trainer.val_check_interval", "60")
    assert longer["scores"]["val/mlm_loss"] < fitted["scores"]["val/mlm_loss"] - 2


def test_validate_from_the_checkpoint_gives_the_same_scores(fitted, tmp_path):
    assert run(tmp_path, "validate", "--ckpt_path", fitted["checkpoint"])["scores"] == fitted["scores"]


@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
def test_resume_equals_the_uninterrupted_run(tmp_path, optimizer):
    """From the checkpoint of step 6, in the middle of an epoch, with dropout, to step 12: bit for bit."""
    middle = tmp_path / "middle"
    common = ["--model.optimizer", optimizer, "--trainer.callbacks+", "lightning.pytorch.callbacks.ModelCheckpoint"]
    common += ["--trainer.callbacks.dirpath", str(middle), "--trainer.callbacks.every_n_train_steps", "6"]
    common += ["--trainer.callbacks.save_top_k", "-1"]
    whole = run(tmp_path, "fit", *common)
    (checkpoint,) = middle.glob("*step=6.ckpt")
    resumed = run(tmp_path, "fit", *common, "--ckpt_path", str(checkpoint))
    assert resumed["scores"] == whole["scores"]
    a, b = state_of(whole), state_of(resumed)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_phase_2_keeps_the_masks_of_phase_1(fitted, second):
    first, later = state_of(fitted), state_of(second)
    masks = [name for name in first if name.endswith(".indices")]
    assert len(masks) == 2 * 6 - 3 + 2
    assert [name for name in masks if not torch.equal(first[name], later[name])] == []
    moved = [name for name in first if name.endswith(".values") and torch.equal(first[name], later[name])]
    assert moved == []
    assert second["started_from"] == fitted["checkpoint"]
    assert second["woke_at_step"] == 8
    assert second["tokens"] == 12 * 8 * 64
    assert later["net.bert.encoder.layer.1.output.dense.adapter_up"].abs().max() > 0


def test_phase_2_begins_where_phase_1_ended(fitted, tmp_path):
    module = BertPretraining(
        start_from=fitted["checkpoint"], slope=SLoPeConfig(adapter_rank=8, backward_refresh_steps=7)
    )
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.configure_model()
    before = BertPretraining.load_from_checkpoint(fitted["checkpoint"], weights_only=True)
    ids = torch.randint(5, 2048, (2, 32))
    with torch.no_grad():
        a, b = (m.eval().net(ids) for m in (module, before))
    assert torch.equal(a.prediction_logits, b.prediction_logits)
    assert torch.equal(a.seq_relationship_logits, b.seq_relationship_logits)


def test_a_dense_phase_1_is_pruned_by_its_trained_weights(tmp_path):
    dense = run(tmp_path, "fit", config="pretrain_tiny_dense.yaml")
    assert (dense["model"], dense["resetups"]) == ("dense", None)
    module = BertPretraining(start_from=dense["checkpoint"], slope=SLoPeConfig())
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.configure_model()
    trained = state_of(dense)
    layers = sparse_layers(module)
    assert len(layers) == 11
    for name, layer in layers.items():
        weight = trained[f"{name}.weight"]
        largest = weight.abs().unflatten(1, (-1, 4)).topk(2).values.sum()
        assert layer.values.detach().abs().sum() == pytest.approx(largest.item(), rel=1e-5)
    sparse = run(tmp_path, "fit", "--model.start_from", dense["checkpoint"], config="pretrain_tiny_phase2.yaml")
    assert sparse["model"] == "2:4 sparse"


def test_the_end_says_that_the_masks_are_still_those(fitted, tmp_path, capsys):
    run(tmp_path, "fit", "--model.start_from", fitted["checkpoint"], config="pretrain_tiny_phase2.yaml")
    assert f"Masks of 11 layers are still those of {fitted['checkpoint']}." in capsys.readouterr().out


def test_masks_that_moved_are_noticed_at_the_end(fitted, tmp_path, monkeypatch):
    def spoil(self, *_):
        layer = next(iter(sparse_layers(self).values()))
        layer.indices.copy_(layer.indices.roll(1, 0))

    monkeypatch.setattr(BertPretraining, "on_train_batch_end", spoil)
    with pytest.raises(CheckpointError, match=r"masks of 1 of 11 layers \(.*\) are not those of"):
        run(tmp_path, "fit", "--model.start_from", fitted["checkpoint"], config="pretrain_tiny_phase2.yaml")


def test_export_gives_the_logits_of_the_checkpoint(second, tmp_path):
    transformers = pytest.importorskip("transformers")
    module = BertPretraining.load_from_checkpoint(second["checkpoint"], weights_only=True).eval()
    assert all(layer.adapters_awake for layer in sparse_layers(module).values())
    main(["export", "--ckpt_path", second["checkpoint"], "--folder", str(tmp_path / "hf")])
    dense = transformers.BertForPreTraining.from_pretrained(tmp_path / "hf").eval()
    ids = torch.randint(0, 2048, (2, 64))
    with torch.no_grad():
        ours, theirs = module.net(ids), dense(ids)
    torch.testing.assert_close(ours.prediction_logits, theirs.prediction_logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.seq_relationship_logits, theirs.seq_relationship_logits, rtol=0, atol=1e-5)


def test_the_optimizer_is_lamb_over_three_groups():
    module = BertPretraining(bert=BertConfig(**SMALL), slope=SLoPeConfig(adapter_rank=4), learning_rate=0.5)
    module.configure_model()
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=10)
    module.trainer.fit_loop.setup_data = lambda: None
    made = module.configure_optimizers()
    optimizer = made["optimizer"]
    assert isinstance(optimizer, Lamb)
    assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups} == {
        "weights": 0.01, "no_decay": 0.0, "adapters": 1e-4,
    }  # fmt: skip
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(module.parameters()))
    assert {g["always_adapt"] for g in optimizer.param_groups} == {False}
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * (1 / 10) / 0.2843)


def test_lamb_is_refused_where_parameters_are_flattened():
    module = BertPretraining(bert=BertConfig(**SMALL))
    module.configure_model()
    module._trainer = SimpleNamespace(
        strategy=DeepSpeedStrategy.__new__(DeepSpeedStrategy), estimated_stepping_batches=10
    )
    with pytest.raises(ValueError, match=r"optimizer=lamb under DeepSpeed.*slope_ddp"):
        module.configure_optimizers()


# Refused --------------------------------------------------------------------------------------------------------------


def test_the_other_kind_of_checkpoint_is_refused_on_resume(fitted, tmp_path):
    with pytest.raises(CheckpointError, match=r"of a 2:4 sparse model, the configuration is dense.*start_from"):
        run(tmp_path, "fit", "--ckpt_path", fitted["checkpoint"], config="pretrain_tiny_dense.yaml")


def test_phase_2_from_the_wrong_file_leaves_everything_as_it_was(fitted, tmp_path):
    file = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {"net.a": torch.zeros(2)}, "hyper_parameters": {}}, file)
    content = {path: path.read_bytes() for path in (file, Path(fitted["checkpoint"]))}
    for bad, message in (
        (str(file), "is of another model: it has no net.cls.predictions.bias"),
        (str(tmp_path / "none.ckpt"), r"none\.ckpt: no such file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(tmp_path, "fit", "--model.start_from", bad, config="pretrain_tiny_phase2.yaml")
    with pytest.raises(CheckpointError, match="of a 2:4 sparse model, the configuration is dense"):
        run(tmp_path, "fit", "--model.start_from", fitted["checkpoint"], config="pretrain_tiny_dense.yaml")
    assert {path: path.read_bytes() for path in content} == content
    assert not list(tmp_path.glob("fit-*/**/*.ckpt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.bert", json.dumps(SMALL | {"vocab_size": 1000})],
            "the tokenizer has 2048 tokens, the model's vocabulary 1000",
        ),
        (["--data.max_length", "65"], "data.max_length=65 tokens, but the model has positions for 64"),
        (["--model.warmup", "1.0"], "warmup=1.0: a share of all steps"),
        (["--model.decay_power", "0"], "decay_power=0"),
        (["--model.learning_rate", "0"], "learning_rate=0"),
        (["--model.weights", "x", "--model.start_from", "y"], "are both set; give one of them"),
        (["--trainer.max_steps", "-1"], "the number of steps is missing"),
    ],
)
def test_settings_that_do_not_fit_are_named_before_training(tmp_path, capsys, arguments, message):
    with pytest.raises((SystemExit, ValueError)) as stop:
        run(tmp_path, "fit", *arguments)
    assert message in capsys.readouterr().err + str(stop.value)
