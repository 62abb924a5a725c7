"""Where pretraining text comes from: files, folders and hub data sets, each as a stream of documents.

Sources know how to name what is wrong with a text and where, to skip what an interrupted preparation has done, and to
say whether they are still what they were.
"""

import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import IO, Any, Protocol

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from slope_pl.data.squad import DataUnavailableError

_CHUNK = 1 << 20  # bytes a read
_KINDS = (".txt", ".jsonl")
_PACKED = (".xz", ".gz")
_BOM = b"\xef\xbb\xbf"


class TextFormatError(ValueError):
    """A source is not text in the expected form; the message names the file and the place in it."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        text: Its characters, which can be encoded in UTF-8; may be empty.
        where: Its place, for messages.
        done: How far the source has been read, in its unit: bytes on disk, or documents.
    """

    text: str
    where: str
    done: int


class TextSource(Protocol):
    """A stream of documents in a fixed order."""

    name: str
    unit: str  # of `total` and `Document.done`: "B" or " documents"
    total: int | None

    def fingerprint(self, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Say what the source is, as JSON; ``known`` is an earlier answer, which can save reading files again."""

    def documents(self, skip: int = 0) -> Iterator[Document]:
        """Yield the documents after the first ``skip``, empty ones included."""


class LocalText:
    """A file, or all files below a folder in the order of their names: .txt and .jsonl, also as .xz and .gz.

    Args:
        path: The file or folder.
        separator: What separates the documents of a .txt file; None makes the whole file one document.
        text_field: Key of the text in the objects of a .jsonl file.

    Raises:
        DataUnavailableError: No such file or folder.
        ValueError: The file, or every file in the folder, has another ending; or the separator is empty.
    """

    unit = "B"

    def __init__(self, path: str | os.PathLike[str], separator: str | None = None, text_field: str = "text") -> None:
        if separator == "":
            raise ValueError("separator is '', expected a string such as '\\0', or None for one document a file")
        self.path = Path(path).expanduser()
        self.separator, self.text_field, self.name = separator, text_field, str(self.path)
        endings = ", ".join(kind + packed for kind in _KINDS for packed in ("", *_PACKED))
        if self.path.is_dir():
            every = sorted(p for p in self.path.rglob("*") if p.is_file())
            self.files = sorted(filter(_kind, every), key=self._relative)
            if not self.files:
                names = ", ".join(self._relative(p) for p in every[:10]) or "nothing"
                raise ValueError(f"no text in {self.path} (it holds: {names}); expected files in {endings}")
            if others := [self._relative(p) for p in every if not _kind(p)]:
                rank_zero_info(f"{self.path}: {len(others)} files are no text, left out: {', '.join(others[:5])} ...")
        elif self.path.is_file():
            if not _kind(self.path):
                raise ValueError(f"{self.path} ends in {''.join(self.path.suffixes)!r}, expected one of {endings}")
            self.files = [self.path]
        else:
            raise DataUnavailableError(
                f"no file or folder {self.path} (working directory: {Path.cwd()}). Give a {endings} file, a folder of "
                "such files, a folder prepared before (with index.json), or a hub id such as 'openwebtext'."
            )
        self.total: int | None = sum(p.stat().st_size for p in self.files)

    def _relative(self, path: Path) -> str:
        return path.name if path == self.path else path.relative_to(self.path).as_posix()

    def fingerprint(self, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return name, size, time and SHA-256 of each file; files of the known size and time are not read again."""
        earlier = {row["file"]: row for row in (known or {}).get("files", ())}
        out = []
        for path in tqdm(self.files, desc="checking the text files", unit=" files", delay=2, leave=False):
            stat = path.stat()
            row = {"file": self._relative(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            old = earlier.get(row["file"], {})
            same = all(old.get(key) == value for key, value in row.items())
            out.append({**row, "sha256": old["sha256"] if same and "sha256" in old else sha256(path)})
        return {"kind": "files", "separator": self.separator, "text_field": self.text_field, "files": out}

    def documents(self, skip: int = 0) -> Iterator[Document]:
        """Yield the documents after the first ``skip``.

        Raises:
            TextFormatError: Damaged compression, no UTF-8, no JSON, no text: with the file and the place in it.
        """
        return islice(self._all(), skip, None)

    def _all(self) -> Iterator[Document]:
        before = 0
        for path in self.files:
            try:
                with path.open("rb") as raw, _unpacked(path, raw) as stream:
                    texts = self._lines(path, stream) if _kind(path) == ".jsonl" else self._parts(path, stream)
                    for text, where in texts:
                        yield Document(text, where, before + raw.tell())
            except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
                raise TextFormatError(f"{path}: the compressed file is damaged or cut off: {error}") from error
            before += path.stat().st_size

    def _parts(self, path: Path, stream: IO[bytes]) -> Iterator[tuple[str, str]]:
        """Documents of a .txt file. Bytes are split, not characters, for a megabyte at a time and honest positions."""
        for number, part in enumerate(_split(stream, self.separator)):
            where = f"{path}, document {number}" if self.separator else str(path)
            text = _decode(part.removeprefix(_BOM) if number == 0 else part, where)
            if "\0" in text and "\0" not in (self.separator or ""):
                raise TextFormatError(
                    f"{where}: NUL character at position {text.index(chr(0))}: this is either no text, or documents "
                    "separated by NUL, in which case say separator='\\0' (in a config of YAML, \"\\0\"; no command line can)"
                )
            yield text, where

    def _lines(self, path: Path, stream: IO[bytes]) -> Iterator[tuple[str, str]]:
        for number, line in enumerate(stream, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(_decode(line.removeprefix(_BOM) if number == 1 else line, where))
            except json.JSONDecodeError as error:
                raise TextFormatError(f"{where}: not JSON at column {error.colno}: {error.msg}") from error
            yield _text_of(row, self.text_field, where), where


class HubText:
    """One split of a data set on the hub, streamed.

    Args:
        name: Id of the data set.
        subset: Its configuration, where it has several.
        split: Which split to read.
        revision: Commit or tag. Without it, a change on the hub goes unnoticed.
        text_field: Column of the text.
    """

    unit = " documents"

    def __init__(
        self,
        name: str,
        subset: str | None = None,
        split: str = "train",
        revision: str | None = None,
        text_field: str = "text",
    ) -> None:
        self.id, self.subset, self.split, self.revision, self.text_field = name, subset, split, revision, text_field
        self.name = f"hub data set {name!r}" + (f", subset {subset!r}" if subset else "") + f", split {split!r}"
        self.total: int | None = None

    def fingerprint(self, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return what was asked of the hub; its content is not read."""
        keys = ("id", "subset", "split", "revision", "text_field")
        return {"kind": "hub", **{key: getattr(self, key) for key in keys}}

    def documents(self, skip: int = 0) -> Iterator[Document]:
        """Yield the documents after the first ``skip``.

        Raises:
            DataUnavailableError: The hub is not reachable, has no such data, or the connection broke.
            TextFormatError: A row has no text.
        """
        rows = stream_hub(self.id, self.subset, self.split, self.revision)
        rows = iter(rows.skip(skip) if skip else rows)
        for number in count(skip):
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # of datasets, pyarrow or whatever HTTP library is below
                raise DataUnavailableError(
                    f"{self.name}: reading stopped after {number:,} rows ({type(error).__name__}: {error}). "
                    "Run again to go on: what is prepared is kept."
                ) from error
            where = f"{self.name}, row {number}"
            yield Document(_text_of(row, self.text_field, where), where, number + 1)


def stream_hub(name: str, subset: str | None, split: str, revision: str | None) -> Any:
    """Open a hub data set for streaming.

    Returns:
        The ``datasets.IterableDataset``.

    Raises:
        DataUnavailableError: The hub is not reachable, or has no such data set, subset, split or revision.
    """
    import datasets  # here: it takes a second to import, and local files do not need it

    try:
        return datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:  # the last: a data set that is a script, since datasets 4
        script = isinstance(error, RuntimeError) and "script" in str(error)
        raise DataUnavailableError(
            f"cannot stream data set {name!r} (subset {subset!r}, split {split!r}, revision {revision!r}) from the hub "
            f"({type(error).__name__}: {error}); there is no file or folder of that name in {Path.cwd()} either. "
            "Without a network, give a folder of .txt or .jsonl files, or one prepared elsewhere (with index.json)."
            + (
                " A data set that is a script: revision='refs/convert/parquet' is the hub's own copy in files."
                if script
                else ""
            )
        ) from error


def is_local_text(source: str | os.PathLike[str]) -> bool:
    """Tell a path from a hub id: what exists on disk, or is written like a path or a text file, is local."""
    text = os.fspath(source)
    written = text.startswith((".", "~", os.sep)) or text.count("/") > 1 or _kind(Path(text)) is not None
    return written or os.path.exists(text)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return next((kind for kind in _KINDS if name.endswith(kind)), None)


def _unpacked(path: Path, raw: IO[bytes]) -> IO[bytes]:
    match path.suffix.lower():
        case ".xz":
            return lzma.open(raw, "rb")
        case ".gz":
            return gzip.open(raw, "rb")  # type: ignore[return-value]
    return raw


def _split(stream: IO[bytes], separator: str | None) -> Iterable[bytes]:
    if separator is None:
        yield stream.read()
        return
    mark, buffer = separator.encode(), bytearray()
    while chunk := stream.read(_CHUNK):
        new = max(len(buffer) - len(mark) + 1, 0)
        buffer += chunk
        if buffer.find(mark, new) >= 0:
            *done, rest = bytes(buffer).split(mark)
            yield from done
            buffer = bytearray(rest)
    yield bytes(buffer)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise TextFormatError(
            f"{where}: not UTF-8 at byte {error.start} of it: {error.reason}. Convert the file to UTF-8, or leave it out."
        ) from error


def _text_of(row: Any, field: str, where: str) -> str:
    if not isinstance(row, Mapping):
        raise TextFormatError(f"{where}: {type(row).__name__}, expected an object with key {field!r}")
    if field not in row:
        keys = ", ".join(sorted(map(repr, row))) or "none"
        raise TextFormatError(f"{where}: no key {field!r} (its keys: {keys}); name the right one with text_field")
    text = row[field]
    if not isinstance(text, str):
        shown = repr(text)[:40]
        raise TextFormatError(f"{where}: {field!r} is {type(text).__name__} {shown}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = f"\\u{ord(text[error.start]):04x}"
        raise TextFormatError(
            f"{where}: half a surrogate pair ({bad}) at position {error.start}, no character"
        ) from None
    return text
