"""The GPT-2 recipe as a user runs it, on the bundled stories with a model of two layers: every method, to the end."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from benchmarks.environment import collect as environment
from recipes.gpt2 import launch, results
from recipes.gpt2.ledger import Curve
from recipes.gpt2.module import TOKENIZER_KEY, GPT2Pretraining
from recipes.gpt2.pretrain import main
from slope_pl import CheckpointError, sparse_layers
from slope_pl.baselines import masked_layers
from slope_pl.checkpoint import convert
from slope_pl.checkpoint.__main__ import main as checkpoint_command
from slope_pl.data import ShardError, load_bpe
from slope_pl.models import load_gpt2_config

ROOT = Path(__file__).parents[2]
STORIES = ROOT / "data" / "text"
SMALL = ["--model.gpt2.n_embd", "32", "--model.gpt2.n_layer", "2", "--model.gpt2.n_positions", "32"]
CONFIGS = ["tiny", "tiny_dense", "tiny_transposable", "tiny_srste", "tiny_fst"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(folder: Path, cache: Path, subcommand: str, *arguments: str, config: str = "tiny") -> dict:
    """Run the recipe's own command line; returns what it wrote into its result file."""
    name = f"{subcommand}-{len(list(folder.iterdir()))}"
    main(
        [
            *(subcommand, "--config", str(ROOT / "recipes/gpt2" / f"{config}.yaml"), *SMALL, "--data.context", "32"),
            *("--data.source", str(STORIES / "stories.txt"), "--data.tokenizer", str(STORIES / "tokenizer.json")),
            *("--data.cache_dir", str(cache), "--trainer.max_steps", "12", "--trainer.val_check_interval", "6"),
            *("--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "2", "--trainer.log_every_n_steps", "4"),
            *("--trainer.logger.init_args.save_dir", str(folder), "--trainer.logger.init_args.name", name),
            *("--model.sample_tokens", "8", *arguments),
        ]
    )
    (file,) = (folder / name).glob(f"**/result-{subcommand}.json")
    return json.loads(file.read_text()) | {"folder": str(file.parent)}


@pytest.fixture(scope="module", params=CONFIGS)
def fitted(request, tmp_path_factory, cache):
    return run(tmp_path_factory.mktemp("fit"), cache, "fit", config=request.param) | {"config": request.param}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory, cache):
    return run(tmp_path_factory.mktemp("fit"), cache, "fit")


def test_fit_ends_in_the_whole_result(fitted):
    names = {"tiny_dense": "dense", "tiny_srste": "Extended SR-STE", "tiny_fst": "FST"}
    assert fitted["model"] == names.get(fitted["config"], "2:4 sparse")
    assert (fitted["steps"], fitted["val_step"], fitted["tokens"]) == (12, 12, 12 * 16 * 32)
    assert fitted["scores"].keys() == {"val/loss", "val/perplexity", "val/tokens"}
    assert fitted["scores"]["val/loss"] < 6.93  # ln(1024): it has learned something
    assert fitted["tokens_per_second"] > 0
    assert fitted["seconds"] > 0
    assert fitted["peak_bytes"] > 1 << 20
    assert fitted["woke_at_step"] == {"tiny": 11, "tiny_transposable": 11, "tiny_fst": 10}.get(fitted["config"])
    assert fitted["sample"].startswith("There was once")
    assert fitted["environment"]["torch"] == torch.__version__
    for label in ("validation loss / perplexity", "optimizer steps, tokens", "loss curve", "checkpoint"):
        assert fitted["rows"][label]


def test_the_table_speaks_of_the_device_that_trained(tmp_path, cache, monkeypatch):
    """Lightning moves the model to the CPU before ``on_fit_end``: a sample would take minutes there."""
    order, asked, write = [], [], GPT2Pretraining.sample

    def teardown(strategy):
        order.append("teardown")
        monkeypatch.setattr(GPT2Pretraining, "device", torch.device("meta"))

    monkeypatch.setattr(SingleDeviceStrategy, "teardown", teardown)
    monkeypatch.setattr(GPT2Pretraining, "sample", lambda module: order.append("sample") or write(module))
    monkeypatch.setattr(results, "environment", lambda device: asked.append(device.type) or environment(device))
    found = run(tmp_path, cache, "fit")
    assert found["sample"].startswith("There was once")
    assert order == ["sample", "teardown"]
    assert asked == ["cpu"]


