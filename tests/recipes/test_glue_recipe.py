"""The GLUE recipe as a user runs it, with a BERT of two layers: fit, resume, validate, predict, export, refuse."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from recipes.bert_large.glue import main
from recipes.bert_large.glue_module import BertGlue
from recipes.bert_large.glue_sample import write_sample
from recipes.bert_large.pretrain_module import BertPretraining
from slope_pl import CheckpointError, SLoPeConfig, sparse_layers
from slope_pl.data import TASKS, GlueDataModule
from slope_pl.models import BertConfig, BertForSequenceClassification, PretrainedMismatchError, save_pretrained
from tests.unit.test_glue_reading import real_glue

ROOT = Path(__file__).parents[2]
VOCABULARY = ROOT / "data" / "sample" / "vocab.txt"
TINY = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("glue"))


def run(tmp_path: Path, subcommand: str, source: Path, *arguments: str, task="rte", config="glue.yaml") -> dict:
    """Run the recipe's own command line; returns what it wrote into its result file."""
    name = f"{subcommand}-{len(list(tmp_path.iterdir()))}"
    configs = [str(ROOT / "recipes/bert_large" / each) for each in (config, "glue_sample.yaml")]
    main(
        [
            *(subcommand, "--config", configs[0], "--config", configs[1], "--model.bert", json.dumps(TINY)),
            *("--data.task", task, "--data.source", str(source), "--data.tokenizer", str(VOCABULARY)),
            *("--trainer.max_steps", "40", "--trainer.accelerator", "cpu"),
            *("--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.logger.init_args.name", name),
            *arguments,
        ]
    )
    files = list((tmp_path / name).glob(f"**/result-{subcommand}.json"))
    return json.loads(files[0].read_text()) if files else {"folder": str(tmp_path / name)}


SPARSE = [
    "--model.slope.adapter_rank",
    "4",
    "--model.slope.adapter_start",
    "0.9",
    "--model.slope.backward_refresh_steps",
    "10",
]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, folder):
    return run(tmp_path_factory.mktemp("fit"), "fit", folder, *SPARSE)


def test_fit_ends_in_the_whole_table(fitted):
    assert (fitted["task"], fitted["model"], fitted["steps"], fitted["val_step"]) == ("rte", "2:4 sparse", 40, 40)
    assert fitted["resetups"] == 3
    assert fitted["woke_at_step"] == 36
    assert fitted["train_rows_seen"] == 320
    assert fitted["samples_per_second"] > 0
    assert set(fitted["scores"]) == {"accuracy", "score", "rows"}
    assert fitted["scores"]["rows"] == 48
    for label in ("accuracy", "kept values of 2:4 weights", "training rows per second", "log", "checkpoint"):
        assert fitted["rows"][label]


@pytest.mark.parametrize(
    ("task", "config"),
    [*((task, "glue.yaml") for task in TASKS), ("stsb", "glue_dense.yaml"), ("mnli", "glue_dense.yaml")],
)
def test_every_task_trains(tmp_path, folder, task, config):
    found = run(tmp_path, "fit", folder, "--trainer.max_steps", "20", task=task, config=config)
    assert set(TASKS[task].metrics) < set(found["scores"])
    assert found["scores"]["rows"] == (96 if task == "mnli" else 48)
    assert found["model"] == ("dense" if "dense" in config else "2:4 sparse")


@pytest.mark.parametrize("config", ["glue.yaml", "glue_dense.yaml"])
def test_it_learns_the_one_word_that_decides(tmp_path, folder, config):
    found = run(
        tmp_path,
        "fit",
        folder,
        "--trainer.max_steps",
        "120",
        "--model.learning_rate",
        "3e-3",
        task="sst2",
        config=config,
    )
    assert found["scores"]["accuracy"] > 90


