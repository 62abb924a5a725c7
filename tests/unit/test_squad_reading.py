import json
import logging
import os
from pathlib import Path

import pytest

from slope_pl.data import Answer, DataUnavailableError, SquadFormatError, read_squad

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
CONTEXT = "The Brune flows past Lowick. The Brune is cold."


def real_data(name):
    """Path below SLOPE_DATA_DIR, or skip where there is none; a folder that lacks the file is a failure."""
    root = os.environ.get("SLOPE_DATA_DIR")
    if not root:
        pytest.skip("SLOPE_DATA_DIR is not set: the real SQuAD is not here")
    path = Path(root) / name
    if not path.is_file():
        pytest.fail(f"SLOPE_DATA_DIR is set, but {path} is not there")
    return path


def question(**changes):
    qa = {"id": "q1", "question": "What is cold?", "answers": [{"text": "Brune", "answer_start": 4}]} | changes
    return {k: v for k, v in qa.items() if v is not None}


def squad(*qas, context=CONTEXT, **paragraph):
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(qas)}]}]}


@pytest.fixture
def write(tmp_path):
    def _write(content, name="train.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return _write


def test_reads_a_file_and_a_folder(write, tmp_path):
    write(squad(question()), "train-v1.1.json")
    for source in (tmp_path, str(tmp_path), tmp_path / "train-v1.1.json"):
        (example,) = read_squad(source, "train")
        assert (example.id, example.title, example.context, example.question) == ("q1", "t", CONTEXT, "What is cold?")
        assert example.answers == (Answer("Brune", 4),)


def test_byte_order_mark_is_no_part_of_the_data(write):
    path = write(b"\xef\xbb\xbf" + json.dumps(squad(question())).encode())
    assert len(read_squad(path, "train")) == 1


def answer(text, start):
    return question(answers=[{"text": text, "answer_start": start}])


BAD = {
    "empty": (b"", r"train\.json: the file is empty"),
    "blank": (b" \n", "the file is empty"),
    "malformed": (b'{"data": [\n {"x" 1}]}', r"not JSON at line 2, column 7: Expecting ':'"),
    "latin1": ('{"data": "é"}'.encode("latin-1"), "not UTF-8 at byte 10"),
    "list": ([1], r"the top level is list \[1\], expected an object with key 'data'"),
    "no data": ({"version": "1.1"}, r"the top level has no key 'data' \(its keys: 'version'\)"),
    "data no list": ({"data": {}}, r"data is dict \{\}, expected a list"),
    "article no object": ({"data": ["x"]}, r"data\[0\] is str 'x', expected an object"),
    "no paragraphs": ({"data": [{"title": "t"}]}, r"data\[0\] has no key 'paragraphs'"),
    "title": ({"data": [{"title": 3, "paragraphs": []}]}, r"data\[0\]\.title is int 3, expected a string"),
    "no context": ({"data": [{"paragraphs": [{"qas": []}]}]}, r"data\[0\]\.paragraphs\[0\] has no key 'context'"),
    "no question": (squad(question(question=None)), r"data\[0\]\.paragraphs\[0\]\.qas\[0\] has no key 'question'"),
    "id": (squad(question(id=7)), r"paragraphs\[0\]\.qas\[0\]\.id is int 7, expected a string"),
    "start": (squad(answer("Brune", "4")), r"answers\[0\]\.answer_start is str '4', expected an integer"),
    "start is bool": (squad(answer("Brune", True)), r"answer_start is bool True, expected an integer"),
    "no questions": ({"data": []}, r"no questions, expected one or more"),
    "no qas": (squad(), r"no questions"),
    "blank context": (squad(question(), context=" "), r"the context of data\[0\]\.paragraphs\[0\]\.qas\[0\] is ' '"),
    "blank question": (squad(question(question="")), r"qas\[0\]\.question is '', expected text"),
    "no answer": (squad(question(answers=[])), r"qas\[0\] \(id 'q1'\) has no answer.*SQuAD v2\.0.*not supported"),
    "blank answer": (squad(answer("", 3)), r"the answer '' is blank"),
    "shifted": (
        squad(answer("Brune", 5)),
        r"answers\[0\] \(id 'q1'\): answer 'Brune' expected at context\[5:10\], found 'rune ' there; it occurs at 4, 33",
    ),
    "elsewhere": (squad(answer("Esk", 4)), r"found 'Bru' there; it does not occur in the context"),
    "negative": (squad(answer("cold.", -5)), r"found '' there; it occurs at 42"),
    "id twice": (
        squad(question(), question(question="Which?")),
        r"qas\[1\]\.id is 'q1', which data\[0\]\.paragraphs\[0\]\.qas\[0\] has for another question \('What is cold\?'\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_with_the_place(write, case):
    content, message = BAD[case]
    with pytest.raises(SquadFormatError, match=message) as error:
        read_squad(write(content), "train")
    assert "train.json" in str(error.value)


def test_repeats_are_errors_in_dev_only(write):
    path = write(squad(question(), question(answers=[{"text": "Lowick", "answer_start": 21}])))
    assert [e.answers[0].text for e in read_squad(path, "train")] == ["Brune", "Lowick"]
    with pytest.raises(SquadFormatError, match="has for the same question"):
        read_squad(path, "dev")


def test_bad_answers_can_be_left_out_and_are_counted(write):
    good = {"text": "Brune", "answer_start": 4}
    bad = {"text": "Brune", "answer_start": 5}
    path = write(
        squad(
            question(id="a"), question(id="b", answers=[bad, good]), question(id="c", answers=[bad, bad]),
            question(id="d", answers=[]),
        )
    )  # fmt: skip
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    try:
        examples = read_squad(path, "train", on_bad_answer="skip")
    finally:
        logger.removeHandler(handler)
    assert [(e.id, e.answers) for e in examples] == [(i, (Answer("Brune", 4),)) for i in "ab"]
    (line,) = lines
    assert "left out 3 answers" in line
    assert "2 questions" in line
    assert line.endswith("first id is b")


def test_wrong_arguments_say_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match="split is 'validation', expected 'train' or 'dev'"):
        read_squad(SAMPLE, "validation")
    with pytest.raises(ValueError, match="on_bad_answer is 'ignore', expected 'raise' or 'skip'"):
        read_squad(SAMPLE, "train", "ignore")
    with pytest.raises(DataUnavailableError, match=r"no file or folder .*nothing\.json"):
        read_squad(tmp_path / "nothing.json", "train")
    with pytest.raises(DataUnavailableError, match=r"no dev\*\.json in .*it holds: nothing"):
        read_squad(tmp_path, "dev")


def test_several_files_of_a_split_are_named(write, tmp_path):
    write(squad(question()), "dev-v1.1.json")
    write(squad(question()), "dev.json")
    with pytest.raises(ValueError, match=r"dev-v1\.1\.json, dev\.json\. Say which one with dev_file"):
        read_squad(tmp_path, "dev")


def test_hub_rows(monkeypatch):
    rows = [
        {"id": f"q{i}", "title": "t", "context": "".join(CONTEXT), "question": f"What {i}?",
         "answers": {"text": ["Brune"], "answer_start": [4]}}
        for i in range(2)
    ]  # fmt: skip
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    first, second = read_squad("squad", "dev")
    assert asked == [("squad", "validation")]
    assert first.answers == (Answer("Brune", 4),)
    assert first.context is second.context
    rows[1]["answers"] = {"text": ["Brune"], "answer_start": [9]}
    with pytest.raises(SquadFormatError, match=r"hub data set 'squad', split 'validation': row 1\.answers\[0\]"):
        read_squad("squad", "dev")
    rows[1]["answers"] = {"text": ["Brune"], "answer_start": []}
    with pytest.raises(SquadFormatError, match=r"row 1\.answers has 1 texts and 0 answer_starts"):
        read_squad("squad", "dev")
    rows[1]["answers"] = {"text": [3], "answer_start": [4]}
    with pytest.raises(SquadFormatError, match=r"row 1\.answers\[0\].text is int 3, expected a string"):
        read_squad("squad", "dev")


def test_a_script_on_the_hub_is_no_data_set(monkeypatch):
    def load(*args, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found glue.py")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(DataUnavailableError, match=r"cannot load data set 'my/.*found glue\.py"):
        read_squad("my/squad", "dev")


def test_unreachable_hub_says_what_to_do(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("Couldn't reach 'squad' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataUnavailableError, match=r"(?s)'squad', split 'train'.*Couldn't reach.*give the folder"):
        read_squad("squad", "train")


def test_the_real_files():
    assert len(read_squad(real_data("squad/dev-v1.1.json"), "dev")) == 10_570
    assert len(read_squad(real_data("squad/train-v1.1.partial.json"), "train")) == 8_200
    assert len(read_squad(real_data("squad/adversarialqa-train.json"), "train")) == 30_000