def test_the_conversions_of_the_readme(sparse, tmp_path, monkeypatch):
    (tmp_path / "zero3").mkdir()
    shutil.copy(sparse["checkpoint"], tmp_path / "zero3" / "step=500.ckpt")
    text = (ROOT / "slope_pl/lightning/README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^python -m slope_pl\.checkpoint (.*)$", text, re.M)
    monkeypatch.chdir(tmp_path)
    for line in lines:
        assert checkpoint_command(shlex.split(line, comments=True)) == 0
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"zero3", "full.ckpt", "shards.ckpt", "weights.safetensors", "hf"}
    assert (tmp_path / "hf" / "config.json").is_file()


def test_the_curve_has_every_step(fitted):
    lines = (Path(fitted["folder"]) / "curve.csv").read_text().splitlines()
    assert lines[0] == "step,tokens,train_loss,val_loss"
    train = [line.split(",") for line in lines[1:] if not line.endswith(",,") and line.split(",")[2]]
    val = [line.split(",") for line in lines[1:] if line.split(",")[3]]
    assert [int(row[0]) for row in train] == list(range(1, 13))
    assert [int(row[1]) for row in train] == [512 * step for step in range(1, 13)]
    assert [int(row[0]) for row in val] == [6, 12]
    assert float(val[-1][3]) == pytest.approx(fitted["scores"]["val/loss"], abs=1e-6)
    assert "<svg" in (Path(fitted["folder"]) / "loss.svg").read_text()


def test_validate_from_the_checkpoint_gives_the_same_loss(fitted, tmp_path, cache):
    again = run(tmp_path, cache, "validate", "--ckpt_path", fitted["checkpoint"], config=fitted["config"])
    assert again["scores"] == fitted["scores"]


