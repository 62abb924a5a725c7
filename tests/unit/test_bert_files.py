"""BERT's weights on disk: what transformers writes we read, what we write it reads, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from slope_pl.models import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    PretrainedFilesError,
    PretrainedMismatchError,
    PretrainedUnavailableError,
    hf,
    hf_files,
    load_config,
    load_pretrained,
    locate_pretrained,
    save_pretrained,
)
from tests.unit.bert_cases import KINDS, MINI, batch, build, build_theirs, difference, same_outputs

# --- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_we_save(kind, tmp_path):
    model = build(kind)
    assert save_pretrained(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    theirs, info = KINDS[kind][1].from_pretrained(tmp_path / "new" / "folder", output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == json.loads((tmp_path / "new/folder/config.json").read_text())["architectures"][0]
    assert difference(kind, model, theirs.eval(), batch()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_auto_model_finds_the_class(kind, tmp_path):
    auto = {
        "base": transformers.AutoModel,
        "pretraining": transformers.AutoModelForPreTraining,
        "qa": transformers.AutoModelForQuestionAnswering,
        "classification": transformers.AutoModelForSequenceClassification,
    }
    model = build(kind)
    save_pretrained(model, tmp_path)
    assert difference(kind, model, auto[kind].from_pretrained(tmp_path).eval(), batch()) < 1e-5


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_we_load_what_transformers_saves(kind, shard, tmp_path):
    theirs, ours = build_theirs(kind), build(kind, seed=9)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(locate_pretrained(tmp_path).weights) == (1 if shard == "5GB" else len(list(tmp_path.glob("model-*"))))
    report = load_pretrained(ours, tmp_path)
    assert report.missing == report.unexpected == ()
    assert set(report.loaded) == {name for name, _ in ours.named_parameters()}
    assert report.summary().startswith(f"{len(report.loaded)} tensors loaded, 0 missing")
    assert difference(kind, ours, theirs, batch()) < 1e-5


def test_the_file_holds_the_tied_decoder_once_and_the_format(tmp_path):
    model = build("pretraining")
    save_pretrained(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert set(load_file(tmp_path / "model.safetensors")) == {name for name, _ in model.named_parameters()}
    assert b'"format":"pt"' in (tmp_path / "model.safetensors").read_bytes()[:200]


def test_the_decoder_stays_tied_after_loading(tmp_path):
    save_pretrained(build("pretraining"), tmp_path)
    model = build("pretraining", seed=9)
    load_pretrained(model, tmp_path)
    predictions = model.cls["predictions"]
    assert predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert predictions.decoder.bias is predictions.bias


def test_the_encoder_of_another_head_loads_and_the_report_names_the_rest(tmp_path):
    source, model = build("pretraining"), build("qa", seed=9)
    save_pretrained(source, tmp_path)
    head = model.qa_outputs.weight.clone()
    report = load_pretrained(model, tmp_path)
    assert report.missing == ("qa_outputs.weight", "qa_outputs.bias")
    assert "cls.predictions.bias" in report.unexpected
    assert "bert.pooler.dense.weight" in report.unexpected
    assert len(report.unexpected) == 9
    assert "2 missing and freshly initialised (qa_outputs.weight, qa_outputs.bias), 9 unexpected" in report.summary()
    assert "\n" not in report.summary()
    assert torch.equal(model.qa_outputs.weight, head)
    inputs = batch()
    assert torch.equal(model.bert(**inputs).last_hidden_state, source.bert(**inputs).last_hidden_state)


@pytest.mark.parametrize(("first", "second"), [("base", "classification"), ("classification", "base")])
def test_the_prefix_is_added_and_removed(first, second, tmp_path):
    source, model = build(first), build(second, seed=9)
    save_pretrained(source, tmp_path)
    report = load_pretrained(model, tmp_path)
    head = ("classifier.weight", "classifier.bias")
    assert (report.missing, sorted(report.unexpected)) in ((head, []), ((), sorted(head)))
    assert same_outputs(getattr(source, "bert", source), getattr(model, "bert", model), batch())


def write(folder: Path, tensors, config=MINI, **content):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | content))
    save_file({name: t.detach().clone() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def parameters_of(model):
    return dict(model.named_parameters())


def test_old_names_and_position_buffers_are_understood(tmp_path):
    source, model = build("pretraining"), build("pretraining", seed=9)
    rename = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {"bert.embeddings.position_ids": torch.arange(24)[None]}
    for name, tensor in parameters_of(source).items():
        for new, old in rename.items():
            name = name.replace(new, old)
        tensors[name] = tensor
    # Files of old have the decoder under its own names.
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")
    report = load_pretrained(model, write(tmp_path, tensors))
    assert report.missing == report.unexpected == ()
    assert same_outputs(source, model, batch())


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_files_are_read(sharded, tmp_path):
    source, model = build("qa"), build("qa", seed=9)
    write(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    items = list(source.state_dict().items())
    if sharded:
        shards = {"pytorch_model-1.bin": items[::2], "pytorch_model-2.bin": items[1::2]}
        weight_map = {name: shard for shard, part in shards.items() for name, _ in part}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        shards = {"pytorch_model.bin": items}
    for shard, part in shards.items():
        torch.save(dict(part), tmp_path / shard)
    load_pretrained(model, tmp_path)
    assert same_outputs(source, model, batch())


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    write(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": Path.home}, tmp_path / "pytorch_model.bin")
    with pytest.raises(PretrainedFilesError, match=r"pytorch_model.bin is damaged or holds no weights"):
        load_pretrained(build("qa"), tmp_path)


def test_a_pointer_file_of_git_lfs_is_recognised(tmp_path):
    write(tmp_path, {})
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(PretrainedFilesError, match=r"model.safetensors is damaged .* run git lfs pull"):
        load_pretrained(build("qa"), tmp_path)


def test_half_precision_checkpoints_take_the_dtype_of_the_model(tmp_path):
    source, model = build("qa").half(), build("qa", seed=9)
    load_pretrained(model, save_pretrained(source, tmp_path))
    assert load_file(tmp_path / "model.safetensors")["qa_outputs.weight"].dtype == torch.float16
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert same_outputs(model, source.float(), batch())


def test_a_larger_vocabulary_is_padded_with_zeros(tmp_path):
    source, model = build("pretraining"), build("pretraining", replace(MINI, vocab_size=104), seed=9)
    report = load_pretrained(model, save_pretrained(source, tmp_path))
    assert report.padded_rows == 7
    assert report.summary().endswith(", 7 vocabulary rows padded with zeros")
    words, bias = model.bert.embeddings.word_embeddings.weight, model.cls["predictions"].bias
    assert torch.equal(words[:97], source.bert.embeddings.word_embeddings.weight)
    assert (words[97:] == 0).all()
    assert (bias[97:] == 0).all()
    logits = model(**batch()).prediction_logits[..., :97]
    torch.testing.assert_close(logits, source(**batch()).prediction_logits, rtol=0, atol=1e-5)


def fails_untouched(model, folder, message, error=PretrainedMismatchError):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        load_pretrained(model, folder)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_smaller_vocabulary_is_refused(tmp_path):
    save_pretrained(build("qa", replace(MINI, vocab_size=104)), tmp_path)
    message = r"bert.embeddings.word_embeddings.weight has shape \(104, 32\).*\(97, 32\).*set vocab_size=104"
    fails_untouched(build("qa", seed=9), tmp_path, message)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 64),
        ("num_hidden_layers", 2),
        ("num_attention_heads", 8),
        ("intermediate_size", 32),
        ("max_position_embeddings", 16),
        ("type_vocab_size", 3),
        ("layer_norm_eps", 1e-5),
        ("hidden_act", "relu"),
    ],
)
def test_configs_that_disagree_are_refused_naming_the_field(field, value, tmp_path):
    save_pretrained(build("qa", replace(MINI, **{field: value})), tmp_path)
    fails_untouched(build("qa"), tmp_path, f"{field} is {value!r} in .*config.json and {getattr(MINI, field)!r} in")


def test_configs_that_differ_in_dropout_or_in_a_synonym_are_accepted(tmp_path):
    save_pretrained(build("qa", replace(MINI, hidden_act="gelu_new")), tmp_path)
    model = build("qa", replace(MINI, hidden_act="gelu_pytorch_tanh", hidden_dropout_prob=0.0), seed=9)
    assert load_pretrained(model, tmp_path).missing == ()


def test_a_head_of_another_size_is_refused_naming_both_shapes(tmp_path):
    save_pretrained(build("classification"), tmp_path)
    message = r"classifier.weight has shape \(3, 32\) in the checkpoint and \(2, 32\) in the model.*another task"
    fails_untouched(BertForSequenceClassification(MINI, 2), tmp_path, message)


def test_tensors_that_contradict_their_config_are_refused(tmp_path):
    tensors = parameters_of(build("qa"))
    tensors["bert.encoder.layer.2.output.dense.weight"] = torch.zeros(32, 65)
    message = r"bert.encoder.layer.2.output.dense.weight has shape \(32, 65\) in the checkpoint and \(32, 64\)"
    fails_untouched(build("qa", seed=9), write(tmp_path, tensors), message)


def test_a_checkpoint_without_encoder_is_refused(tmp_path):
    fails_untouched(build("qa"), write(tmp_path, {"other.weight": torch.ones(3)}), "lacks 53 tensors of the encoder")


def test_a_checkpoint_with_part_of_the_encoder_is_refused(tmp_path):
    tensors = parameters_of(build("qa"))
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    message = r"lacks 1 tensors of the encoder \(bert.encoder.layer.1.output.dense.weight\)"
    fails_untouched(build("qa", seed=9), write(tmp_path, tensors), message)


def test_integer_weights_are_refused(tmp_path):
    tensors = {name: tensor.to(torch.int8) for name, tensor in parameters_of(build("qa")).items()}
    fails_untouched(build("qa", seed=9), write(tmp_path, tensors), "is torch.int8 in the checkpoint, expected floating")


def test_a_tensor_under_two_names_is_refused(tmp_path):
    tensors = parameters_of(build("qa"))
    tensors["embeddings.LayerNorm.gamma"] = torch.ones(32)
    message = "has both .*embeddings.LayerNorm.* and .*embeddings.LayerNorm.*"
    fails_untouched(build("qa", seed=9), write(tmp_path, tensors), message)


def test_an_untied_decoder_is_refused(tmp_path):
    tensors = parameters_of(build("pretraining"))
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"] + 1
    message = "cls.predictions.decoder.weight differs from bert.embeddings.word_embeddings.weight"
    fails_untouched(build("pretraining", seed=9), write(tmp_path, tensors), message)


def test_a_model_on_the_meta_device_is_refused(tmp_path):
    save_pretrained(build("qa"), tmp_path)
    with torch.device("meta"):
        model = BertForQuestionAnswering(MINI)
    with pytest.raises(PretrainedMismatchError, match="on the meta device"):
        load_pretrained(model, tmp_path)


def test_dense_weights_of_a_sparse_model_can_be_given(tmp_path):
    source, model = build("pretraining"), build("pretraining", seed=9)
    dense = source.state_dict()
    # Two slices of one storage, as when a caller cuts up fused weights, and a transposed one.
    for name in ("query", "key"):
        key = f"bert.encoder.layer.0.attention.self.{name}.weight"
        dense[key] = dense[key].t().contiguous().t()
    fused = torch.cat([dense[f"bert.encoder.layer.1.attention.self.{n}.weight"] for n in ("query", "key")])
    for name, part in zip(("query", "key"), fused.chunk(2), strict=True):
        dense[f"bert.encoder.layer.1.attention.self.{name}.weight"] = part
    model.bert.pooler = torch.nn.Identity()  # the model's own layers are not what is written
    save_pretrained(model, tmp_path, state_dict=dense)
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path).eval()
    assert difference("pretraining", source, theirs, batch()) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qa_outputs.bias": None}, r"1 absent \(qa_outputs.bias\), 0 unexpected"),
        ({"mask": torch.ones(1)}, r"0 absent, 1 unexpected \(mask\)"),
        ({"qa_outputs.bias": torch.ones(3)}, r"1 of another shape \(qa_outputs.bias \(3,\) instead of \(2,\)\)"),
    ],
)
def test_saving_refuses_what_is_not_the_dense_model_and_leaves_the_old_files(change, message, tmp_path):
    model = build("qa")
    save_pretrained(model, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    tensors = {name: tensor for name, tensor in (model.state_dict() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=f"Not the weights of a dense BertForQuestionAnswering: .*{message}"):
        save_pretrained(model, tmp_path, state_dict=tensors)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_refuses_an_untied_decoder(tmp_path):
    model = build("pretraining")
    tensors = model.state_dict() | {"cls.predictions.decoder.bias": torch.ones(97)}
    with pytest.raises(ValueError, match=r"cls.predictions.decoder.bias differs from cls.predictions.bias"):
        save_pretrained(model, tmp_path, state_dict=tensors)


def test_saving_refuses_other_modules(tmp_path):
    with pytest.raises(TypeError, match="not a Linear"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)


def test_an_interrupted_save_leaves_the_old_files(tmp_path, monkeypatch):
    save_pretrained(build("qa"), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fill_the_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(hf, "save_file", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(build("qa", seed=9), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- finding the files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["./nowhere/model", "/nowhere/model", "~/nowhere/model", "a/b/c", Path("nowhere")])
def test_a_folder_that_does_not_exist(source):
    with pytest.raises(PretrainedFilesError, match=r"No such folder: .*Expected one with config.json and model.safe"):
        locate_pretrained(source)


def test_folders_without_config_or_weights_are_refused_naming_what_is_missing(tmp_path):
    with pytest.raises(PretrainedFilesError, match=r"lacks config.json and weights \(model.safe.*It holds: nothing"):
        locate_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PretrainedFilesError, match=r"lacks weights \(model.safetensors or .*It holds: config.json"):
        locate_pretrained(tmp_path)
    with pytest.raises(PretrainedFilesError, match=r"lacks config.json .*It is not a folder"):
        locate_pretrained(tmp_path / "config.json")


@pytest.mark.parametrize("shard", ["model-2.safetensors", "../model.safetensors", "config.json"])
def test_lost_and_foreign_shards_are_refused(shard, tmp_path):
    folder = write(tmp_path / "sharded", {})
    write(tmp_path, {})
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PretrainedFilesError, match=f"lacks the shards {shard}, which its model.safetensors.index.json"):
        locate_pretrained(folder)


@pytest.mark.parametrize("content", ["{", '{"model_type": "gpt2"}'])
def test_a_bad_config_is_refused_naming_its_path(content, tmp_path):
    write(tmp_path, {})
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json: "):
        load_config(tmp_path)


def test_without_the_hub_the_error_says_what_was_tried_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = (
        r"'google-bert/bert-base-uncased' here, and the Hugging Face hub did not deliver .*pass the path of a folder"
    )
    with pytest.raises(PretrainedUnavailableError, match=message) as caught:
        load_config("google-bert/bert-base-uncased", cache_dir=tmp_path)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value.__cause__, huggingface_hub.errors.LocalEntryNotFoundError)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_the_hub_is_asked_for_safetensors_and_for_pickles_only_without_them(weights, tmp_path, monkeypatch):
    source, model = build("qa"), build("qa", seed=9)
    repository, asked = tmp_path / "repository", []
    save_pretrained(source, repository)
    torch.save(source.state_dict(), repository / "pytorch_model.bin")
    (repository / "model.onnx").write_text("large")
    if weights == "pytorch_model.bin":
        (repository / "model.safetensors").unlink()

    def snapshot_download(repo_id, allow_patterns, cache_dir):
        asked.append((repo_id, cache_dir))
        cache_dir.mkdir(exist_ok=True)
        names = [path.name for path in repository.iterdir()]
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            (cache_dir / name).write_bytes((repository / name).read_bytes())
        return str(cache_dir)

    monkeypatch.setattr(hf_files, "snapshot_download", snapshot_download)
    load_pretrained(model, "someone/bert", cache_dir=tmp_path / "cache")
    assert asked == [("someone/bert", tmp_path / "cache")] * (1 if weights == "model.safetensors" else 2)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["config.json", weights]
    assert same_outputs(source, model, batch())
