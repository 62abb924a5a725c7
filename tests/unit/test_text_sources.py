import gzip
import json
import logging
import lzma

import pytest

from slope_pl.data import DataUnavailableError, HubText, LocalText, TextFormatError
from slope_pl.data import text_sources as sources


def texts(source, skip=0):
    return [document.text for document in source.documents(skip)]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def write(tmp_path):
    def _write(content, name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return _write


@pytest.mark.parametrize(("ending", "pack"), [("", bytes), (".xz", lzma.compress), (".gz", gzip.compress)])
def test_files(write, ending, pack):
    path = write(pack("\ufeffé\r\nb\0\0c\0".encode()), f"a.txt{ending}")
    assert texts(LocalText(path, "\0")) == ["é\r\nb", "", "c", ""]
    path = write(pack(b"one\n\ndocument\n"), f"b.txt{ending}")
    assert texts(LocalText(path)) == ["one\n\ndocument\n"]
    path = write(
        pack(lines({"text": "a\0\n"}, {"text": "", "id": 3}) + b"\n" + lines({"text": "c"})), f"c.jsonl{ending}"
    )
    source = LocalText(path)
    assert texts(source) == ["a\0\n", "", "c"]
    assert texts(source, 2) == ["c"]
    last = list(source.documents())[-1]
    assert last.where == f"{path}, line 4"
    assert last.done == source.total == path.stat().st_size


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("text", ["a\n\nb\n\n\n\nc\n\n\nd\n", "\n\n", "", "é\n\né"])
def test_separators_across_reads(write, monkeypatch, chunk, text):
    monkeypatch.setattr(sources, "_CHUNK", chunk)
    assert texts(LocalText(write(text.encode(), "a.txt"), "\n\n")) == text.split("\n\n")


def test_folders(write, tmp_path, caplog):
    write(b"second", "b.txt")
    write(lines({"body": "third"}), "c/d.jsonl")
    write(lzma.compress(b"first"), "A.TXT.XZ")
    write(b"x", "notes.md")
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        source = LocalText(tmp_path, text_field="body")
    assert texts(source) == ["first", "second", "third"]
    assert texts(source, 1) == ["second", "third"]
    assert [document.done for document in source.documents()][-1] == source.total
    assert "1 files are no text, left out: notes.md" in caplog.text


BAD = {
    "binary": (
        "a.txt",
        b"\x7fELF\x00\x01",
        r"a\.txt: NUL character at position 4.*say separator='\\0' \(in a config of YAML, \"\\0\"; no",
    ),
    "latin1": ("a.txt", "abc\0dé".encode("latin-1"), r"a\.txt: not UTF-8 at byte 5 of it.*Convert the file to UTF-8"),
    "cut": ("a.txt.xz", lzma.compress(b"abc" * 999)[:-30], r"a\.txt\.xz: the compressed file is damaged or cut off"),
    "cut gz": ("a.txt.gz", gzip.compress(b"abc" * 999)[:-9], r"a\.txt\.gz: the compressed file is damaged or cut off"),
    "no xz": ("a.txt.xz", b"abc", "damaged or cut off"),
    "no gz": ("a.txt.gz", b"abc", "damaged or cut off"),
    "no json": ("a.jsonl", b'{"text": "a"}\n{"text" 1}\n', r"a\.jsonl, line 2: not JSON at column 9: Expecting ':'"),
    "list": ("a.jsonl", b"[1]", r"line 1: list, expected an object with key 'text'"),
    "field": (
        "a.jsonl",
        b'{"body": "a"}',
        r"line 1: no key 'text' \(its keys: 'body'\); name the right one with text_field",
    ),
    "null": ("a.jsonl", b'{"text": null}', r"line 1: 'text' is NoneType None, expected a string"),
    "surrogate": ("a.jsonl", b'{"text": "ab\\ud800"}', r"line 1: half a surrogate pair \(\\ud800\) at position 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_text_is_named_with_its_place(write, case):
    name, content, message = BAD[case]
    with pytest.raises(TextFormatError, match=message):
        texts(LocalText(write(content, name)))


def test_later_documents_are_named_too(write):
    with pytest.raises(TextFormatError, match=r"a\.txt, document 1: not UTF-8 at byte 0 of it"):
        texts(LocalText(write(b"ab|\xff", "a.txt"), "|"))


def test_bad_places(write, tmp_path):
    with pytest.raises(DataUnavailableError, match=r"no file or folder .*none\.txt .*Give a \.txt, \.txt\.xz"):
        LocalText(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"a\.csv ends in '\.csv', expected one of \.txt, "):
        LocalText(write(b"x", "a.csv"))
    with pytest.raises(ValueError, match=r"no text in .* \(it holds: a\.csv\); expected files in \.txt"):
        LocalText(tmp_path)
    with pytest.raises(ValueError, match="separator is '', expected a string"):
        LocalText(tmp_path, "")


def test_what_is_local(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(b"x", "corpus/a.txt")
    for text in ("corpus", "./x", "~/x", "/x", "a/b/c", "x.txt", "a/x.jsonl.gz"):
        assert sources.is_local_text(text), text
    for text in ("openwebtext", "Skylion007/openwebtext"):
        assert not sources.is_local_text(text), text


def test_fingerprints_read_files_when_they_must(write, tmp_path, monkeypatch):
    path = write(b"abc", "a.txt")
    read = []
    monkeypatch.setattr(sources, "sha256", lambda p: read.append(p) or str(p.read_bytes()))
    first = LocalText(tmp_path).fingerprint()
    assert LocalText(tmp_path).fingerprint(first) == first
    assert read == [path]
    path.write_bytes(b"abd")
    assert LocalText(tmp_path).fingerprint(first)["files"][0]["sha256"] == "b'abd'"
    assert read == [path] * 2


class Rows:
    """What of `datasets.IterableDataset` is used; may break off."""

    def __init__(self, rows, fail_at=None, start=0):
        self.rows, self.fail_at, self.start = rows, fail_at, start

    def skip(self, n):
        return Rows(self.rows, self.fail_at, n)

    def __iter__(self):
        for i, row in enumerate(self.rows):
            if i == self.fail_at:
                raise RuntimeError("connection lost")
            if i >= self.start:
                yield row


@pytest.fixture
def hub(monkeypatch):
    asked, answer = [], {}

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        if isinstance(answer["rows"], Exception):
            raise answer["rows"]
        return answer["rows"]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked, answer


def test_hub(hub):
    asked, answer = hub
    answer["rows"] = Rows([{"text": "a\0"}, {"text": ""}, {"text": "c"}, {"body": "d"}])
    source = HubText("some/text", "en", "train", "v1")
    documents = source.documents(1)
    assert [next(documents).text, (last := next(documents)).text] == ["", "c"]
    assert (last.done, last.where) == (3, "hub data set 'some/text', subset 'en', split 'train', row 2")
    assert asked == [(("some/text", "en"), {"split": "train", "revision": "v1", "streaming": True})]
    with pytest.raises(TextFormatError, match=r"row 3: no key 'text' \(its keys: 'body'\)"):
        next(documents)
    assert source.fingerprint() == {
        "kind": "hub", "id": "some/text", "subset": "en", "split": "train", "revision": "v1", "text_field": "text",
    }  # fmt: skip


def test_a_script_on_the_hub_says_where_its_files_are(hub):
    """Bookcorpus is one; datasets 4 and later run none."""
    _, answer = hub
    answer["rows"] = RuntimeError("Dataset scripts are no longer supported, but found bookcorpus.py")
    message = r"'bookcorpus'.*found bookcorpus\.py.*revision='refs/convert/parquet'"
    with pytest.raises(DataUnavailableError, match=message):
        next(HubText("bookcorpus").documents())


def test_hub_through_datasets_itself(hub, monkeypatch):
    datasets = pytest.importorskip("datasets")
    _, answer = hub
    answer["rows"] = datasets.IterableDataset.from_generator(lambda: ({"text": str(i)} for i in range(5)))
    assert texts(HubText("x")) == list("01234")
    assert texts(HubText("x"), 3) == list("34")


def test_hub_errors(hub):
    _, answer = hub
    answer["rows"] = ConnectionError("offline")
    with pytest.raises(
        DataUnavailableError, match=r"cannot stream data set 'x' .*offline\).*Without a network, give a folder"
    ):
        texts(HubText("x"))
    answer["rows"] = Rows([{"text": "a"}] * 3, fail_at=2)
    with pytest.raises(
        DataUnavailableError, match=r"stopped after 2 rows \(RuntimeError: connection lost\)\. Run again"
    ):
        texts(HubText("x"))
