"""Checkpoints turned into other forms and read back, on one process; and what is refused, by every reader."""

import copy
import functools
import http.server
import json
import pickle
import random
import re
import resource
import threading
import zipfile

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from recipes.bert_large import squad
from recipes.bert_large.pretrain_checkpoint import load_pretraining_checkpoint
from recipes.gpt2 import pretrain, zeroshot
from slope_pl import CheckpointError, SLoPeCallback, SLoPeConfig, SLoPeLightningModule, sparse_layers, sparsify
from slope_pl.checkpoint import (
    checkpoint_kind,
    convert,
    load_module,
    load_weights,
    read_checkpoint,
    save_weights,
    weights_config,
)
from slope_pl.checkpoint.__main__ import main
from slope_pl.checkpoint.mark import by_name, by_number
from slope_pl.checkpoint.whole import damage
from slope_pl.lightning import last_good_checkpoint, load_teacher, sparsify_faded
from slope_pl.models import BertConfig, BertForQuestionAnswering, save_pretrained
from tests.lightning.toy import CONFIG, QUIET, Bomb, Net, Toy, assert_same, fixed_batch, make_trainer

pytestmark = QUIET


class Module(SLoPeLightningModule, Toy):
    """With two groups, as ZeRO needs them: their numbers are not the parameters' places in the model."""

    def __init__(self, slope=None, seed=0):
        super().__init__(slope=slope, net=Net(seed))
        self.save_hyperparameters()

    def configure_optimizers(self):
        adapters = [p for name, p in self.named_parameters() if "adapter_" in name]
        others = [p for name, p in self.named_parameters() if "adapter_" not in name]
        return torch.optim.AdamW([{"params": others}, {"params": adapters}], lr=1e-2)

    def export(self, folder):
        save_weights(self, f"{folder}/model.safetensors")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints at steps 8 and 14, before and after the adapters' wake, and the module at the end, step 20."""
    folder = tmp_path_factory.mktemp("run")
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    module = Module(slope=CONFIG)
    make_trainer(folder, saver, enable_checkpointing=True).fit(module)
    return {8: folder / "step=8.ckpt", 14: folder / "step=14.ckpt", "module": module}


STEPS = pytest.mark.parametrize("step", [8, 14], ids=["asleep", "awake"])


@STEPS
def test_sharded_and_back_is_the_same_file(files, tmp_path, step):
    sharded = convert(files[step], tmp_path / "sharded.ckpt", to="sharded")
    assert checkpoint_kind(sharded) == "sharded"
    back = read_checkpoint(convert(sharded, tmp_path / "back.ckpt"))
    want = torch.load(files[step], weights_only=True)
    assert back.keys() == want.keys()
    for key in ("state_dict", "optimizer_states"):
        assert_same(back.pop(key), want.pop(key))
    assert str(back) == str(want)