@pytest.mark.parametrize("task", ["stsb", "mnli"])
def test_loss_is_the_one_written_out(monkeypatch, task):
    module = BertGlue(task, bert=TINY)
    module.configure_model()
    monkeypatch.setattr(module, "log", lambda *args, **options: None)
    logits = torch.tensor([[1.0], [4.0]]) if task == "stsb" else torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    monkeypatch.setattr(module, "forward", lambda batch: logits)
    labels = torch.tensor([2.0, 4.5]) if task == "stsb" else torch.tensor([2, 0])
    expected = (1 + 0.25) / 2 if task == "stsb" else (0.4076059 + 1.0986123) / 2
    assert module.training_step({"labels": labels}, 0).item() == pytest.approx(expected)


@pytest.mark.parametrize("task", ["cola", "mrpc", "stsb", "rte", "wnli", "sst2"])
def test_real_rows_train_a_few_steps(tmp_path, task):
    options = ["--data.max_train_rows", "64", "--data.max_dev_rows", "40", "--trainer.max_steps", "8"]
    found = run(tmp_path, "fit", real_glue(), *options, task=task)
    assert found["scores"]["rows"] == 40
    assert found["steps"] == 8


@pytest.mark.parametrize(("task", "given", "epochs"), [("cola", [], 5), ("rte", [], 3), ("rte", ["2"], 2)])
def test_epochs_are_the_published_ones_of_the_task(tmp_path, folder, task, given, epochs):
    options = ["--trainer.max_steps", "-1", "--data.max_train_rows", "16"]
    options += ["--trainer.max_epochs", *(given or ["null"])]
    assert run(tmp_path, "fit", folder, *options, task=task)["steps"] == 2 * epochs


def test_validate_from_the_checkpoint_gives_the_same_scores(fitted, folder, tmp_path):
    assert run(tmp_path, "validate", folder, "--ckpt_path", fitted["checkpoint"])["scores"] == fitted["scores"]


def test_resume_equals_the_uninterrupted_run(fitted, folder, tmp_path):
    """From the checkpoint of step 15, in the middle of an epoch, to step 40: bit for bit."""
    middle = tmp_path / "middle"
    saving = ["--trainer.callbacks+", "lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.dirpath"]
    saving += [str(middle), "--trainer.callbacks.every_n_train_steps", "15", "--trainer.callbacks.save_top_k", "-1"]
    run(tmp_path, "fit", folder, *SPARSE, *saving)
    (checkpoint,) = middle.glob("*step=15.ckpt")
    resumed = run(tmp_path, "fit", folder, *SPARSE, "--ckpt_path", str(checkpoint), *saving)
    assert resumed["scores"] == fitted["scores"]
    a, b = (torch.load(path["checkpoint"], weights_only=True)["state_dict"] for path in (fitted, resumed))
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("task", ["rte", "stsb", "mnli"])
def test_predict_writes_answers_that_score_the_same(folder, tmp_path, task):
    fitted = run(tmp_path, "fit", folder, task=task)
    run(tmp_path, "predict", folder, "--ckpt_path", fitted["checkpoint"], task=task)
    data = GlueDataModule(task, str(folder), str(VOCABULARY))
    data.setup("validate")
    for split, rows in data.dev_rows.items():
        info = TASKS[task]
        name = f"{info.folder}.tsv" if split == "dev" else f"{info.folder}-{split}.tsv"
        (file,) = tmp_path.glob(f"**/{name}")
        lines = [line.split("\t") for line in file.read_text().splitlines()]
        assert lines[0] == ["index", "prediction"]
        assert [int(index) for index, _ in lines[1:]] == list(range(48))
        if task == "stsb":
            values = torch.tensor([float(answer) for _, answer in lines[1:]], dtype=torch.float64)
            found = 100 * torch.corrcoef(torch.stack([values, torch.from_numpy(rows.labels).double()]))[0, 1].item()
            assert found == pytest.approx(fitted["scores"]["pearson"], abs=1e-3)
            continue
        right = [info.labels[gold] == answer for gold, (_, answer) in zip(rows.labels, lines[1:], strict=True)]
        key = "accuracy_mismatched" if split == "mismatched" else "accuracy"
        assert 100 * sum(right) / 48 == pytest.approx(fitted["scores"][key], abs=1e-3)


