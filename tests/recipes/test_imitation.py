"""Recovery as a user runs it: a pruned BERT of two layers learns the hidden states of its dense self, then goes on to GLUE."""

import csv
import shutil
from dataclasses import replace

import pytest
import torch

from recipes.bert_large.glue_sample import write_sample
from recipes.bert_large.imitation import ImitationConfig, load_imitated
from recipes.bert_large.pretrain_module import BertPretraining
from slope_pl import (
    CheckpointError,
    SLoPeConfig,
    dense_state_dict,
    sparse_layers,
)
from slope_pl.models import (
    BertConfig,
    BertForPreTraining,
    BertModel,
    load_config,
    load_pretrained,
    save_pretrained,
)
from slope_pl.models.bert_heads import BertLMPredictionHead
from tests.recipes import test_glue_recipe, test_pretrain_recipe
from tests.recipes.test_pretrain_recipe import ROOT, SMALL, state_of
from tests.unit.bert_cases import randomise
from tests.unit.test_hidden_states import missed, share

# Weights ten times larger than BERT's: pruning then changes the hidden states, which are mostly embeddings otherwise.
CONFIG = BertConfig(**SMALL, initializer_range=0.2)
MISSED = "of the teacher's hidden states missed"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A Hugging Face folder of a dense BERT."""
    torch.manual_seed(1)
    folder = save_pretrained(randomise(BertForPreTraining(CONFIG)), tmp_path_factory.mktemp("weights"))
    (folder / "vocab.txt").write_text((ROOT / "data/sample/vocab.txt").read_text())
    return str(folder)


def run(tmp_path, subcommand, weights, *arguments, config="pretrain_recover.yaml", bert=None):
    """The recipe's command line, cut down to 12 steps of 8 short texts; a value of every step is in metrics.csv."""
    start = ["--model.weights", weights or "null", *(["--data.tokenizer", weights] if weights else [])]
    start += ["--data.separator", "\n\n", "--data.max_length", "32", "--data.max_predictions", "5"]
    start += ["--data.num_workers", "0", "--data.eval_batch_size", "8", "--trainer.precision", "32-true"]
    start += ["--trainer.logger.class_path", "lightning.pytorch.loggers.CSVLogger", "--trainer.log_every_n_steps", "1"]
    return test_pretrain_recipe.run(tmp_path, subcommand, *start, *arguments, config=config, bert=bert)


