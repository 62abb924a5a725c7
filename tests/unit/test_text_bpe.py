import json

import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from slope_pl.data import DataUnavailableError, load_bpe, save_bpe
from tests.unit.test_squad_reading import real_data

MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ Ġ", "' s", "Ċ Ċ", "1 2"]
END = 256 + len(MERGES)


def toy_vocabulary(folder, merges=MERGES, prefix="toy-"):
    """GPT-2's two files with a handful of merges; end-of-text comes last, as in GPT-2."""
    folder.mkdir(exist_ok=True)
    tokens = [*sorted(ByteLevel.alphabet()), *(rule.replace(" ", "") for rule in merges), "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / f"{prefix}encoder.json").write_text(json.dumps(vocab))
    (folder / f"{prefix}vocab.bpe").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return toy_vocabulary(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def tokenizer(toy):
    return load_bpe(toy)


def test_round_trip(tokenizer):
    texts = ["", "the inn's  12\n\n\tthe", "Déjà-vu 日本語 👍🏽\0\r\n", "x <|endoftext|> y"]
    rows = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(row) for row in rows] == texts
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (END + 1, END)
    assert rows[0] == []
    assert len(rows[1]) == len(["t", "he", "Ġ", "in", "n", "'s", "Ġ", "Ġ", "12", "ĊĊ", "ĉ", "the"]) + 1
    assert END not in rows[3], "the spelling of end-of-text in a document is plain characters"
    assert tokenizer.decode([END]) == "<|endoftext|>"


def test_a_saved_tokenizer_is_the_same_one(tokenizer, tmp_path):
    """Here and for transformers; whatever its end-of-text token is called."""
    transformers = pytest.importorskip("transformers")
    save_bpe(tokenizer, tmp_path / "new" / "folder")
    assert load_bpe(tmp_path / "new" / "folder").fingerprint == tokenizer.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new" / "folder")
    texts = ["the inn's  12\n\n\tthe", "Déjà-vu 日本語 👍🏽\r\n"]
    assert theirs(texts)["input_ids"] == tokenizer.encode_batch(texts)
    assert theirs.decode(tokenizer.encode_batch(texts)[0]) == texts[0]
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (END, END, END + 1)
    assert theirs.decode([5, END], skip_special_tokens=True) == tokenizer.decode([5])


def test_all_file_forms_are_the_same_tokenizer(toy, tokenizer, tmp_path, monkeypatch):
    vocab = json.loads((toy / "toy-encoder.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_bytes((toy / "toy-vocab.bpe").read_bytes())
    bare = {key: value for key, value in vocab.items() if key != "<|endoftext|>"}
    content = json.loads(tokenizer.encoder.to_str())
    content["model"]["vocab"] = bare
    content["added_tokens"] = [
        {"id": END, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
    ]  # fmt: skip
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    stateful = tmp_path / "stateful"
    stateful.mkdir()
    (stateful / "tokenizer.json").write_text(json.dumps(content))
    hub = Tokenizer.from_file(str(stateful / "tokenizer.json"))
    monkeypatch.setattr(Tokenizer, "from_pretrained", staticmethod(lambda name: {"some/gpt2": hub}[name]))
    text = "the <|endoftext|> in"
    for source in (tmp_path, tmp_path / "merges.txt", toy / "toy-encoder.json", stateful, "some/gpt2"):
        again = load_bpe(source)
        assert again.fingerprint == tokenizer.fingerprint, source
        assert again.encode_batch([text]) == tokenizer.encode_batch([text])
    content["pre_tokenizer"]["add_prefix_space"] = True
    (stateful / "tokenizer.json").write_text(json.dumps(content))
    assert load_bpe(stateful).fingerprint != tokenizer.fingerprint
    assert not load_bpe(stateful).can_be_cut
    other = load_bpe(toy_vocabulary(tmp_path / "other", MERGES[:-1]))
    assert other.fingerprint != tokenizer.fingerprint
    assert load_bpe(toy, end_of_text="the" if "the" in vocab else "he").fingerprint != tokenizer.fingerprint


def test_errors(toy, tmp_path, monkeypatch):
    def fail(name):
        raise Exception("no network")

    monkeypatch.setattr(Tokenizer, "from_pretrained", staticmethod(fail))
    (tmp_path / "empty").mkdir()
    for source, error, message in (
        ("nowhere/at/all", DataUnavailableError, r"no tokeniser nowhere/at/all .*Give a folder with tokenizer\.json"),
        ("gpt3", DataUnavailableError, r"cannot load the tokeniser of 'gpt3' from the hub.*no network\)\. Without"),
        (tmp_path / "empty", DataUnavailableError, r"no tokeniser in .*it holds: nothing\); expected tokenizer\.json"),
    ):
        with pytest.raises(error, match=message):
            load_bpe(source)
    with pytest.raises(
        ValueError, match=r"no token '<eos>' to end documents with \(it has <\|endoftext\|>\); .*end_of_text"
    ):
        load_bpe(toy, "<eos>")
    wordpiece = tmp_path / "tokenizer.json"
    wordpiece.write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {"a": 0}}}))
    with pytest.raises(ValueError, match="the model is 'WordPiece', expected a byte-level BPE"):
        load_bpe(wordpiece)
    wordpiece.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json, or the file that goes with it, is damaged"):
        load_bpe(tmp_path)
    wordpiece.unlink()
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "<|endoftext|>": 1}))
    with pytest.raises(DataUnavailableError, match=r"vocab\.json is there, but .*merges\.txt is not"):
        load_bpe(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ValueError, match="the vocabulary of 2 tokens lacks 255 of the 256 byte symbols"):
        load_bpe(tmp_path)
    toy_vocabulary(tmp_path, prefix="")
    with pytest.raises(ValueError, match=r"several vocabularies in .*: encoder\.json, vocab\.json\. Name the file"):
        load_bpe(tmp_path)
    (tmp_path / "vocab.bpe").write_text("q zz\n")
    with pytest.raises(ValueError, match=r"encoder\.json and vocab\.bpe: the tokeniser is damaged: .*zz"):
        load_bpe(tmp_path / "encoder.json")


def test_gpt2_itself():
    tokenizer = load_bpe(real_data("tokenizers/gpt2-encoder.json"))
    assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.can_be_cut) == (50257, 50256, True)
    transformers = pytest.importorskip("transformers")
    text = "Hello world, it's 2:4.  Déjà\n\n\tvu\r\n日本 👍🏽 don't! <unk>"
    reference = transformers.GPT2Tokenizer(
        str(real_data("tokenizers/gpt2-encoder.json")), str(real_data("tokenizers/gpt2-vocab.bpe"))
    )
    assert tokenizer.encode_batch([text]) == [reference(text)["input_ids"]]
    assert tokenizer.encode_batch(["Hello world"]) == [[15496, 995]]