def test_load_from_checkpoint_and_export_give_the_same_logits(fitted, folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    module = BertGlue.load_from_checkpoint(fitted["checkpoint"], weights_only=True).eval()
    assert all(layer.adapters_awake for layer in sparse_layers(module).values())
    assert "net.bert.pooler.dense" in sparse_layers(module)  # as published
    main(["export", "--ckpt_path", fitted["checkpoint"], "--folder", str(tmp_path / "hf")])
    dense = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    assert dense.config.id2label == {0: "entailment", 1: "not_entailment"}
    ids = torch.randint(0, 2048, (2, 64))
    with torch.no_grad():
        ours = module({"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids * 0})
        torch.testing.assert_close(ours, dense(ids).logits, rtol=0, atol=1e-5)
    # The folder is a start for the same task, not for another one.
    weights = ["--model.weights", str(tmp_path / "hf"), "--trainer.max_steps", "1", "--model.learning_rate", "1e-9"]
    weights += ["--trainer.val_check_interval", "1"]
    again = run(tmp_path, "fit", folder, *weights, config="glue_dense.yaml")
    assert again["scores"] == fitted["scores"]
    with pytest.raises(
        PretrainedMismatchError, match="was fine-tuned on rte, and its head is that task's; the task is mrpc"
    ):
        run(tmp_path, "fit", folder, *weights, task="mrpc")


LABELS = "those of rte are entailment, not_entailment, in this order"


@pytest.mark.parametrize(
    ("labels", "more", "message"),
    [
        (["LABEL_0", "LABEL_1", "LABEL_2"], {}, f"labels are LABEL_0, LABEL_1, LABEL_2, {LABELS}"),
        (["not_entailment", "entailment"], {}, f"labels are not_entailment, entailment, {LABELS}"),
        (["NEGATIVE", "POSITIVE"], {"finetuning_task": "sst-2"}, "was fine-tuned on sst-2"),
        (["NEGATIVE", "POSITIVE"], {}, f"labels are NEGATIVE, POSITIVE, {LABELS}"),
        (["Entailment", "not entailment"], {"finetuning_task": "RTE"}, None),
        (["LABEL_0", "LABEL_1"], {}, None),
        (["not_entailment", "entailment"], {"architectures": ["BertModel"]}, None),
    ],
)
def test_a_head_whose_labels_are_others_is_refused(folder, tmp_path, labels, more, message):
    """Its outputs would be read as other classes, and nothing but the score would tell."""
    net = BertForSequenceClassification(BertConfig.from_dict(TINY), len(labels))
    config = save_pretrained(net, tmp_path / "hf") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"id2label": dict(enumerate(labels))} | more))
    arguments = ["--model.weights", str(tmp_path / "hf"), "--trainer.max_steps", "1"]
    if message is None:
        assert run(tmp_path, "fit", folder, *arguments)
        return
    with pytest.raises(PretrainedMismatchError, match=message):
        run(tmp_path, "fit", folder, *arguments)


def pretrained(path, slope):
    """A checkpoint of the pretraining recipe, from weights of its own."""
    torch.manual_seed(11)
    module = BertPretraining(bert=BertConfig.from_dict(TINY), slope=slope)
    module.configure_model()
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "global_step": 70}
    content["hyper_parameters"]["slope"] = None if slope is None else slope.to_dict()
    module.on_save_checkpoint(content)
    if slope is not None:
        layers = list(sparse_layers(module))
        content["slope_pl"] = {"format": 1, "version": "0", "config": slope.to_dict(), "layers": layers}
    torch.save(content, path)
    return content["state_dict"]