def curves(result):
    """What was logged: by name, the values in their order."""
    with open(f"{result['rows']['log']}/metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def dense_weights(result):
    """The trained net by a dense one's names, zeros in place of what was pruned."""
    return dense_state_dict(BertPretraining.load_from_checkpoint(result["checkpoint"], weights_only=True).net)


def start_of(weights):
    net = BertForPreTraining(load_config(weights))
    load_pretrained(net, weights)
    return net.state_dict()


@pytest.fixture(scope="module")
def fitted(weights, tmp_path_factory):
    return run(
        tmp_path_factory.mktemp("fit"),
        "fit",
        weights,
        "--trainer.max_steps",
        "24",
        "--trainer.val_check_interval",
        "12",
    )


@pytest.fixture(scope="module")
def adapted(weights, tmp_path_factory):
    """With calibrated masks and adapters that are awake from the first step, as a start for fine-tuning."""
    slope = ["--model.slope.adapter_rank", "4", "--model.slope.adapter_start_step", "0"]
    return run(
        tmp_path_factory.mktemp("adapted"), "fit", weights, *slope, "--model.slope.mask_calibration_batches", "2"
    )


# A run ----------------------------------------------------------------------------------------------------------------


def test_the_student_learns_the_hidden_states_and_nothing_else(fitted):
    logged = curves(fitted)
    shares = logged["train/imitation"]
    assert len(shares) == 24
    assert sum(shares[-4:]) < 0.6 * sum(shares[:4])
    assert 0 < logged["val/imitation"][1] < logged["val/imitation"][0] < 1
    assert logged["train/loss"] == shares
    assert set(fitted["scores"]) == {"val/imitation", "val/loss"}
    assert fitted["scores"]["val/imitation"] == fitted["scores"]["val/loss"]
    assert not [name for name in logged if "mlm" in name or "nsp" in name]


def test_what_is_logged_is_the_share_of_the_squares_outside_padding(weights, tmp_path, monkeypatch):
    """Of every training batch when it was seen, and of the validation set, whose batches count by their words.

    The pooler's is that of one layer more.
    """
    teacher = BertModel(load_config(weights)).eval()
    load_pretrained(teacher, weights)
    expected, words = {}, {}

    def watch(name):
        step = getattr(BertPretraining, name)

        @torch.no_grad()
        def measure(module, batch):
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
            found = [net(**inputs, output_hidden_states=True) for net in (teacher, module.net.bert)]
            states, pooled = [output.hidden_states for output in found], [output.pooler_output for output in found]
            expected.setdefault(name, []).append(missed(*states, batch["attention_mask"], pooled))
            words.setdefault(name, []).append(batch["attention_mask"].sum().item())

        def watched(module, batch, index):
            measure(module, batch)
            return step(module, batch, index)

        monkeypatch.setattr(BertPretraining, name, watched)

    watch("training_step")
    watch("validation_step")
    short = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "4", "--data.max_length", "64"]
    result = run(tmp_path, "fit", weights, *short, "--data.eval_batch_size", "4")
    logged = curves(result)
    assert logged["train/imitation"] == pytest.approx(expected["training_step"], rel=1e-4)
    assert max(words["training_step"]) < 8 * 64
    count = words["validation_step"]
    assert len(set(count)) == len(count) == 2
    assert max(count) < 4 * 64
    mean = sum(part * n for part, n in zip(expected["validation_step"], count, strict=True)) / sum(count)
    assert logged["val/imitation"] == pytest.approx([mean], rel=1e-4)


def test_the_table_says_what_is_missed_and_where_it_began(fitted, weights):
    rows = fitted["rows"]
    assert rows[MISSED] == f"{fitted['scores']['val/imitation']:.4f} (squares)"
    assert rows["started from"] == fitted["started_from"] == weights
    assert not [label for label in rows if "masked words" in label or "sentences" in label]


@pytest.mark.parametrize("kind", ["fitted", "adapted"])
def test_heads_stay_and_encoder_and_pooler_move(kind, weights, request):
    result = request.getfixturevalue(kind)
    before, after = start_of(weights), dense_weights(result)
    assert before.keys() == after.keys()
    heads = [name for name in before if name.startswith("cls.") and name != "cls.predictions.decoder.weight"]
    assert len(heads) == 8
    for name in heads:
        pruned = name == "cls.predictions.transform.dense.weight"
        kept = after[name] != 0
        assert torch.equal(after[name], before[name] * kept if pruned else before[name]), name
        assert not pruned or kept.float().mean() == 0.5
    # All else has moved: layers, pooler, embeddings, and so the decoder's matrix, which is theirs.
    rest = before.keys() - heads
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} < rest
    assert [name for name in rest if torch.equal(before[name] * (after[name] != 0), after[name])] == []
    assert torch.equal(after["cls.predictions.decoder.weight"], after["bert.embeddings.word_embeddings.weight"])


def test_the_pooler_is_learnt_and_not_only_the_states_it_is_given(weights, tmp_path):
    """Of a teacher that differs in its pooler alone, one of three terms is missed, and less and less of it."""
    net = BertForPreTraining(CONFIG)
    load_pretrained(net, weights)
    with torch.no_grad():
        net.bert.pooler.dense.bias += 1.0
    teacher = str(save_pretrained(net, tmp_path / "teacher"))
    same = ["--model.slope", "null", "--model.imitation.teacher", teacher]
    begun = run(tmp_path, "validate", weights, *same)["scores"]["val/imitation"]
    assert begun > 0.05
    result = run(tmp_path, "fit", weights, *same, "--model.learning_rate", "5e-3", "--trainer.max_steps", "24")
    assert result["scores"]["val/imitation"] < 0.5 * begun
    before, after, wanted = start_of(weights), state_of(result), net.state_dict()
    bias = "bert.pooler.dense.bias"
    assert share(wanted[bias], after[f"net.{bias}"]) < share(wanted[bias], before[bias])


