"""The SQuAD and GLUE recipes on encoders of transformers, as a user runs them: fit, validate, export, teacher, refusals."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from recipes.bert_large import glue, squad
from recipes.bert_large.glue_module import BertGlue
from recipes.bert_large.glue_sample import write_sample
from recipes.bert_large.module import BertSquad
from slope_pl import CheckpointError, ConfigError, ConversionError, sparse_layers
from slope_pl.lightning import Distillation, frozen_copy
from slope_pl.models import Encoder, PretrainedMismatchError
from tests.unit.test_pair_tokenizer import folder as roberta_tokenizer  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data" / "sample"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory, roberta_tokenizer):  # noqa: F811
    """A pretrained model's folder, with its tokeniser."""
    path = tmp_path_factory.mktemp("encoder") / "roberta"
    config = hf.RobertaConfig(**SIZES, vocab_size=600, max_position_embeddings=98, type_vocab_size=1)
    hf.RobertaModel(config).save_pretrained(path)
    (path / "tokenizer.json").write_text((roberta_tokenizer / "tokenizer.json").read_text())
    return path


@pytest.fixture(scope="module")
def distilbert(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "distilbert"
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    hf.DistilBertModel(hf.DistilBertConfig(**sizes, vocab_size=2048, max_position_embeddings=96)).save_pretrained(path)
    (path / "vocab.txt").write_text((SAMPLE / "vocab.txt").read_text())
    return path


def run(main, tmp_path: Path, subcommand: str, weights: Path, *arguments: str, config: str) -> dict:
    """Run a recipe's own command line; returns what it wrote into its result file."""
    name = f"{subcommand}-{len(list(tmp_path.iterdir()))}"
    main(
        [
            *(subcommand, "--config", str(ROOT / "recipes/bert_large" / config)),
            *("--model.weights", str(weights), "--data.tokenizer", str(weights), "--data.num_workers", "0"),
            *("--trainer.precision", "32-true", "--trainer.accelerator", "cpu", "--trainer.num_sanity_val_steps", "0"),
            *("--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.logger.init_args.name", name),
            *arguments,
        ]
    )
    files = list((tmp_path / name).glob(f"**/result-{subcommand}.json"))
    return json.loads(files[0].read_text()) if files else {}


def on_glue(tmp_path, subcommand, weights, data, *arguments, task="rte", config="glue.yaml"):
    short = ["--trainer.max_steps", "20", "--data.batch_size", "8"] if subcommand == "fit" else []
    place = ["--data.source", str(data), "--data.task", task, "--data.max_length", "64"]
    return run(glue.main, tmp_path, subcommand, weights, *place, *short, *arguments, config=config)


def on_squad(tmp_path, subcommand, weights, *arguments, config="squad.yaml"):
    place = ["--data.source", str(SAMPLE), "--data.max_length", "96", "--data.doc_stride", "48"]
    place += ["--data.max_question_length", "24", "--data.max_dev_questions", "12", "--data.max_train_questions", "40"]
    short = ["--data.batch_size", "8", "--trainer.max_epochs", "1"] if subcommand == "fit" else []
    return run(squad.main, tmp_path, subcommand, weights, *place, *short, *arguments, config=config)


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
@pytest.mark.parametrize("task", ["rte", "stsb"])
def test_glue(request, tmp_path, data, kind, task):
    weights = request.getfixturevalue(kind)
    found = on_glue(tmp_path, "fit", weights, data, "--model.slope.mask_calibration_batches", "2", task=task)
    assert found["model"] == "2:4 sparse"
    again = on_glue(tmp_path, "validate", weights, data, "--ckpt_path", found["checkpoint"], task=task,
                    config="glue.yaml")  # fmt: skip
    assert again["scores"] == found["scores"]


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_squad(request, tmp_path, kind):
    weights = request.getfixturevalue(kind)
    found = on_squad(tmp_path, "fit", weights)
    assert found["model"] == "2:4 sparse"
    assert on_squad(tmp_path, "validate", weights, "--ckpt_path", found["checkpoint"])["scores"] == found["scores"]


def test_what_is_fresh_is_said(tmp_path, data, distilbert, caplog):
    short = ["--trainer.max_steps", "1"]
    on_glue(tmp_path, "fit", distilbert, data, *short, config="glue_dense.yaml")
    heads = "classifier.bias, classifier.weight, pre_classifier.bias, pre_classifier.weight"
    assert f"Weights from {distilbert}: a distilbert of transformers, 4 tensors fresh ({heads})." in caplog.text
    folder = tmp_path / "with-head"
    config = hf.DistilBertConfig.from_pretrained(distilbert)
    hf.DistilBertForSequenceClassification(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text((SAMPLE / "vocab.txt").read_text())
    on_glue(tmp_path, "fit", folder, data, *short, config="glue_dense.yaml")
    assert f"Weights from {folder}: a distilbert of transformers, head included." in caplog.text


def test_a_checkpoint_is_enough_to_rebuild_and_export(tmp_path, data, roberta):
    trace = "--trainer.callbacks+=recipes.adapters.AdapterTrace"
    found = on_glue(tmp_path, "fit", roberta, data, "--model.slope.adapter_rank", "4", trace)
    assert Path(found["checkpoint"]).parents[1].joinpath("adapters.csv").is_file()
    module = BertGlue.load_from_checkpoint(found["checkpoint"], weights_only=True).eval()
    assert isinstance(module.net, Encoder)
    assert all(layer.adapters_awake for layer in sparse_layers(module).values())
    glue.main(["export", "--ckpt_path", found["checkpoint"], "--folder", str(tmp_path / "hf")])
    dense = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    assert dense.config.id2label == {0: "entailment", 1: "not_entailment"}
    ids = torch.randint(5, 600, (2, 30))
    with torch.no_grad():
        ours = module({"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids * 0})
        torch.testing.assert_close(ours, dense(ids).logits, rtol=0, atol=1e-5)


def test_teacher_and_both_stages(tmp_path, data, roberta):
    dense = on_glue(tmp_path, "fit", roberta, data, config="glue_dense.yaml")
    teacher = ["--model.teacher.checkpoint", dense["checkpoint"], "--model.teacher.temperature", "2"]
    faded = on_glue(tmp_path, "fit", roberta, data, "--model.fade", "0.5", *teacher)
    assert faded["model"] == "dense"
    weights = ["--model.weights", faded["checkpoint"], *teacher]
    found = on_glue(tmp_path, "fit", roberta, data, *weights, "--model.learning_rate", "1e-9", "--trainer.max_steps", "1",
                    "--trainer.val_check_interval", "1")  # fmt: skip
    assert found["model"] == "2:4 sparse"
    assert found["scores"] == faded["scores"]  # the conversion has lost nothing
    # A first stage is resumed and validated as what it is.
    validated = on_glue(tmp_path, "validate", roberta, data, "--model.fade", "0.5", "--ckpt_path", faded["checkpoint"])
    assert validated["scores"] == faded["scores"]
    with pytest.raises(CheckpointError, match="the checkpoint is of a dense model, the configuration is 2:4 sparse"):
        on_glue(tmp_path, "validate", roberta, data, "--ckpt_path", faded["checkpoint"])


def test_weights_that_are_not_those_of_the_first_stages_end(tmp_path, data, distilbert, checkpoints):
    content = torch.load(checkpoints["faded"], weights_only=True)
    content["state_dict"]["net.model.distilbert.transformer.layer.1.ffn.lin1.weight"].normal_()
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ConversionError, match=r"layer .*ffn\.lin1' has another mask than it was faded to"):
        on_glue(tmp_path, "fit", distilbert, data, "--model.weights", str(tmp_path / "other.ckpt"))


@pytest.mark.parametrize("task", ["rte", "stsb", "squad"])
def test_the_loss_is_the_distance_to_the_teacher_where_labels_are_ignored(monkeypatch, task):
    architecture = SIZES | {"vocab_size": 64, "max_position_embeddings": 16}
    module = BertSquad(bert=architecture) if task == "squad" else BertGlue(task, bert=architecture)
    module.configure_model()
    module.eval()
    monkeypatch.setattr(module, "log", lambda *args, **options: None)
    ids = torch.randint(0, 64, (4, 8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids * 0}
    labels = torch.tensor([0.5, 4.0, 1.0, 2.0]) if task == "stsb" else torch.tensor([0, 1, 1, 0])
    batch |= {"start_positions": labels, "end_positions": labels} if task == "squad" else {"labels": labels}
    alone = module.training_step(batch, 0)
    assert alone > 0.1
    module.distillation = Distillation(frozen_copy(module.net), module.head, weight=0.75)
    torch.testing.assert_close(module.training_step(batch, 0), 0.25 * alone)  # its own copy is at no distance


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, data, distilbert):
    """Of a dense run, a sparse one, a first stage and one that has not faded to its end."""
    path = tmp_path_factory.mktemp("runs")
    dense = on_glue(path, "fit", distilbert, data, config="glue_dense.yaml")["checkpoint"]
    sparse = on_glue(path, "fit", distilbert, data)["checkpoint"]
    faded = on_glue(path, "fit", distilbert, data, "--model.fade", "0.5")["checkpoint"]
    content = torch.load(faded, weights_only=True)
    content["callbacks"]["FadeCallback"]["factor"] = 0.5
    torch.save(content, path / "half.ckpt")
    return {"dense": dense, "sparse": sparse, "faded": faded, "half": str(path / "half.ckpt")}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--model.fade", "0"], ConfigError, "fade=0.0: a share of the steps"),
        (["--model.fade", "1.5"], ConfigError, "fade=1.5"),
        (["--model.fade", "0.5", "--model.slope.adapter_rank", "4"], ConfigError, "is dense and has no adapters"),
        (["--model.fade", "0.5", "--model.slope", "null"], ConfigError, "fade=0.5 has no effect on a dense model"),
        (["--model.fade", "0.5", "--model.weights", "{faded}"], ConfigError, "have faded already"),
        (["--model.weights", "{faded}", "--model.slope.mask_calibration_batches", "2"], ConfigError, "chosen in the first"),
        (["--model.weights", "{faded}", "--model.slope.mask", "random"], ConfigError, "would throw away the masks"),
        (["--model.weights", "{faded}", "--model.slope", "null"], ConfigError, "a dense run would fill them again"),
        (["--model.weights", "{half}"], CheckpointError, "pruned entries are at 50% of their size"),
        (["--model.weights", "{sparse}"], CheckpointError, "model.weights is .* of a 2:4 sparse model"),
        (["--model.teacher.checkpoint", "{sparse}"], CheckpointError, "model.teacher.checkpoint is .* of a 2:4 sparse"),
        (["--model.teacher.checkpoint", "no.ckpt"], CheckpointError, "no.ckpt: no such file"),
        (["--model.teacher.checkpoint", "{dense}", "--model.teacher.weight", "0"], ConfigError, "weight=0"),
        (["--model.weights", "{dense}", "--data.task", "mrpc"], CheckpointError, "of rte; this run's task is mrpc"),
        (["--model.teacher.checkpoint", "{dense}", "--data.task", "mrpc"], CheckpointError, "this run's task is mrpc"),
        (["--model.encoder", '{{"model_type": "distilbert"}}'], ConfigError, "model.encoder is set beside weights"),
        (["--model.bert.num_hidden_layers", "2"], ConfigError, "model.bert is set beside weights"),
        (["--data.max_length", "120"], ValueError, "data.max_length is 120, but the model has 96 positions"),
    ],
)  # fmt: skip
def test_what_has_no_effect_or_does_not_fit_is_refused(
    tmp_path, data, distilbert, checkpoints, arguments, error, message
):
    given = [argument.format(**checkpoints) for argument in arguments]
    with pytest.raises(error, match=message):
        on_glue(tmp_path, "fit", distilbert, data, *given)
    assert not list(tmp_path.glob("**/*.ckpt"))


def test_tokenizer_of_another_model_is_refused(tmp_path, data, roberta, distilbert):
    with pytest.raises(ValueError, match="the tokenizer has 2048 tokens, the model's vocabulary 600"):
        on_glue(tmp_path, "fit", roberta, data, "--data.tokenizer", str(distilbert))
    with pytest.raises(ValueError, match="the tokenizer pads with 1, the model with 0"):
        on_glue(tmp_path, "fit", distilbert, data, "--data.tokenizer", str(roberta))


@pytest.mark.parametrize("labels", [["contradiction", "neutral", "entailment"], ["not_entailment", "entailment"]])
def test_a_head_of_other_labels_is_refused_as_with_bert(tmp_path, data, distilbert, labels):
    """transformers would make one of another size anew without a word, and take one of this size as it is."""
    config = hf.DistilBertConfig.from_pretrained(distilbert, id2label=dict(enumerate(labels)))
    folder = tmp_path / "weights"
    hf.DistilBertForSequenceClassification(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text((SAMPLE / "vocab.txt").read_text())
    with pytest.raises(PretrainedMismatchError, match=f"labels are {', '.join(labels)}, those of rte are entailment"):
        on_glue(tmp_path, "fit", folder, data)


def test_temperature_has_no_effect_in_regression(tmp_path, data, distilbert, checkpoints):
    given = ["--model.teacher.checkpoint", checkpoints["dense"], "--model.teacher.temperature", "2"]
    with pytest.raises(ConfigError, match="no effect in regression"):
        on_glue(tmp_path, "fit", distilbert, data, *given, task="stsb")


def test_a_model_that_is_no_encoder_is_refused(tmp_path, data, distilbert):
    config = hf.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=2048)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="it is a gpt2, expected an encoder"):
        on_glue(tmp_path, "fit", distilbert, data, "--model.weights", str(tmp_path / "gpt2"))
