"""The bundled stories: made again byte for byte, and what their card says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slope_pl.data import TextDataModule, load_bpe

FOLDER = Path(__file__).parents[2] / "data" / "text"


@pytest.mark.parametrize("threads", ["1", "2"])
def test_check_makes_the_same_files(threads):
    command = [sys.executable, str(FOLDER / "make_text.py"), "--check"]
    done = subprocess.run(command, env=os.environ | {"RAYON_NUM_THREADS": threads}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for line in done.stdout.splitlines():
        digest, name, size, _ = line.split()
        assert f"| {name} |" in card
        assert f"| {size} | `{digest}` |" in card, line


def test_check_sees_a_difference(tmp_path):
    command = [sys.executable, str(FOLDER / "make_text.py"), "--out", str(tmp_path)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    (tmp_path / "stories.txt").write_text("Once.")
    done = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "differ from what seed 2405 gives: stories.txt" in done.stderr


def test_stories_are_what_the_card_says(tmp_path):
    stories = (FOLDER / "stories.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n\n")
    assert len(stories) == len(set(stories)) == 600
    assert not any(re.search(r"[{}]|  |\ba a|\ba [aeiou]", story) for story in stories)
    tokenizer = load_bpe(FOLDER)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (1024, 0)
    data = TextDataModule(
        source=str(FOLDER / "stories.txt"),
        tokenizer=str(FOLDER / "tokenizer.json"),
        separator="\n\n",
        val_fraction=0.1,
        context=128,
        cache_dir=str(tmp_path),
    )
    data.prepare_data()
    data.setup()
    found = {name: (split.documents, split.tokens) for name, split in data.index.splits.items()}
    assert found == {"train": (541, 83_008), "val": (59, 8_654)}