def test_adapters_of_encoder_and_pooler_learn_and_those_of_the_heads_do_not(adapted):
    module = BertPretraining.load_from_checkpoint(adapted["checkpoint"], weights_only=True)
    layers = sparse_layers(module)
    assert (len(layers), adapted["woke_at_step"]) == (11, 0)
    assert all(layer.adapters_awake for layer in layers.values())
    still = [name for name, layer in layers.items() if not layer.adapter_up.any()]
    assert still == ["net.cls.predictions.transform.dense"]


@pytest.mark.parametrize(("weight", "decoded"), [("1.0", False), ("0.5", True)])
def test_words_are_decoded_where_that_is_learnt(weights, tmp_path, monkeypatch, weight, decoded):
    """Not for hidden states alone, in training or validation: the logits are the largest tensor of all."""
    seen = {True: set(), False: set()}
    forward = BertLMPredictionHead.forward

    def watched(head, x):
        seen[head.training].add(x.shape[1])
        return forward(head, x)

    monkeypatch.setattr(BertLMPredictionHead, "forward", watched)
    short = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    scores = run(tmp_path, "fit", weights, *short, "--model.imitation.weight", weight)["scores"]
    expected = {5 if decoded else 0}  # of --data.max_predictions
    assert seen == {True: expected, False: expected}
    assert ("val/mlm_accuracy" in scores) == decoded


def test_the_checkpoint_is_that_of_a_run_without_a_teacher(fitted):
    saved = torch.load(fitted["checkpoint"], weights_only=True)
    without = BertPretraining(bert=CONFIG, slope=SLoPeConfig())
    without.configure_model()
    assert saved["state_dict"].keys() == without.state_dict().keys()
    settings = saved["hyper_parameters"]
    assert (settings["dropout"], settings["imitation"]) == (0.0, {"weight": 1.0, "teacher": None})
    assert BertConfig.from_dict(settings["bert"]) == CONFIG
    assert settings["bert"]["hidden_dropout_prob"] == settings["bert"]["attention_probs_dropout_prob"] == 0.1


def test_a_module_that_was_made_in_python_leaves_a_plain_checkpoint_too(tmp_path):
    module = BertPretraining(bert=CONFIG, weights="folder", imitation=ImitationConfig(weight=0.5, teacher="other"))
    module.configure_model()
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(content)
    torch.save(content, tmp_path / "a.ckpt")
    settings = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert settings["imitation"] == {"weight": 0.5, "teacher": "other"}
    again = BertPretraining(bert=CONFIG, weights="folder", imitation=settings["imitation"])
    assert again.imitation == ImitationConfig(weight=0.5, teacher="other")


def test_validate_from_the_checkpoint_gives_the_same_scores(fitted, weights, tmp_path):
    found = run(tmp_path, "validate", weights, "--ckpt_path", fitted["checkpoint"])
    assert found["scores"] == fitted["scores"]
    assert found["rows"][MISSED] == fitted["rows"][MISSED]


