"""Bad data and foreign checkpoints through the command line: an error that says what is wrong, and no file is changed."""

from pathlib import Path

import pytest
import torch

from recipes.bert_large import glue, squad
from recipes.bert_large.glue_sample import write_sample
from recipes.gpt2.pretrain import main as gpt2
from slope_pl import CheckpointError, ConfigError
from slope_pl.data import GlueFormatError, SquadFormatError
from tests.recipes.test_glue_recipe import run as on_glue
from tests.recipes.test_squad_recipe import SAMPLE
from tests.recipes.test_squad_recipe import run as on_squad


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """A folder with a finished run of each recipe, and their checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, {
        "glue": on_glue(folder, "fit", data, "--trainer.max_steps", "4")["checkpoint"],
        "squad": on_squad(folder, "fit", "--trainer.max_steps", "4", "--trainer.val_check_interval", "4")["checkpoint"],
        "dense": on_glue(folder, "fit", data, "--trainer.max_steps", "4", config="glue_dense.yaml")["checkpoint"],
    }


@pytest.fixture
def unchanged(runs):
    """The finished runs, which have to be what they were; the failed one may leave a log of its own."""

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(runs[0].rglob("*")) if path.is_file()}

    before = content()
    yield runs
    after = content()
    assert {path: after.get(path) for path in before} == before
    new = {path.name for path in after.keys() - before.keys()}
    assert not [name for name in new if name.endswith(".ckpt") or name.startswith("result-")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index\tsentence1\tlabel\n0\ta\tentailment\n", r"RTE/train\.tsv: the header.*no .*sentence2"),
        ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n\n", r"line 3: the line is empty"),
        ("index\tsentence1\tsentence2\tlabel\n0\t \tb\tentailment\n", r"line 2: 'sentence1' is ' ', expected text"),
        (
            "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tneutral\n",
            r"line 2: 'label' is 'neutral', expected entailment, not_",
        ),
        ("index\tsentence1\tsentence2\tlabel\n", "no valid row"),
        ("", "the file is empty"),
    ],
)
def test_glue_files(unchanged, data, tmp_path, text, message):
    bad = write_sample(tmp_path / "bad")
    (bad / "RTE" / "train.tsv").write_text(text)
    with pytest.raises(GlueFormatError, match=message):
        on_glue(unchanged[0], "fit", bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"answer_start"', '"begins"', 1), r"no 'answer_start'|answer_start"),
        (lambda text: text.replace('"data"', '"rows"', 1), "data"),
        (lambda text: "", "train.json"),
        (lambda text: '{"version": "1.1", "data": []}', "no "),
    ],
)
def test_squad_files(unchanged, tmp_path, change, message):
    for split in ("train", "dev"):
        (tmp_path / f"{split}.json").write_text((SAMPLE / f"{split}.json").read_text())
    (tmp_path / "train.json").write_text(change((SAMPLE / "train.json").read_text()))
    with pytest.raises(SquadFormatError, match=message):
        on_squad(unchanged[0], "fit", "--data.source", str(tmp_path))


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("glue", ["--ckpt_path", "{squad}"], "of another recipe: its settings max_answer_length, n_best are none"),
        ("squad", ["--ckpt_path", "{glue}"], "of another recipe: its settings task are none"),
        ("glue", ["--model.weights", "{squad}", "--model.bert", "null"], "of another recipe; this run's task is rte"),
        ("squad", ["--model.weights", "{dense}", "--model.bert", "null"], "a checkpoint of rte; this run's task is SQuAD"),
        ("squad", ["--model.teacher.checkpoint", "{dense}"], "a checkpoint of rte; this run's task is SQuAD"),
        ("glue", ["--model.weights", "{damaged}", "--model.bert", "null"], "is damaged or no checkpoint"),
        ("glue", ["--ckpt_path", "{damaged}"], "is damaged: File is not a zip file"),
        ("glue", ["--ckpt_path", "none.ckpt"], "none.ckpt"),
    ],
)  # fmt: skip
def test_foreign_checkpoints(unchanged, data, tmp_path, recipe, arguments, message):
    folder, checkpoints = unchanged
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(Path(checkpoints["glue"]).read_bytes()[:3000])
    given = [argument.format(**checkpoints, damaged=damaged) for argument in arguments]
    with pytest.raises((CheckpointError, FileNotFoundError), match=message):
        on_glue(folder, "fit", data, *given) if recipe == "glue" else on_squad(folder, "fit", *given)


@pytest.mark.parametrize(("main", "kind"), [(glue.main, "squad"), (squad.main, "glue")])
def test_export_of_a_foreign_checkpoint_leaves_the_folder(runs, tmp_path, main, kind):
    (tmp_path / "vocab.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is a checkpoint of another recipe"):
        main(["export", "--ckpt_path", runs[1][kind], "--folder", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["vocab.txt"]
    assert (tmp_path / "vocab.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
)
def test_export_into_a_folder_with_a_model_writes_nothing(runs, tmp_path, name):
    (tmp_path / name).write_text("mine")
    for folder, message in (
        (tmp_path, f"holds a model already .{name}."),
        (tmp_path / name, "is a file; name a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            squad.main(["export", "--ckpt_path", runs[1]["squad"], "--folder", str(folder)])
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / name).rename(tmp_path / "vocab.txt")  # which is no model
    squad.main(["export", "--ckpt_path", runs[1]["squad"], "--folder", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"vocab.txt", "config.json", "model.safetensors"}


def test_text_from_a_foreign_checkpoint(runs):
    with pytest.raises(CheckpointError, match="is a checkpoint of another recipe"):
        gpt2(["generate", "--ckpt_path", runs[1]["glue"]])


def test_a_checkpoint_without_a_module(unchanged, data, tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match=r"plain\.ckpt holds no state_dict of a Lightning module"):
        on_glue(unchanged[0], "fit", data, "--model.weights", str(tmp_path / "plain.ckpt"), "--model.bert", "null")
