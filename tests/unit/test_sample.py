import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from slope_pl.data import build_windows, load_wordpiece, read_squad
from tests.unit.test_squad_reading import SAMPLE


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_sample", SAMPLE / "make_sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("threads", ["1", "2"])
def test_check_makes_the_same_files(threads):
    command = [sys.executable, str(SAMPLE / "make_sample.py"), "--check"]
    result = subprocess.run(
        command, env=os.environ | {"RAYON_NUM_THREADS": threads}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    card = (SAMPLE / "README.md").read_text(encoding="utf-8")
    for line in result.stdout.splitlines():
        assert line.split()[0] in card, f"the card lacks the sum of {line}"


def test_check_sees_a_difference(maker, tmp_path, capsys):
    assert maker.main(["--out", str(tmp_path)]) == 0
    assert maker.main(["--out", str(tmp_path), "--check"]) == 0
    (tmp_path / "dev.json").write_text("{}")
    assert maker.main(["--out", str(tmp_path), "--check"]) == 1
    assert "differ from what seed 2024 gives: dev.json" in capsys.readouterr().err
    assert maker.main(["--out", str(tmp_path), "--check", "--seed", "7"]) == 1


def test_sample_is_what_its_card_says():
    splits = {split: read_squad(SAMPLE, split) for split in ("train", "dev")}
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 480, "dev": 120}
    contexts = {split: {e.context for e in examples} for split, examples in splits.items()}
    assert {split: len(found) for split, found in contexts.items()} == {"train": 113, "dev": 29}
    assert not contexts["train"] & contexts["dev"]
    assert len({e.id for examples in splits.values() for e in examples}) == 600
    assert sum(path.stat().st_size for path in SAMPLE.iterdir() if path.is_file()) < 600_000
    tokenizer = load_wordpiece(SAMPLE / "vocab.txt")
    assert tokenizer.get_vocab_size() == 2048
    unknown = tokenizer.token_to_id("[UNK]")
    for split, (count, long) in {"train": (578, 6), "dev": (138, 1)}.items():
        windows = build_windows(splits[split], tokenizer)
        assert len(windows) == count
        lengths = np.diff(windows.context_tokens.starts)
        assert (lengths > 384).sum() == long
        assert 40 <= np.median(lengths) <= 70
        assert unknown not in windows.context_tokens.flat
        assert any(not context.isascii() for context in contexts[split])
        assert any("\u0308" in context or "\u0301" in context for context in contexts[split])
        # Questions are not copied from the paragraph.
        assert not any(e.question[:-1] in e.context for e in splits[split])
