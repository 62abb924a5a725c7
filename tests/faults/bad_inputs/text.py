"""Text, packed shards and vocabularies that are not what they should be."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slope_pl.data import (
    MlmDataModule,
    TextDataModule,
    load_bpe,
    load_wordpiece,
)
from tests.faults.bad_inputs.case import Case
from tests.unit.test_text_bpe import toy_vocabulary

SAMPLE = Path(__file__).parents[3] / "data" / "sample"
WORDS = (SAMPLE / "vocab.txt").read_text()
TEXT = "The cat sat. It was warm. The dog ran.\n\nIt rained. The sun came out."

Files = dict[str, bytes | str]


def text(name: str, files: Files, *says: str, source: str = "a.txt", **options: Any) -> Case:
    """A text module over files; its vocabulary is there."""

    def call(folder: Path) -> None:
        module = TextDataModule(
            **{"source": str(folder / source), "tokenizer": str(folder / "bpe"), "cache_dir": str(folder / "cache")}
            | {"context": 4, "batch_size": 1, "val_fraction": 0, "eval_batch_size": 1}
            | options
        )
        module.prepare_data()
        module.setup()

    def files_and_vocabulary(folder: Path) -> None:
        put(folder, files)
        if not (folder / "bpe").exists():
            toy_vocabulary(folder / "bpe")

    return Case(f"text: {name}", call, says, files_and_vocabulary)


def put(folder: Path, files: Files) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


TEXTS = [
    text("not there", {}, "no file or folder", "b.txt", source="b.txt"),
    text("an empty folder", {"t/x/.keep": ""}, "no text in", ".keep", source="t"),
    text("another ending", {"a.csv": "a,b"}, "'.csv'", ".txt", source="a.csv"),
    text("empty", {"a.txt": ""}, "no text in it"),
    text("white space", {"a.txt": " \n\t\n"}, "no text in it"),
    text("Latin-1", {"a.txt": "Käse".encode("latin-1")}, "a.txt", "not UTF-8 at byte 1"),
    text("UTF-16", {"a.txt": TEXT.encode("utf-16")}, "a.txt", "not UTF-8 at byte 0"),
    text("binary", {"a.txt": bytes(range(256))}, "a.txt", "not UTF-8"),
    text("cut gzip", {"a.txt.gz": gzip.compress(TEXT.encode() * 50)[:-9]}, "a.txt.gz", source="a.txt.gz"),
    text("no gzip", {"a.txt.gz": TEXT}, "a.txt.gz", source="a.txt.gz"),
    text("no xz", {"a.txt.xz": TEXT}, "a.txt.xz", source="a.txt.xz"),
    text("no JSON", {"a.jsonl": "{'text': 1}\n"}, "a.jsonl", "line 1", source="a.jsonl"),
    text("JSON of a list", {"a.jsonl": "[1]\n"}, "line 1", "'text'", source="a.jsonl"),
    text("JSON without the key", {"a.jsonl": '{"text": "ok"}\n{"body": "x"}\n'}, "line 2", "'body'", source="a.jsonl"),
    text("JSON of a number", {"a.jsonl": '{"text": 3}\n'}, "line 1", "int 3", source="a.jsonl"),
    text("a lone surrogate", {"a.jsonl": '{"text": "\\ud800"}\n'}, "line 1", "surrogate", source="a.jsonl"),
    text("too little", {"a.txt": "The"}, "expected 1 or more", "windows of 4000", context=4000),
    text("nothing held out", {"a.txt": TEXT}, "val_fraction=1e-09", "set it to 0", val_fraction=1e-9),
    text("no vocabulary", {"a.txt": TEXT, "bpe/x": ""}, "no tokeniser in", "tokenizer.json"),
    text("half a vocabulary", {"a.txt": TEXT, "bpe/vocab.json": "{}"}, "merges.txt", "needs both"),
    text("a vocabulary of a list", {"a.txt": TEXT, "bpe/tokenizer.json": "[1, 2]"}, "tokenizer.json", "byte-level BPE"),
    text("a vocabulary of null", {"a.txt": TEXT, "bpe/tokenizer.json": "null"}, "tokenizer.json", "byte-level BPE"),
    text("a vocabulary cut off", {"a.txt": TEXT, "bpe/tokenizer.json": '{"model": {'}, "damaged"),
    text("no end of text", {"a.txt": TEXT}, "'<eot>'", "name the right one", end_of_text="<eot>"),
    text("the cache is a file", {"a.txt": TEXT, "cache": "x"}, "cache", "folder"),
]


def shards(name: str, change: Callable[[Path, dict], Any], *says: str, verify: bool = True, **options: Any) -> Case:
    """A folder that was prepared and then changed: ``change(folder, content of the index)``."""

    def prepare(folder: Path) -> None:
        toy_vocabulary(folder / "bpe")
        put(folder, {"a.txt": TEXT * 20})
        made = TextDataModule(
            source=str(folder / "a.txt"),
            tokenizer=str(folder / "bpe"),
            context=4,
            batch_size=1,
            val_fraction=0.0,
            cache_dir=str(folder / "cache"),
            shard_tokens=256,
        )
        made.prepare_data()
        made.folder.rename(folder / "shards")
        shutil.rmtree(folder / "cache")
        index = folder / "shards" / "index.json"
        content = json.loads(index.read_text())
        changed = change(folder / "shards", content)
        index.write_text(changed if isinstance(changed, str) else json.dumps(content))

    def call(folder: Path) -> None:
        module = TextDataModule(
            **{"source": str(folder / "shards"), "tokenizer": str(folder / "bpe"), "context": 4, "batch_size": 1}
            | {"val_fraction": 0.0, "verify": verify}
            | options
        )
        module.prepare_data()
        module.setup()
        for _ in module.train_dataloader():
            pass

    return Case(f"shards: {name}", call, says, prepare)


def first(content: dict) -> dict:
    return content["splits"]["train"]["shards"][0]


def rewrite(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


SHARDS = [
    shards("index: empty", lambda f, c: "", "index.json", "damaged", "delete the folder"),
    shards("index: a list", lambda f, c: "[]", "index.json", "damaged"),
    shards("index: null", lambda f, c: "null", "index.json", "damaged"),
    shards("index: another program's", lambda f, c: c.update(format="x"), "not an index of packed tokens"),
    shards("index: newer", lambda f, c: c.update(version=2), "format version 2", "reads 1"),
    shards("index: no splits", lambda f, c: c.pop("splits"), "damaged", "splits"),
    shards("index: one split", lambda f, c: c["splits"].pop("val"), "splits ['train']"),
    shards("index: an unknown key", lambda f, c: c.update(extra=1), "damaged", "extra"),
    shards("index: shards of text", lambda f, c: c["splits"]["train"].update(shards="abc"), "damaged"),
    shards("index: a dtype that is none", lambda f, c: c.update(dtype="<q9"), "dtype", "'<u2' or '<u4'"),
    shards("index: a float dtype", lambda f, c: c.update(dtype="<f4"), "dtype", "'<u2' or '<u4'"),
    shards("index: a dtype of a number", lambda f, c: c.update(dtype=2), "dtype", "'<u2' or '<u4'"),
    shards("index: no tokens a shard", lambda f, c: c.update(shard_tokens=0), "shard_tokens", "1 or more"),
    shards("index: another number a shard", lambda f, c: c.update(shard_tokens=100), "256", "100"),
    shards("index: minus tokens", lambda f, c: first(c).update(tokens=-4), "tokens", "damaged"),
    shards("index: tokens of text", lambda f, c: first(c).update(tokens="256"), "tokens", "damaged"),
    shards("index: a path outside", lambda f, c: first(c).update(file="../a.txt"), "'../a.txt'", "damaged"),
    shards("index: a shard of a number", lambda f, c: first(c).update(file=7), "damaged"),
    shards("index: not finished", lambda f, c: c.update(complete=False), "not finished"),
    shards("index: tokeniser of text", lambda f, c: c.update(tokenizer="gpt2"), "damaged"),
    shards("index: another vocabulary size", lambda f, c: c["tokenizer"].update(vocab_size=5), "vocab_size was 5"),
    shards("a shard is missing", lambda f, c: (f / first(c)["file"]).unlink(), "missing", "256 tokens"),
    shards("a shard is cut", lambda f, c: rewrite(f, first(c)["file"], b"12"), "truncated: 2 bytes", "512"),
    shards("a shard is longer", lambda f, c: rewrite(f, first(c)["file"], b"1" * 600), "too long", "512"),
    shards("a shard is another", lambda f, c: rewrite(f, first(c)["file"], b"1" * 512), "SHA-256", "Copy it again"),
    shards("held out otherwise", lambda f, c: None, "val_fraction is 0.5", "0.0", val_fraction=0.5),
]


def mlm(name: str, files: Files, *says: str, **options: Any) -> Case:
    """An MLM module over a.txt, with the sample's vocabulary."""

    def call(folder: Path) -> None:
        module = MlmDataModule(
            **{
                "source": str(folder / "a.txt"),
                "tokenizer": str(folder / "vocab.txt"),
                "cache_dir": str(folder / "cache"),
            }
            | {"max_length": 16, "max_predictions": 2, "batch_size": 1, "val_fraction": 0.0}
            | options
        )
        module.prepare_data()
        module.setup()

    return Case(f"mlm: {name}", call, says, {"a.txt": TEXT, "vocab.txt": WORDS, **files})