def test_export_and_load_from_checkpoint_give_the_same_logits(fitted, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    module = GPT2Pretraining.load_from_checkpoint(fitted["checkpoint"], weights_only=True).eval()
    layers = {"tiny_dense": 0, "tiny_fst": 4}.get(fitted["config"], 7)
    assert len(sparse_layers(module)) + len(masked_layers(module)) == layers
    main(["export", "--ckpt_path", fitted["checkpoint"], "--folder", str(tmp_path / "hf")])
    assert str(tmp_path / "hf") in capsys.readouterr().out
    convert(fitted["checkpoint"], tmp_path / "sharded.ckpt", to="sharded")  # as FSDP2 leaves it
    main(["export", "--ckpt_path", str(tmp_path / "sharded.ckpt"), "--folder", str(tmp_path / "again")])
    files = [tmp_path / name / "model.safetensors" for name in ("hf", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    own = load_bpe("data/text/tokenizer.json")
    assert words("There was once")["input_ids"] == own.encode_batch(["There was once"])[0]
    assert theirs.config.eos_token_id == words.eos_token_id == own.end_of_text
    assert load_gpt2_config(str(tmp_path / "hf")) == module.net.config
    ids = torch.randint(0, 1024, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(module(ids), theirs(ids).logits, rtol=0, atol=1e-5)


def test_resume_equals_the_uninterrupted_run(fitted, tmp_path, cache):
    """From the checkpoint of step 6, in the middle of an epoch, to step 12: weights bit for bit, tokens counted on."""
    middle = tmp_path / "middle"
    saving = ["--trainer.callbacks+", "lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.dirpath"]
    saving += [str(middle), "--trainer.callbacks.every_n_train_steps", "6", "--trainer.callbacks.save_top_k", "-1"]
    run(tmp_path, cache, "fit", *saving, config=fitted["config"])
    (checkpoint,) = middle.glob("*step=6.ckpt")
    resumed = run(tmp_path, cache, "fit", "--ckpt_path", str(checkpoint), *saving, config=fitted["config"])
    assert resumed["scores"] == fitted["scores"]
    assert resumed["tokens"] == fitted["tokens"]
    a, b = (torch.load(path["checkpoint"], weights_only=True)["state_dict"] for path in (fitted, resumed))
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_accumulation_is_counted_in_optimizer_steps(tmp_path, cache):
    more = ["--data.batch_size", "4", "--trainer.accumulate_grad_batches", "4", "--trainer.val_check_interval", "24"]
    found = run(tmp_path, cache, "fit", *more)
    assert (found["steps"], found["tokens"], found["val_step"]) == (12, 12 * 16 * 32, 12)
    plain = run(tmp_path, cache, "fit")
    curves = [(Path(result["folder"]) / "curve.csv").read_text().splitlines()[1] for result in (found, plain)]
    # The first batches hold the same windows: the mean over micro-batches is the loss of the whole batch.
    assert float(curves[0].split(",")[2]) == pytest.approx(float(curves[1].split(",")[2]), abs=1e-5)


@pytest.mark.distributed
def test_two_ranks_have_the_curve_of_one(tmp_path, cache):
    """Half the batch on each: the same windows a step, the mean loss over the ranks, one table, all tokens counted."""
    command = [
        *(sys.executable, "-m", "recipes.gpt2.pretrain", "fit", "--config", "recipes/gpt2/tiny.yaml", *SMALL),
        *("--data.context", "32", "--data.cache_dir", str(cache), "--trainer.max_steps", "6"),
        *("--trainer.val_check_interval", "6", "--trainer.accelerator", "cpu", "--model.sample_tokens", "8"),
    ]
    ranked = (
        "MASTER_ADDR",
        "MASTER_PORT",
        "NODE_RANK",
        "LOCAL_RANK",
        "RANK",
        "WORLD_SIZE",
    )  # not a rank of another test's fit
    environment = {name: value for name, value in os.environ.items() if name not in ranked}
    curves, tables = [], []
    for ranks, batch in (("1", "16"), ("2", "8")):
        where = ["--trainer.logger.init_args.save_dir", str(tmp_path / ranks), "--data.batch_size", batch]
        strategy = ["--trainer.devices", ranks, *(["--trainer.strategy", "ddp"] if ranks == "2" else [])]
        done = subprocess.run(
            [*command, *where, *strategy], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        tables.append(done.stdout.count("fit: 2:4 sparse"))
        (file,) = (tmp_path / ranks).glob("**/curve.csv")
        curves.append([line.split(",") for line in file.read_text().splitlines()[1:]])
    assert tables == [1, 1]
    train = [[(row[0], row[1], float(row[2])) for row in curve if row[2]] for curve in curves]
    assert [row[:2] for row in train[0]] == [row[:2] for row in train[1]]
    assert [row[2] for row in train[0]] == pytest.approx([row[2] for row in train[1]], abs=1e-4)


def test_weights_alone_give_no_text_and_no_export(sparse, tmp_path):
    convert(sparse["checkpoint"], tmp_path / "w.safetensors", to="safetensors")
    for command in (["generate"], ["export", "--folder", str(tmp_path / "hf")]):
        with pytest.raises(CheckpointError, match="holds weights alone, and not how the model is built"):
            main([*command, "--ckpt_path", str(tmp_path / "w.safetensors")])


def test_an_export_without_its_tokenizer_says_so(sparse, tmp_path, capsys):
    content = torch.load(sparse["checkpoint"], weights_only=True)
    content[TOKENIZER_KEY]["source"] = str(tmp_path / "moved.json")
    torch.save(content, tmp_path / "a.ckpt")
    main(["export", "--ckpt_path", str(tmp_path / "a.ckpt"), "--folder", str(tmp_path / "hf")])
    assert f"Without its tokenizer {tmp_path / 'moved.json'}: no tokeniser" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors"}


def test_generate_continues_the_prompts(sparse, capsys):
    prompts = json.dumps(["There was once", "Then"])
    arguments = ["generate", "--ckpt_path", sparse["checkpoint"], "--prompt", prompts, "--tokens", "5"]
    texts = []
    for _ in range(2):
        main(arguments)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("There was once")
    assert "\n\nThen" in texts[0]
    known = torch.load(sparse["checkpoint"], weights_only=True)[TOKENIZER_KEY]
    assert known == {"source": str(STORIES / "tokenizer.json"), "end_of_text": "<|endoftext|>"}


@pytest.mark.parametrize("config", ["tiny_dense", "tiny_srste", "tiny_fst"])
def test_a_checkpoint_of_another_method_is_refused(sparse, tmp_path, cache, config):
    with pytest.raises(CheckpointError, match="the checkpoint is of a 2:4 sparse model, the configuration is"):
        run(tmp_path, cache, "validate", "--ckpt_path", sparse["checkpoint"], config=config)


def test_pretrained_weights_are_the_beginning(sparse, tmp_path, cache):
    main(["export", "--ckpt_path", sparse["checkpoint"], "--folder", str(tmp_path / "hf")])
    (tmp_path / "runs").mkdir()
    more = ["--model.weights", str(tmp_path / "hf"), "--model.learning_rate", "1e-9"]
    found = run(tmp_path / "runs", cache, "fit", *more, config="tiny_dense")
    assert found["scores"]["val/loss"] == pytest.approx(sparse["scores"]["val/loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.context", "64"], "data.context=64 tokens, but the model has positions for 32"),
        (["--model.gpt2.vocab_size", "1000"], "the tokenizer has 1024 tokens, the model's vocabulary 1000"),
        (["--trainer.max_steps", "-1"], "the number of steps is missing"),
        (["--trainer.max_steps", "10"], "val_check_interval=6 batches does not divide the 10 batches"),
        (["--model.learning_rate", "7"], "learning_rate=7"),
        (["--data.source", "./no_such_folder"], "no_such_folder"),
        (["--model.weights", "./no_such_weights"], "no_such_weights"),
        (["--model.slope", "null", "--model.values_learning_rate_scale", "2"], "values_learning_rate_scale=2"),
    ],
)
def test_bad_input_is_named_before_training(tmp_path, cache, capsys, arguments, message):
    with pytest.raises((SystemExit, ValueError, OSError)) as stop:
        run(tmp_path, cache, "fit", *arguments)
    assert message in capsys.readouterr().err + str(stop.value)


def test_a_missing_rate_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--data.source", str(STORIES / "stories.txt"), "--trainer.max_steps", "3"])
    assert "learning_rate" in capsys.readouterr().err


def test_text_of_another_tokenizer_is_refused(sparse, tmp_path, cache):
    (prepared,) = [path.parent for path in cache.glob("*/index.json")]
    tokenizer = json.loads((STORIES / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "runs").mkdir()
    more = ["--data.source", str(prepared), "--data.tokenizer", str(tmp_path / "tokenizer.json")]
    with pytest.raises(ShardError, match="of another tokeniser"):
        run(tmp_path / "runs", cache, "fit", *more)


def test_curve_of_the_ledger_means_steps(fitted):
    result = type("Row", (), {"run": "abc", "steps": 12})
    points = Curve.of(Path(fitted["folder"]) / "curve.csv", result, every=5).points
    assert [step for step, *_ in points] == [5, 6, 10, 12, 12]


class TestLaunch:
    @pytest.fixture
    def machine(self, monkeypatch, tmp_path):
        monkeypatch.delenv("SLOPE_DATA_DIR", raising=False)

        def make(gpu: bool, shared: bool = False) -> None:
            monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
            if shared:
                for name in ("text/novels.txt.xz", "tokenizers/gpt2-encoder.json"):
                    (tmp_path / name).parent.mkdir(exist_ok=True)
                    (tmp_path / name).touch()
                monkeypatch.setenv("SLOPE_DATA_DIR", str(tmp_path))

        return make

    @pytest.mark.parametrize(
        ("gpu", "shared", "data", "config"),
        [
            (False, False, None, "tiny.yaml"),
            (False, True, None, "tiny.yaml"),
            (False, False, "folder", "tiny.yaml"),
            (True, False, None, "tiny.yaml"),
            (True, False, "folder", "novels_slope.yaml"),
            (True, True, None, "novels_slope.yaml"),
            (True, True, "folder", "novels_slope.yaml"),
        ],
    )
    def test_the_real_recipe_runs_where_gpu_and_text_are(self, machine, capsys, tmp_path, gpu, shared, data, config):
        machine(gpu, shared)
        arguments = launch.plan(data, None)
        assert arguments[:2] == ["--config", f"recipes/gpt2/{config}"]
        said = capsys.readouterr().out
        assert config in said
        if config != "tiny.yaml":
            source = data or str(tmp_path / "text/novels.txt.xz")
            assert arguments[2:4] == ["--data.source", source]
            assert ("--data.tokenizer" in arguments) == shared
        else:
            assert ("your text is left aside" in said) == (data is not None)

    @pytest.mark.parametrize(("loss", "status", "verdict"), [(0.5, 0, "the same."), (0.6, 1, "THEY DIFFER.")])
    def test_losses_are_compared(self, tmp_path, capsys, loss, status, verdict):
        files = []
        for name, value in (("fit", 0.5), ("validate", loss)):
            files.append(tmp_path / f"{name}.json")
            files[-1].write_text(json.dumps({"scores": {"val/loss": value}}))
        assert launch.compare(*files, checkpoint="last.ckpt") == status
        assert verdict in capsys.readouterr().out

    def test_a_failing_command_ends_the_run_with_its_status(self, machine, monkeypatch, tmp_path):
        machine(False)
        monkeypatch.setattr("sys.argv", ["launch", "--runs", str(tmp_path), "--", "--no_such_option"])
        monkeypatch.setattr(launch, "run", lambda subcommand, arguments: 2 if "--no_such_option" in arguments else 0)
        assert launch.main() == 2

    def test_fit_and_validate_in_two_processes(self, monkeypatch, tmp_path, cache, capfd):
        """`make gpt2` as it is, with fewer steps."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        steps = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--data.cache_dir", str(cache)]
        monkeypatch.setattr(
            "sys.argv", ["launch", "--runs", str(tmp_path), "--", *SMALL, "--data.context", "32", *steps]
        )
        assert launch.main() == 0
        said = capfd.readouterr().out
        for words in (
            "train loss   val loss",
            "Sample text:",
            "fit: 2:4 sparse",
            "validate: 2:4 sparse",
            ": the same.",
        ):
            assert words in said
        assert re.search(r"Checkpoint  \S+last\.ckpt", said)