def test_with_less_than_all_the_weight_the_heads_learn_too(weights, tmp_path):
    result = run(tmp_path, "fit", weights, "--model.imitation.weight", "0.25", "--trainer.max_steps", "6")
    logged, scores = curves(result), result["scores"]
    names = ("train/mlm_loss", "train/nsp_loss", "train/imitation", "train/loss")
    for mlm, nsp, imitated, loss in zip(*(logged[name] for name in names), strict=True):
        assert 0 < imitated < 1 < mlm
        assert loss == pytest.approx(0.75 * (mlm + nsp) + 0.25 * imitated, rel=1e-5)
    assert set(scores) == {
        f"val/{k}" for k in ("imitation", "loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy")
    }
    assert scores["val/loss"] == pytest.approx(scores["val/mlm_loss"] + scores["val/nsp_loss"], rel=1e-6)
    assert {MISSED, "masked words right"} <= result["rows"].keys()
    before, after = start_of(weights), dense_weights(result)
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_a_student_that_is_not_pruned_misses_nothing_but_what_dropout_takes(weights, tmp_path):
    short = ["--model.slope", "null", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    assert curves(run(tmp_path, "fit", weights, *short))["train/imitation"] == pytest.approx([0.0], abs=1e-9)
    (taken,) = curves(run(tmp_path, "fit", weights, *short, "--model.dropout", "null"))["train/imitation"]
    assert taken > 0.01
    # Validation is without dropout in any case.
    found = run(tmp_path, "validate", weights, "--model.slope", "null", "--model.dropout", "null")
    assert found["scores"]["val/imitation"] == pytest.approx(0.0, abs=1e-9)
    assert found["model"] == "dense"
    assert run(tmp_path, "validate", weights)["scores"]["val/imitation"] > 0.01


def test_resume_equals_the_uninterrupted_run(weights, tmp_path):
    """From the checkpoint of step 6, in the middle of an epoch, with dropout, to step 12: bit for bit."""
    middle = tmp_path / "middle"
    common = ["--model.dropout", "0.2", "--trainer.callbacks+", "lightning.pytorch.callbacks.ModelCheckpoint"]
    common += ["--trainer.callbacks.dirpath", str(middle), "--trainer.callbacks.every_n_train_steps", "6"]
    common += ["--trainer.callbacks.save_top_k", "-1"]
    whole = run(tmp_path, "fit", weights, *common)
    (checkpoint,) = middle.glob("*step=6.ckpt")
    resumed = run(tmp_path, "fit", weights, *common, "--ckpt_path", str(checkpoint))
    assert resumed["scores"] == whole["scores"]
    assert curves(resumed)["train/imitation"] == curves(whole)["train/imitation"][6:]
    a, b = state_of(whole), state_of(resumed)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# What follows, and what comes before ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "rank"), [("fitted", "0"), ("adapted", "4")])
def test_fine_tuning_keeps_masks_and_has_dropout_again(kind, rank, request, tmp_path, capsys):
    recovered = request.getfixturevalue(kind)["checkpoint"]
    start = ["--model.weights", recovered, "--model.bert", "null", "--model.slope.adapter_rank", rank]
    glue = write_sample(tmp_path / "glue")
    tuned = test_glue_recipe.run(tmp_path, "fit", glue, *start, "--trainer.max_steps", "4")["checkpoint"]
    assert f"Masks of 10 layers are still those of {recovered}." in capsys.readouterr().out
    before, after = (torch.load(file, weights_only=True) for file in (recovered, tuned))
    old, new = before["state_dict"], after["state_dict"]
    masks = [name for name in new if name.endswith(".indices")]
    assert len(masks) == 10  # the encoder's nine, and the pooler
    assert [name for name in masks if not torch.equal(old[name], new[name])] == []
    values = [name for name in new if name.endswith(".values")]
    assert [name for name in values if torch.equal(old[name], new[name])] == []  # nothing is frozen any more
    assert {int(new[name]) for name in new if name.endswith("adapter_active")} == {int(rank != "0")}
    assert after["hyper_parameters"]["bert"]["hidden_dropout_prob"] == 0.1


@pytest.fixture(scope="module")
def dense(weights, tmp_path_factory):
    """A dense checkpoint of the recipe, whose weights are not the folder's."""
    folder = tmp_path_factory.mktemp("dense")
    found = run(folder, "fit", weights, "--trainer.max_steps", "4", config="pretrain_tiny_dense.yaml", bert=SMALL)
    return found["checkpoint"]


def test_a_dense_checkpoint_teaches_what_starts_from_it(dense, weights, tmp_path):
    start = ["--model.start_from", dense, "--data.tokenizer", weights]
    same = run(tmp_path, "validate", None, *start, "--model.slope", "null")
    assert same["scores"]["val/imitation"] == pytest.approx(0.0, abs=1e-9)
    found = run(tmp_path, "fit", None, *start)
    logged = curves(found)["train/imitation"]
    assert logged[-1] < logged[0] < 1
    assert found["started_from"] == dense


def test_a_teacher_that_is_named_is_the_one(dense, fitted, weights, tmp_path):
    """Beside other weights it is not them; and a recovery goes on from a sparse checkpoint, if its teacher is named."""
    named = ["--model.imitation.teacher", dense]
    assert run(tmp_path, "validate", weights, "--model.slope", "null", *named)["scores"]["val/imitation"] > 1e-4
    start = ["--model.start_from", fitted["checkpoint"], "--data.tokenizer", weights]
    again = run(tmp_path, "validate", None, *start, "--model.imitation.teacher", weights)
    assert again["scores"] == fitted["scores"]
    with pytest.raises(CheckpointError, match="is of a 2:4 sparse model, which is no teacher: name a dense one"):
        run(tmp_path, "fit", None, *start)


@pytest.mark.parametrize("place", ["{weights}", "{dense}", "{home}/teacher", "~/teacher", "{home}/teacher.pt"])
def test_the_teacher_is_encoder_and_pooler_of_its_source(dense, weights, tmp_path, monkeypatch, place):
    """A checkpoint is one under any name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("teacher", "teacher.pt"):
        shutil.copy(dense, tmp_path / name)
    saved = {name.removeprefix("net."): tensor for name, tensor in torch.load(dense)["state_dict"].items()}
    net = BertForPreTraining(CONFIG).eval()
    net.load_state_dict(start_of(weights) if place == "{weights}" else saved, strict=False)
    source = place.format(weights=weights, dense=dense, home=tmp_path)
    teacher = load_imitated(source, CONFIG, 2048, 64).eval()
    assert isinstance(teacher, BertModel)
    ids = torch.randint(5, 2048, (2, 16))
    theirs, expected = teacher(ids), net.bert(ids)
    assert torch.equal(theirs.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(theirs.pooler_output, expected.pooler_output)


def test_a_sparse_checkpoint_is_no_teacher_under_another_name_either(fitted, tmp_path):
    shutil.copy(fitted["checkpoint"], tmp_path / "teacher")
    with pytest.raises(CheckpointError, match="teacher is of a 2:4 sparse model, which is no teacher"):
        load_imitated(str(tmp_path / "teacher"), CONFIG, 2048, 64)


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.imitation.weight", "0"], "model.imitation.weight=0.0: above 0 and at most 1"),
        (["--model.imitation.weight", "2"], "model.imitation.weight=2.0: above 0 and at most 1"),
        (["--model.weights", "null"], "model.imitation has nothing to imitate: the run starts from random weights"),
        (["--model.dropout", "1.0"], "dropout=1.0: 0 or more, and below 1"),
        (["--model.dropout", "-0.1"], "dropout=-0.1: 0 or more"),
        (["--model.imitation.teacher", "{deep}"], "has num_hidden_layers=3, the model 2: hidden states are compared"),
        (["--model.imitation.teacher", "{few}"], "has 2048 tokens, the teacher {few} a vocabulary of 2047"),
        (["--model.imitation.teacher", "{short}"], "data.max_length is 32, but the teacher {short} has 31 positions"),
        (["--model.imitation.teacher", "{nowhere}"], "no teacher to imitate: No such folder: {nowhere}"),
        (["--model.imitation.teacher", "{nowhere}"], "Another place: model.imitation.teacher."),
        (["--model.imitation.teacher", "{empty}"], "no teacher to imitate: {empty} lacks config.json and weights"),
        (["--model.imitation.teacher", ""], "no teacher to imitate: . lacks config.json"),
    ],
)
def test_settings_that_do_not_fit_are_named_before_training(weights, tmp_path, capsys, arguments, message):
    others = {"deep": {"num_hidden_layers": 3}, "few": {"vocab_size": 2047}, "short": {"max_position_embeddings": 31}}
    for name, change in others.items():
        save_pretrained(BertModel(replace(CONFIG, **change)), tmp_path / name)
    (tmp_path / "empty").mkdir()
    folders = {name: str(tmp_path / name) for name in (*others, "empty", "nowhere")}
    with pytest.raises((SystemExit, ValueError)) as stop:
        run(tmp_path, "fit", weights, *(argument.format(**folders) for argument in arguments))
    assert message.format(**folders) in capsys.readouterr().err + str(stop.value)
    assert not list(tmp_path.glob("**/metrics.csv"))