MLM = [
    mlm("one document", {}, "two documents", "separator"),
    mlm("documents of one sentence", {"a.txt": "one\0two\0three"}, "two sentences or more", separator="\0"),
    mlm(
        "more than there is",
        {"a.txt": TEXT + "\0" + TEXT},
        "expected 500",
        "batch_size",
        separator="\0",
        batch_size=500,
    ),
    mlm("no [MASK]", {"vocab.txt": WORDS.replace("[MASK]", "[M]")}, "lacks [MASK]", "a BERT vocabulary"),
    mlm("an empty vocabulary", {"vocab.txt": ""}, "lacks [PAD]"),
    mlm("a token twice", {"vocab.txt": WORDS + "[PAD]\n"}, "repeats token '[PAD]'"),
    mlm("a binary vocabulary", {"vocab.txt": b"\xff\xfe\x00"}, "vocab.txt", "damaged"),
    mlm("a config beside it, damaged", {"tokenizer_config.json": "{"}, "tokenizer_config.json", "damaged"),
    mlm("a config beside it, a list", {"tokenizer_config.json": "[]"}, "tokenizer_config.json", "an object"),
    mlm("lower case of text", {"tokenizer_config.json": '{"do_lower_case": "yes"}'}, "do_lower_case is 'yes'", "true"),
    mlm("no vocabulary", {}, "no vocabulary", "vocab.txt", tokenizer="./nowhere/vocab.txt"),
]


