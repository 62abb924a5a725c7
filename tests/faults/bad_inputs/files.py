"""Files of SQuAD, GLUE and pretrained weights that are not what they should be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slope_pl.data import (
    GlueDataModule,
    SquadDataModule,
    read_glue,
    read_squad,
)
from slope_pl.models import BertConfig, BertModel, load_config, load_gpt2_config, load_pretrained
from tests.faults.bad_inputs.case import Case
from tests.unit.test_glue_reading import GOOD, RTE
from tests.unit.test_squad_reading import answer, question, squad

SAMPLE = Path(__file__).parents[3] / "data" / "sample"
Files = dict[str, bytes | str]


def questions(name: str, content: Any, *says: str, split: str = "train") -> Case:
    """A SQuAD file."""
    data = content if isinstance(content, bytes | str) else json.dumps(content)
    return Case(f"squad: {name}", lambda f: read_squad(f / "x.json", split), says, {"x.json": data})


SQUAD = [
    questions("empty", "", "the file is empty"),
    questions("no JSON", '{"data": [', "not JSON at line 1"),
    questions("Latin-1", "é".encode("latin-1"), "not UTF-8 at byte 0"),
    questions("a list", [], "the top level is list []", "'data'"),
    questions("null", None, "the top level is NoneType", "'data'"),
    questions("no data", {"version": "1.1"}, "no key 'data'", "'version'"),
    questions("data of an object", {"data": {}}, "data is dict {}", "a list"),
    questions("no articles", {"data": []}, "no questions"),
    questions("an article of text", {"data": ["x"]}, "data[0] is str 'x'", "an object"),
    questions("no paragraphs", {"data": [{}]}, "data[0] has no key 'paragraphs'"),
    questions("a title of a number", {"data": [{"title": 3, "paragraphs": []}]}, "data[0].title is int 3", "a string"),
    questions("a context of null", squad(question(), context=None), "context is NoneType", "a string"),
    questions("no question", squad(question(question=None)), "no key 'question'"),
    questions("a blank question", squad(question(question=" ")), "question is ' '", "expected text"),
    questions("an id of a number", squad(question(id=4)), "id is int 4", "a string"),
    questions("answers of null", squad({**question(), "answers": None}), "answers is NoneType", "a list"),
    questions("no answer", squad(question(answers=[])), "has no answer", "on_bad_answer='skip'"),
    questions("a start of text", squad(answer("Brune", "4")), "answer_start is str '4'", "an integer"),
    questions("a start of true", squad(answer("Brune", True)), "answer_start is bool True", "an integer"),
    questions("a start off by one", squad(answer("Brune", 5)), "it occurs at 4", "Mend the file"),
    questions("a start below 0", squad(answer("Brune", -3)), "expected at context[-3", "it occurs at 4"),
    questions("a start past the end", squad(answer("Brune", 999)), "expected at context[999"),
    questions("words that are not there", squad(answer("Rhine", 4)), "does not occur in the context"),
    questions("a blank answer", squad(answer(" ", 3)), "is blank"),
    questions("an id twice", squad(question(), question()), "'q1'", "the same question", split="dev"),
    questions("another split", squad(question()), "split is 'test'", "'train' or 'dev'", split="test"),
    Case("squad: no folder", lambda f: read_squad(f / "n" / "m", "train"), ("no file or folder", "train-v1.1.json")),
    Case("squad: an empty folder", lambda f: read_squad(f, "dev"), ("no dev*.json", "it holds: nothing")),
    Case(
        "squad: two files",
        lambda f: read_squad(f, "dev"),
        ("several files", "dev_file"),
        {"dev.json": "", "dev2.json": ""},
    ),
    Case(
        "squad: a train_file that is none",
        lambda f: SquadDataModule(source=str(SAMPLE), tokenizer=str(SAMPLE / "vocab.txt"), train_file=str(f)).setup(
            "fit"
        ),
        ("train_file is", "not a file"),
    ),
]


def rows(name: str, content: bytes | str, *says: str, task: str = "rte", file: str = "train.tsv") -> Case:
    """A GLUE file."""
    return Case(f"glue: {name}", lambda f: read_glue(f, task, "train"), says, {file: content})


GLUE = [
    rows("empty", "", "the file is empty"),
    rows("a header alone", RTE, "no valid row"),
    rows("no header", GOOD, "the header has no column", "'sentence1' and 'sentence2'"),
    rows("another task's", "sentence\tlabel\nfine\t1\n", "of the text", "give the files of rte"),
    rows("no labels", "index\tsentence1\tsentence2\n0\ta\tb\n", "label ('label')"),
    rows("a row too short", RTE + "0\tA\tB\n", "line 2: 3 fields, expected 4"),
    rows("a row too long", RTE + "0\tA\tB\tC\t1\n", "line 2: 5 fields", "a tab"),
    rows("an unknown label", RTE + "0\tA\tB\tmaybe\n", "'maybe'", "entailment, not_entailment, or 0 to 1"),
    rows("a label of the test set", RTE + "0\tA\tB\t-1\n", "'-1'", "test set"),
    rows("a blank sentence", RTE + "0\t \tB\t1\n", "'sentence1' is ' '", "expected text"),
    rows("an empty line", RTE + GOOD + "\n" + GOOD, "line 3", "the line is empty"),
    rows("Latin-1", RTE.encode() + "0\té\tB\t1\n".encode("latin-1"), "not UTF-8", "convert the file"),
    rows("no JSON", "{", "not JSON at column", file="train.jsonl"),
    rows("JSON of a list", "[1]\n", "a JSON object", file="train.jsonl"),
    rows("JSON without a sentence", '{"sentence1": "a", "label": 1}\n', "text", "sentence2", file="train.jsonl"),
    rows(
        "JSON of a number", '{"sentence1": 1, "sentence2": "b", "label": 1}\n', "'sentence1' is 1", file="train.jsonl"
    ),
    rows("JSON of a list label", '{"sentence1": "a", "sentence2": "b", "label": [1]}\n', "[1]", file="train.jsonl"),
    rows("a score above 5", "sentence1\tsentence2\tscore\na\tb\t5.1\n", "'5.1'", "from 0 to 5", task="stsb"),
    rows("a score of NaN", "sentence1\tsentence2\tscore\na\tb\tnan\n", "'nan'", "from 0 to 5", task="stsb"),
    rows("an unknown task", "", "task is 'ax'", "expected one of cola", task="ax"),
    Case("glue: another split", lambda f: read_glue(f, "mnli", "dev"), ("split is 'dev'", "'matched'")),
    Case("glue: a file", lambda f: read_glue(f / "x", "rte"), ("is the file", "RTE/"), {"x": ""}),
    Case("glue: no folder", lambda f: read_glue(f / "a", "rte"), ("no folder", "RTE/train.tsv")),
    Case("glue: an empty folder", lambda f: read_glue(f, "rte"), ("no train.tsv or train.jsonl", "there is: nothing")),
    Case(
        "glue: another task's folder",
        lambda f: read_glue(f / "CoLA", "rte"),
        ("folder of cola", "rte"),
        {"CoLA/train.tsv": ""},
    ),
    Case(
        "glue: no vocabulary",
        lambda f: GlueDataModule(task="rte", source=str(f), tokenizer="./n/vocab.txt").setup(),
        ("no vocabulary", "vocab.txt"),
        {"train.tsv": RTE + GOOD, "dev.tsv": RTE + GOOD},
    ),
]

TINY = {
    "model_type": "bert",
    "vocab_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def weights(name: str, files: Files, *says: str, load: Callable[[Path], object] | None = None) -> Case:
    """A folder of pretrained weights."""

    def call(folder: Path) -> object:
        config = BertConfig.from_dict(TINY)
        return load_pretrained(BertModel(config), folder) if load is None else load(folder)

    return Case(f"weights: {name}", call, says, {"config.json": json.dumps(TINY), **files})


WEIGHTS = [
    weights("none", {}, "lacks weights", "model.safetensors"),
    weights("empty", {"model.safetensors": ""}, "model.safetensors", "damaged"),
    weights("text", {"model.safetensors": "x" * 100}, "model.safetensors", "damaged"),
    weights("git lfs", {"model.safetensors": "version https://git-lfs.github.com/spec/v1\n"}, "git lfs pull"),
    weights("bin: empty", {"pytorch_model.bin": ""}, "pytorch_model.bin", "damaged"),
    weights("bin: text", {"pytorch_model.bin": "not a pickle"}, "pytorch_model.bin", "damaged"),
    weights("bin: cut zip", {"pytorch_model.bin": b"PK\x03\x04" + b"0" * 60}, "pytorch_model.bin", "damaged"),
    weights("an index of a list", {"model.safetensors.index.json": "[]"}, "index.json", "weight_map"),
    weights("an index without map", {"model.safetensors.index.json": "{}"}, "index.json", "weight_map"),
    weights("an index cut off", {"model.safetensors.index.json": "{"}, "index.json", "damaged"),
    weights(
        "an index of other shards",
        {"model.safetensors.index.json": '{"weight_map": {"a": "m.safetensors"}}'},
        "lacks the shards m",
    ),
    weights("config: a list", {"config.json": "[]", "model.safetensors": ""}, "config.json", "list"),
    weights("config: cut off", {"config.json": "{", "model.safetensors": ""}, "config.json"),
    weights("config: binary", {"config.json": b"\xff\xfe", "model.safetensors": ""}, "config.json"),
    weights(
        "config: sizes of text",
        {"config.json": '{"hidden_size": "16"}', "model.safetensors": ""},
        "hidden_size='16'",
        load=load_config,
    ),
    weights("config: GPT-2 of BERT", {"model.safetensors": ""}, "model_type", "'bert'", load=load_gpt2_config),
    weights("no folder", {}, "No such folder", load=lambda f: load_config(f / "x" / "y")),
]
CASES = [*SQUAD, *GLUE, *WEIGHTS]
