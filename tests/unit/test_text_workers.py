"""Several processes: the same bytes, whatever their number and whatever happens to them."""

import logging
import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext

import pytest

from slope_pl.data import LocalText, load_bpe, prepare_shards, text_workers
from slope_pl.data import text_prepare as preparation
from slope_pl.data.text_packing import Packer
from slope_pl.data.text_sources import Document
from slope_pl.data.text_workers import WorkerError
from tests.unit.test_text_bpe import tokenizer, toy  # noqa: F401 - fixtures
from tests.unit.test_text_packing import wordpieces  # noqa: F401 - a fixture
from tests.unit.test_text_prepare import Stopped, Stopping, files, prepare, some_documents, write_corpus


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus.txt", some_documents(90))


@pytest.fixture
def started(monkeypatch):
    """Small batches, all but the first in other processes; the processes that were started."""
    monkeypatch.setattr(preparation, "_BATCH_DOCUMENTS", 4)
    monkeypatch.setattr(text_workers, "_ALONE_CHARACTERS", 1)
    made, start = [], text_workers._Process.__init__
    monkeypatch.setattr(text_workers._Process, "__init__", lambda self, work: made.append(self) or start(self, work))
    yield made
    for process in made:
        assert process.process.returncode is not None, "a process was left behind"
        assert process.process.stdin.closed
        assert process.process.stdout.closed


@pytest.mark.parametrize("kind", ["bpe", "lower", "lines"])
def test_the_same_bytes_whatever_the_number(tmp_path, corpus, tokenizer, wordpieces, started, monkeypatch, kind):  # noqa: F811
    bpe = tokenizer if kind == "bpe" else wordpieces[kind]
    here, pack = [], Packer.pack_documents
    monkeypatch.setattr(Packer, "pack_documents", lambda self, t, *rest: here.extend(t) or pack(self, t, *rest))
    prepare(tmp_path / "1", corpus, bpe, processes=1)
    assert (len(here), started) == (90, [])
    for processes in (2, 3):
        here.clear()
        prepare(tmp_path / str(processes), corpus, bpe, processes=processes)
        assert files(tmp_path / str(processes)) == files(tmp_path / "1")
        assert len(here) == 4, "all but the first batch are packed elsewhere"
    assert len(started) == 5


def test_a_short_text_starts_no_process(tmp_path, corpus, tokenizer, monkeypatch):  # noqa: F811
    monkeypatch.setattr(text_workers._Process, "__init__", lambda *_: pytest.fail("started"))
    prepare(tmp_path / "out", corpus, tokenizer, processes=2)
    empty = write_corpus(tmp_path / "one.txt", ["the inn"])
    assert prepare(tmp_path / "one", empty, tokenizer, processes=2, val_fraction=0).complete


def test_one_process_for_each_core_by_default(tmp_path, corpus, tokenizer, started, monkeypatch):  # noqa: F811
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    prepare(tmp_path / "out", corpus, tokenizer)
    assert len(started) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(200)))
    assert text_workers.usable_processes() == 16


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (True, TypeError), ("2", TypeError)])
def test_bad_numbers(tmp_path, corpus, tokenizer, value, error):  # noqa: F811
    with pytest.raises(error, match=rf"processes is {value!r}, expected "):
        prepare(tmp_path / "out", corpus, tokenizer, processes=value)


def test_stopped_and_resumed_with_other_numbers(tmp_path, corpus, tokenizer, started, caplog):  # noqa: F811
    prepare(tmp_path / "whole", corpus, tokenizer, processes=1)
    source = Stopping(corpus, "\0")
    said = []
    for numbers in ((1, 1, 1, 1), (2, 1, 3, 2)):
        folder = tmp_path / str(numbers)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
            for source.stop_at, processes in zip((30, 60, 75, None), numbers, strict=True):
                with pytest.raises(Stopped) if source.stop_at else nullcontext():
                    prepare_shards(folder, source, tokenizer, val_fraction=0.2, shard_tokens=500, processes=processes)
        assert files(folder) == files(tmp_path / "whole")
        said.append([message.partition("going on after ")[2] for message in caplog.messages[:-1]])
    assert said[0] == said[1], "what was read before reading failed is kept, whoever packs it"
    assert all(said[0])
    assert len(said[0]) == 3


def test_interrupted_from_the_keyboard(tmp_path, corpus, tokenizer, started, monkeypatch):  # noqa: F811
    prepare(tmp_path / "whole", corpus, tokenizer, processes=1)
    commit = preparation._Writer._commit

    def stop(self):
        commit(self)
        # The terminal's Ctrl-C goes to all processes of a session.
        assert all(os.getsid(process.process.pid) != os.getsid(0) for process in started)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation._Writer, "_commit", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "out", corpus, tokenizer, processes=2)
    assert started
    assert all(process.process.returncode is not None for process in started)
    prepare(tmp_path / "out", corpus, tokenizer, processes=2)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


class Broken(LocalText):
    """Its 51st document cannot be encoded, which sources check; the error comes up where it is packed."""

    def documents(self, skip=0):
        for i, document in enumerate(super().documents(skip), skip):
            yield Document("the \ud800 inn", document.where, document.done) if i == 50 else document