def wordpiece(name: str, content: Any, *says: str) -> Case:
    return Case(f"wordpiece: {name}", lambda f: load_wordpiece(f), says, {"tokenizer.json": json.dumps(content)})


VOCABULARIES = [
    wordpiece("null", None, "tokenizer.json", "a WordPiece model"),
    wordpiece("a BPE", {"model": {"type": "BPE", "vocab": {}, "merges": []}}, "'BPE'", "a WordPiece model"),
    wordpiece("without vocabulary", {"model": {"type": "WordPiece"}}, "a WordPiece model with a vocabulary"),
    wordpiece("vocabulary of a list", {"model": {"vocab": ["[PAD]", "a"]}}, "model.vocab is a list", "an object"),
    wordpiece(
        "ids of text",
        {"model": {"vocab": dict.fromkeys(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), "a")}},
        "damaged",
        "tokenizer.json",
    ),
    wordpiece(
        "normaliser of text",
        {"model": {"vocab": {t: i for i, t in enumerate(WORDS.split("\n")[:-1])}}, "normalizer": "lower"},
        "normalizer",
        "an object",
    ),
    Case(
        "bpe: added tokens of text",
        lambda f: load_bpe(f),
        ("added_tokens", "damaged"),
        {"tokenizer.json": json.dumps({"model": {"vocab": {}, "merges": []}, "added_tokens": ["x"]})},
    ),
    Case("bpe: a folder of nothing", lambda f: load_bpe(f), ("no tokeniser in", "tokenizer.json")),
    Case("wordpiece: a folder of nothing", lambda f: load_wordpiece(f), ("no tokenizer.json or vocab.txt",)),
]
CASES = [*TEXTS, *SHARDS, *MLM, *VOCABULARIES]