def test_a_shard_of_which_a_bit_has_changed_is_found_or_means_nothing(files, tmp_path):
    sharded = convert(files[14], tmp_path / "sharded.ckpt", to="sharded")
    assert damage(sharded) is None
    want, (shard,) = read_checkpoint(sharded), sharded.glob("*.distcp")
    content, chance = shard.read_bytes(), random.Random(0)
    found = 0
    for _ in range(60):
        place = chance.randrange(len(content))
        shard.write_bytes(content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :])
        if damage(sharded) is not None:
            found += 1
            with pytest.raises(CheckpointError, match="is damaged or no checkpoint: "):
                read_checkpoint(sharded)
            continue
        own = read_checkpoint(sharded)  # between the archives' entries are bytes that mean nothing
        for key in ("state_dict", "optimizer_states"):
            assert_same(own[key], want[key])
    assert found > 15
    shard.write_bytes(content[: len(content) // 2])
    assert f"{shard.name}: " in damage(sharded)
    shard.unlink()
    assert damage(sharded) == f"it has no {shard.name}, which its index names"


def test_what_is_damaged_is_not_converted(files, tmp_path):
    """A copy of it would have new checksums, and nobody could tell any more."""
    file = tmp_path / "it.ckpt"
    weight = torch.load(files[14], weights_only=True)["state_dict"]["net.first.weight"].numpy().tobytes()
    content = bytearray(files[14].read_bytes())
    content[content.index(weight) + 9] ^= 1
    file.write_bytes(content)
    torch.load(file, weights_only=True)  # without a word
    for to in ("full", "sharded", "safetensors", "huggingface"):
        with pytest.raises(CheckpointError, match=f"{file} is damaged or no checkpoint: the checksum of .* is wrong"):
            convert(file, tmp_path / to, to=to, module=Module if to == "huggingface" else None)
    assert [path.name for path in tmp_path.iterdir()] == ["it.ckpt"]


@STEPS
def test_a_single_device_goes_on_from_a_sharded_folder(files, tmp_path, step):
    sharded = convert(files[step], tmp_path / "sharded.ckpt", to="sharded")
    module = Module(slope=CONFIG, seed=7)
    make_trainer(tmp_path).fit(module, ckpt_path=sharded)
    assert_same(module.state_dict(), files["module"].state_dict())


@STEPS
def test_safetensors_hold_the_model_and_no_pickle(files, tmp_path, step):
    path = convert(files[step], tmp_path / "weights.safetensors", to="safetensors")
    want = torch.load(files[step], weights_only=True)["state_dict"]
    assert_same(load_file(path), dict(want))
    with safe_open(path, framework="pt") as stream:
        assert json.loads(stream.metadata()["slope_pl"])["format"] == 1
    assert not zipfile.is_zipfile(path)
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(path.read_bytes())
    assert weights_config(path) == CONFIG
    net = Net(seed=5)
    sparsify(net, weights_config(path), masks_follow=True)
    load_weights(net, path, prefix="net.")
    own = load_module(Module, files[step])
    with torch.no_grad():
        assert torch.equal(net(fixed_batch()), own.net(fixed_batch()))
    assert {layer.adapters_awake for layer in sparse_layers(net).values()} == {step == 14}
    assert path.stat().st_size < 0.8 * files[step].stat().st_size


def test_a_model_outside_of_lightning_is_saved_too(tmp_path):
    net = Net()
    sparsify(net, SLoPeConfig(mask="transposable"))
    path = save_weights(net, tmp_path / "a" / "net.safetensors")
    again = Net(seed=3)
    sparsify(again, weights_config(path))
    load_weights(again, path)
    assert_same(again.state_dict(), net.state_dict())
    dense = save_weights(Net(), tmp_path / "dense.safetensors")
    assert weights_config(dense) is None
    load_weights(again := Net(seed=3), dense)
    assert_same(again.state_dict(), Net().state_dict())


def test_weights_that_do_not_fit_are_refused(files, tmp_path):
    path = convert(files[8], tmp_path / "weights.safetensors", to="safetensors")
    with pytest.raises(CheckpointError, match=r"has 3 sparse layers, this Net 0; .*sparsify\(model, weights_config"):
        load_weights(Net(), path, prefix="net.")
    other = Net()
    other.head = torch.nn.Linear(16, 3)
    sparsify(other, CONFIG)
    with pytest.raises(CheckpointError, match="is of another model than this Net"):
        load_weights(other, path, prefix="net.")
    with pytest.raises(CheckpointError, match="no such file"):
        load_weights(Net(), tmp_path / "nowhere.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        load_weights(Net(), tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match="holds weights alone: load them with load_weights"):
        make_trainer(tmp_path).fit(Module(slope=CONFIG), ckpt_path=path)
    with pytest.raises(CheckpointError, match="holds weights alone, no training can go on"):
        convert(path, tmp_path / "full.ckpt")
    with pytest.raises(CheckpointError, match="not how the model is built"):
        load_module(Module, path)


def test_an_export_of_any_kind_by_the_module(files, tmp_path):
    sharded = convert(files[14], tmp_path / "sharded.ckpt", to="sharded")
    convert(sharded, tmp_path / "hf", to="huggingface", module=Module)
    want = torch.load(files[14], weights_only=True)["state_dict"]
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), dict(want))
    with pytest.raises(CheckpointError, match=r"needs the class of a LightningModule with export\(folder\)"):
        convert(sharded, tmp_path / "other", to="huggingface")


def test_the_command(files, tmp_path, capsys):
    target = tmp_path / "sharded.ckpt"
    assert main(["convert", str(files[8]), str(target), "--to", "sharded"]) == 0
    assert capsys.readouterr().out == f"{target}: sharded, from full {files[8]}\n"
    assert main(["convert", str(files[8]), str(target)]) == 1
    assert "exists already: remove it, or give another name" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 1
    assert "nowhere is not there; expected a checkpoint file of Lightning's" in capsys.readouterr().err
    assert main(["convert", str(tmp_path), str(tmp_path / "x")]) == 1
    assert "is no checkpoint; it holds sharded.ckpt" in capsys.readouterr().err
    name = f"{Module.__module__}.Module"
    arguments = ["convert", str(target), str(tmp_path / "hf"), "--to", "huggingface", "--module"]
    assert main([*arguments, name]) == 0
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    with pytest.raises(SystemExit):
        main([*arguments, "tests.nowhere.Module"])
    assert "expected for example recipes.gpt2.module.GPT2Pretraining" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "sharded.ckpt"], "nothing is left of what failed"