def test_an_error_in_a_process_is_as_if_it_were_here(tmp_path, corpus, tokenizer, started):  # noqa: F811
    options = {"val_fraction": 0.2, "shard_tokens": 500}
    for processes in (1, 2):
        with pytest.raises(UnicodeEncodeError, match=r"can't encode character '\\ud800' in position 4") as found:
            prepare_shards(tmp_path / "out", Broken(corpus, "\0"), tokenizer, **options, processes=processes)
    assert "In a process that tokenises:\nTraceback" in found.value.__notes__[0]
    prepare(tmp_path / "whole", corpus, tokenizer, processes=1)
    prepare(tmp_path / "out", corpus, tokenizer, processes=2)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_an_error_that_cannot_be_sent_keeps_its_message():
    class PanicException(BaseException):
        pass

    class Picky(Exception):
        def __init__(self, a, b):
            super().__init__(a)

    for error, text in ((PanicException("no entry"), "PanicException: no entry"), (Picky("p", "q"), "Picky: p")):
        found = text_workers._that_travels(error)
        assert isinstance(found, WorkerError)
        assert str(found) == text
    assert type(text_workers._that_travels(KeyError("k"))) is KeyError


@pytest.mark.parametrize("when", ["before", "at work"])
def test_a_process_that_is_killed(tmp_path, corpus, tokenizer, started, monkeypatch, when):  # noqa: F811
    ask, asked = text_workers._Process.ask, []

    def kill(self, texts):
        asked.append(self)
        if len(asked) == 5:
            self.process.kill()
            if when == "before":
                self.process.wait()
        return ask(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(text_workers._Process, "ask", kill)
        message = r"a process that tokenises ended by signal 9; memory may have run out\. Run again to go on.*prepare_processes"
        with pytest.raises(WorkerError, match=message):
            prepare(tmp_path / "out", corpus, tokenizer, processes=2)
    prepare(tmp_path / "whole", corpus, tokenizer, processes=1)
    prepare(tmp_path / "out", corpus, tokenizer, processes=2)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_process_that_cannot_start(tmp_path, corpus, tokenizer, started, monkeypatch, capfd):  # noqa: F811
    monkeypatch.setattr(text_workers, "_START", "raise SystemExit('no room here')")
    with pytest.raises(WorkerError, match="ended with status 1"):
        prepare(tmp_path / "out", corpus, tokenizer, processes=2)
    assert "no room here" in capfd.readouterr().err


def environment():
    """Of a script that imports this package, whatever folder it is run in, and that is asked nothing of the tokeniser."""
    own = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    return own | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)])}


def test_no_process_can_be_started(tmp_path, corpus, tokenizer, started, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    with pytest.raises(WorkerError, match=r"cannot start .*nowhere.*prepare_processes=1 does without any\. Run again"):
        prepare(tmp_path / "out", corpus, tokenizer, processes=2)
    started.clear()
    prepare(tmp_path / "out", corpus, tokenizer, processes=1)


@pytest.mark.parametrize("when", ["at rest", "at work"])
def test_processes_end_with_the_one_that_started_them(tmp_path, toy, when):  # noqa: F811
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import threading
        from slope_pl.data import load_bpe
        from slope_pl.data.text_workers import _Process, _send
        import pickle
        process = _Process(pickle.dumps((load_bpe({str(toy)!r}).packer("<u2"), 0.0)))
        process.ask(["the inn"])
        if {when!r} == "at work":
            _send(process.process.stdin, ["the inn in the thin air " * 400_000])
        print("works", flush=True)
        threading.Event().wait()
        """)
    )
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as parent:
        assert parent.stdout.readline() == "works\n"
        parent.kill()
        # Ends when nobody can write any more: the process has stderr from its parent.
        assert parent.communicate(timeout=60) == ("", "")


def test_a_script_without_a_guard_and_with_a_busy_tokenizer(tmp_path, corpus, toy):  # noqa: F811
    """Processes are neither forks, which the tokeniser's threads would hang or warn of, nor run the script again."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import threading
        from slope_pl.data import LocalText, load_bpe, prepare_shards, text_prepare, text_workers
        print("begins")
        bpe = load_bpe({str(toy)!r})
        bpe.encoder.encode_batch(["the inn"] * 1000)  # starts the tokeniser's threads
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        text_prepare._BATCH_DOCUMENTS, text_workers._ALONE_CHARACTERS = 4, 1
        from pathlib import Path
        source = LocalText({str(corpus)!r}, "\\0")
        prepare_shards(Path({str(tmp_path / "out")!r}), source, bpe, val_fraction=0.2, shard_tokens=500, processes=2)
        """)
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:subprocess", script],
        capture_output=True, text=True, timeout=120, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("begins") == 1
    assert "fork" not in done.stderr
    prepare(tmp_path / "whole", corpus, load_bpe(toy), processes=1)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_processes_import_neither_torch_nor_lightning():
    code = text_workers._START.replace("\nserve()", "\nprint(sorted({m.split('.')[0] for m in sys.modules}))")
    arguments = [code if part == text_workers._START else part for part in text_workers._Process.arguments()]
    found = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert "'tokenizers'" in found
    for heavy in ("torch", "lightning", "datasets", "transformers", "pandas"):
        assert f"'{heavy}'" not in found