def test_a_sparse_pretraining_checkpoint_keeps_its_masks(folder, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    file = tmp_path / "pretrained.ckpt"
    saved = pretrained(file, SLoPeConfig())
    weights = ["--model.weights", str(file), "--model.bert", "null"]
    result = run(tmp_path / "runs", "fit", folder, *weights, "--model.slope.backward_refresh_steps", "10")
    assert f"layers are still those of {file}" in capsys.readouterr().out
    state = torch.load(result["checkpoint"], weights_only=True)["state_dict"]
    masks = [name for name in state if name.endswith(".indices")]
    assert len(masks) > 5
    for name in masks:
        assert torch.equal(state[name], saved[name]), name
    assert not torch.equal(state[masks[0].replace("indices", "values")], saved[masks[0].replace("indices", "values")])
    # A run that is resumed after the file was removed ends as well.
    file.unlink()
    more = ["--ckpt_path", result["checkpoint"], "--trainer.max_steps", str(result["steps"] + 5)]
    run(tmp_path / "runs", "fit", folder, *weights, *more)
    assert f"{file} is not there any more: WHETHER THE MASKS" in capsys.readouterr().out


def test_a_file_that_is_no_pretraining_checkpoint_is_refused(folder, tmp_path, fitted):
    with pytest.raises(CheckpointError):
        run(tmp_path, "fit", folder, "--model.weights", fitted["checkpoint"], "--model.bert", "null")


@pytest.mark.parametrize(
    ("config", "task", "message"),
    [
        ("glue_dense.yaml", "rte", "of a 2:4 sparse model, the configuration is dense: use glue.yaml"),
        ("glue.yaml", "mrpc", "the checkpoint is of rte, the task is mrpc: use --data.task rte"),
    ],
)
def test_checkpoint_of_another_kind_is_refused(fitted, folder, tmp_path, config, task, message):
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path, "validate", folder, "--ckpt_path", fitted["checkpoint"], config=config, task=task)


def test_foreign_checkpoint_is_refused(folder, tmp_path):
    file = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(2)}, "pytorch-lightning_version": "2.6.6"}, file)
    with pytest.raises(CheckpointError, match="of another model: none of its 1 tensors"):
        run(tmp_path, "validate", folder, "--ckpt_path", str(file))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 1000}, "the tokenizer has 2048 tokens, the model's vocabulary 1000"),
        ({"max_position_embeddings": 32}, "data.max_length is 64, but the model has 32 positions"),
    ],
)
def test_sizes_that_do_not_fit_are_named_before_training(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "fit", folder, "--model.bert", json.dumps(TINY | changes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.slope.adapter_rank", "-1"], "adapter_rank=-1"),
        (["--model.learning_rate", "0"], "learning_rate=0"),
        (["--data.task", "imdb"], "imdb"),
        (["--data.source", "no/such/folder/here"], "no/such/folder/here"),
        (["--model.weights", "./no_such_folder", "--model.bert", "null"], "no_such_folder"),
    ],
)
def test_wrong_values_are_named_before_training(capsys, folder, tmp_path, arguments, message):
    with pytest.raises((SystemExit, ValueError, OSError)) as stop:
        run(tmp_path, "fit", folder, *arguments)
    assert message in capsys.readouterr().err + str(stop.value)


def test_data_and_model_of_different_tasks_are_refused(folder, tmp_path):
    module = BertGlue("cola", bert=TINY)
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    with pytest.raises(ValueError, match="the data is rte's, the model cola's"):
        trainer.fit(module, datamodule=GlueDataModule("rte", str(folder), str(VOCABULARY)))


@pytest.mark.parametrize("required", [False, True])
def test_unreachable_hub_is_a_loud_warning_or_an_error(monkeypatch, required):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(BertConfig, "large", lambda: BertConfig(**TINY))
    module = BertGlue(weights="no-one/no-such-model", require_weights=required, slope=SLoPeConfig())
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    expected = (
        pytest.raises(OSError, match="no-one/no-such-model")
        if required
        else pytest.warns(UserWarning, match="STARTING FROM RANDOM WEIGHTS.*no-one/no-such-model")
    )
    with expected:
        module.configure_model()