@pytest.mark.parametrize("to", ["full", "sharded", "safetensors", "huggingface"])
def test_the_command_says_that_the_disk_is_full_and_leaves_nothing(files, tmp_path, capsys, to):
    module = ["--module", f"{Module.__module__}.Module"] if to == "huggingface" else []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, before[1]))
    try:
        assert main(["convert", str(files[8]), str(tmp_path / "it"), "--to", to, *module]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert re.search(
        rf"^error: .*{tmp_path / 'it'}.* could not be written: File too large\. .* bytes are free there", said
    )
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_a_class_that_has_no_use_or_is_another_recipes(files, tmp_path, capsys):
    arguments = ["convert", str(files[8]), str(tmp_path / "it"), "--module", "recipes.gpt2.module.GPT2Pretraining"]
    assert main(arguments) == 1
    assert "module=GPT2Pretraining has no effect with to='full': leave it out" in capsys.readouterr().err
    assert main([*arguments, "--to", "huggingface"]) == 1
    assert f"{files[8]} does not make a GPT2Pretraining: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_exported_may_be_read_by_who_may_read_other_files(files, tmp_path):
    """Safetensors lets nobody but the owner read."""
    (plain := tmp_path / "plain").touch()
    path = convert(files[8], tmp_path / "weights.safetensors", to="safetensors")
    assert path.stat().st_mode == plain.stat().st_mode
    config = BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    for file in save_pretrained(BertForQuestionAnswering(config), tmp_path / "hf").iterdir():
        assert file.stat().st_mode == plain.stat().st_mode


def test_a_file_without_names_is_resumed_but_not_sharded(files, tmp_path):
    content = torch.load(files[8], weights_only=True)
    del content["slope_pl_optimizers"]
    torch.save(content, tmp_path / "old.ckpt")
    with pytest.raises(
        CheckpointError, match=r"does not name them: .* Resume it once under the strategy that wrote it"
    ):
        convert(tmp_path / "old.ckpt", tmp_path / "sharded.ckpt", to="sharded")
    module = Module(slope=CONFIG, seed=7)
    make_trainer(tmp_path).fit(module, ckpt_path=tmp_path / "old.ckpt")
    assert_same(module.state_dict(), files["module"].state_dict())


def test_names_and_numbers_of_an_optimizer():
    state = {
        "state": {0: {"a": 1}, 7: {"a": 2}},
        "param_groups": [{"lr": 1, "params": [7]}, {"lr": 2, "params": [3, 0]}],
    }
    groups = [{"params": ["x"]}, {"params": ["y", "z"]}]
    named = by_name(state, groups)
    assert named["state"] == {"x": {"a": 2}, "z": {"a": 1}}
    assert named["param_groups"] == [{"lr": 1, "params": ["x"]}, {"lr": 2, "params": ["y", "z"]}]
    assert by_number(named)["state"] == {0: {"a": 2}, 2: {"a": 1}}
    turned = by_number(named, [{"params": ["x"]}, {"params": ["z", "y"]}])
    assert turned["state"] == {0: {"a": 2}, 1: {"a": 1}}
    with pytest.raises(CheckpointError, match=r"groups of \[1, 2\] parameters, expected \[2, 1\]"):
        by_name(state, groups[::-1])


# --- what is refused, by every reader ---------------------------------------------------------------------------------


def _net():
    return BertForQuestionAnswering(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    )


class SilentHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


READERS = {
    "fit": lambda path, out: make_trainer(out).fit(Module(slope=CONFIG), ckpt_path=path),
    "validate": lambda path, out: make_trainer(out).validate(Module(slope=CONFIG), ckpt_path=path),
    "callback": lambda path, out: make_trainer(out, SLoPeCallback(CONFIG)).fit(Toy(), ckpt_path=path),
    "convert": lambda path, out: convert(path, out / "full.ckpt"),
    "sharded": lambda path, out: convert(path, out / "sharded.ckpt", to="sharded"),
    "safetensors": lambda path, out: convert(path, out / "weights.safetensors", to="safetensors"),
    "export": lambda path, out: convert(path, out / "hf", to="huggingface", module=Module),
    "load_module": lambda path, out: load_module(Module, path),
    "load_from_checkpoint": lambda path, out: Module.load_from_checkpoint(path),
    "teacher": lambda path, out: load_teacher(Net(), path),
    "fade": lambda path, out: sparsify_faded(Toy(), SLoPeConfig(), path),
    "start_from": lambda path, out: load_pretraining_checkpoint(_net(), path, CONFIG),
    "squad": lambda path, out: squad.main(["export", "--ckpt_path", str(path), "--folder", str(out / "hf")]),
    "gpt2": lambda path, out: pretrain.main(["export", "--ckpt_path", str(path), "--folder", str(out / "hf")]),
    "generate": lambda path, out: pretrain.main(["generate", "--ckpt_path", str(path)]),
    "zeroshot": lambda path, out: zeroshot.load_model(str(path)),
}
EVERY_READER = pytest.mark.parametrize("reader", READERS)


@EVERY_READER
def test_no_reader_runs_what_is_pickled_in_a_checkpoint(files, tmp_path, reader):
    content = torch.load(files[8], weights_only=True) | {"payload": Bomb(tmp_path / "executed")}
    torch.save(content, tmp_path / "bomb.ckpt")
    with pytest.raises((CheckpointError, pickle.UnpicklingError), match="mkdir"):
        READERS[reader](tmp_path / "bomb.ckpt", tmp_path)
    assert not (tmp_path / "executed").exists()


def test_the_bomb_works_and_the_search_for_a_whole_checkpoint_does_not_unpickle(files, tmp_path):
    torch.save({"payload": Bomb(tmp_path / "executed")}, tmp_path / "bomb.ckpt")
    assert last_good_checkpoint(tmp_path) == tmp_path / "bomb.ckpt"
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "bomb.ckpt", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_nor_is_a_file_from_the_web_run(tmp_path, monkeypatch):
    """Lightning's own default for these is weights_only=False."""
    torch.save({"payload": Bomb(tmp_path / "executed")}, tmp_path / "bomb.ckpt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    handler = functools.partial(SilentHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(pickle.UnpicklingError, match="mkdir"):
                READERS["fit"](f"http://127.0.0.1:{server.server_port}/bomb.ckpt", tmp_path)
        finally:
            server.shutdown()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", [".metadata", "meta.pt", "__0_0.distcp"])
def test_no_part_of_a_sharded_folder_is_run(files, tmp_path, name):
    folder = convert(files[8], tmp_path / "sharded.ckpt", to="sharded")
    file = folder / name
    if name == ".metadata":
        index = pickle.loads(file.read_bytes())
        index.storage_meta = Bomb(tmp_path / "executed")
        file.write_bytes(pickle.dumps(index))
    elif name == "meta.pt":
        torch.save({"payload": Bomb(tmp_path / "executed")}, file)
    else:  # an entry that is no tensor: torch unpickles each
        index = pickle.loads((folder / ".metadata").read_bytes())
        place = next(place for where, place in index.storage_data.items() if where.fqn.endswith("param_groups.0.lr"))
        torch.save(Bomb(tmp_path / "executed"), folder / "payload")
        place.relative_path, place.offset, place.length = "payload", 0, (folder / "payload").stat().st_size
        (folder / ".metadata").write_bytes(pickle.dumps(index))
    for call in (read_checkpoint, lambda path: make_trainer(tmp_path).fit(Module(slope=CONFIG), ckpt_path=path)):
        with pytest.raises(CheckpointError, match="mkdir"):
            call(folder)
    assert not (tmp_path / "executed").exists()


@EVERY_READER
def test_every_reader_refuses_a_newer_format(files, tmp_path, reader):
    content = torch.load(files[8], weights_only=True)
    content["slope_pl"] |= {"format": 2, "version": "9.0"}
    torch.save(content, tmp_path / "new.ckpt")
    with pytest.raises(CheckpointError, match=r"has format 2 \(slope_pl 9.0\); this slope_pl reads up to 1: update it"):
        READERS[reader](tmp_path / "new.ckpt", tmp_path)


def test_newer_weights_and_baselines_are_refused(files, tmp_path):
    path = convert(files[8], tmp_path / "weights.safetensors", to="safetensors")
    mark = {"format": 2, "version": "9.0", "config": CONFIG.to_dict(), "layers": []}
    save_file(load_file(path), path, metadata={"slope_pl": json.dumps(mark)})
    content = copy.copy(torch.load(files[8], weights_only=True)) | {"slope_pl_baseline": mark}
    torch.save(content, tmp_path / "baseline.ckpt")
    for call in (weights_config, read_checkpoint):
        with pytest.raises(CheckpointError, match="has format 2"):
            call(path)
    with pytest.raises(CheckpointError, match="has format 2"):
        read_checkpoint(tmp_path / "baseline.ckpt")
