import json
import logging
import os
from pathlib import Path

import pytest

from recipes.bert_large.glue_sample import write_sample
from slope_pl.data import TASKS, DataUnavailableError, GlueFormatError, read_glue
from slope_pl.data.glue import find_glue_file


def real_glue():
    """The real tasks, or skip where there are none; a set variable without the folder is a failure."""
    root = os.environ.get("SLOPE_DATA_DIR")
    if not root:
        pytest.skip("SLOPE_DATA_DIR is not set: the real GLUE is not here")
    path = Path(root) / "glue"
    if not path.is_dir():
        pytest.fail(f"SLOPE_DATA_DIR is set, but {path} is not there")
    return path


def put(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


RTE = "index\tsentence1\tsentence2\tlabel\n"
GOOD = "0\tA cat sleeps.\tAn animal sleeps.\tentailment\n"

# The official header of each task, a row of its own and the example it gives.
OFFICIAL = {
    "cola": ("", 'gj04\t0\t*\tHe said "no.', ('He said "no.', None, 0)),
    "sst2": ("sentence\tlabel\n", "a fine film \t1", ("a fine film ", None, 1)),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n", '1\t7\t8\t" One .\tTwo .', ('" One .', "Two .", 1)),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n",
        "0\tg\tf\t2012\t1\tn\tn\tOne.\tTwo.\t4.750",
        ("One.", "Two.", 4.75),
    ),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n", "1\t2\t3\tWhy?\tHow?\t0", ("Why?", "How?", 0)),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n",
        "0\t1\t2\tg\t(\t(\t(\t(\tOne.\tTwo.\tneutral\tcontradiction",
        ("One.", "Two.", 2),
    ),
    "qnli": ("index\tquestion\tsentence\tlabel\n", "0\tWho?\tShe.\tnot_entailment", ("Who?", "She.", 1)),
    "rte": (RTE, "0\tOne.\tTwo.\tentailment", ("One.", "Two.", 0)),
    "wnli": (RTE, "0\tOne.\tTwo.\t1", ("One.", "Two.", 1)),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("inside", [True, False], ids=["root", "own folder"])
def test_official_layout(tmp_path, task, inside):
    header, row, expected = OFFICIAL[task]
    info = TASKS[task]
    for split in ("train", *info.dev):
        put(tmp_path, f"{info.folder}/{info.stems(split)[0]}.tsv", header + row + "\n")
        (example,) = read_glue(tmp_path if inside else tmp_path / info.folder, task, split)
        assert (example.first, example.second, example.label) == expected


HUB_ROWS = {
    "cola": ({"sentence": "One.", "label": 1, "idx": 0}, 1),
    "mrpc": ({"sentence1": "One.", "sentence2": "Two.", "label": 0}, 0),
    "stsb": ({"sentence1": "One.", "sentence2": "Two.", "label": 3.5}, 3.5),
    "qqp": ({"question1": "One?", "question2": "Two?", "label": 1}, 1),
    "mnli": ({"premise": "One.", "hypothesis": "Two.", "label": 2}, 2),
    "rte": ({"sentence1": "One.", "sentence2": "Two.", "label": "not_entailment"}, 1),
}


@pytest.mark.parametrize("task", HUB_ROWS)
def test_json_lines_and_lower_case_folder_and_validation(tmp_path, task):
    row, label = HUB_ROWS[task]
    stem = TASKS[task].hub_split(next(iter(TASKS[task].dev)))
    assert stem.startswith("validation")
    put(tmp_path, f"{task}/{stem}.jsonl", json.dumps(row) + "\n")
    (example,) = read_glue(tmp_path, task, next(iter(TASKS[task].dev)))
    assert (example.first[:3], example.label) == ("One", label)


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("mnli", ["entailment", "neutral", "contradiction"]),
        ("qnli", ["entailment", "not_entailment"]),
        ("rte", ["entailment", "not_entailment"]),
        ("wnli", ["not_entailment", "entailment"]),
        ("mrpc", ["not_equivalent", "equivalent"]),
    ],
)
def test_classes_are_numbered_as_on_the_hub(tmp_path, task, labels):
    texts = TASKS[task].texts[0]
    rows = [dict.fromkeys(texts, "A.") | {"label": label} for label in labels]
    put(tmp_path, "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [e.label for e in read_glue(tmp_path, task)] == list(range(len(labels)))


def test_tsv_with_the_hubs_columns_and_a_header_in_cola(tmp_path):
    put(tmp_path, "CoLA/train.tsv", "sentence\tlabel\tidx\nOne.\tacceptable\t0\n")
    assert [e.label for e in read_glue(tmp_path, "cola")] == [1]


def test_hub(monkeypatch):
    asked = []

    def load(name, task, split):
        asked.append((name, task, split))
        return [HUB_ROWS["mnli"][0]]

    monkeypatch.setattr("datasets.load_dataset", load)
    assert read_glue("nyu-mll/glue", "mnli", "mismatched")[0].label == 2
    assert asked == [("nyu-mll/glue", "mnli", "validation_mismatched")]


def test_a_script_on_the_hub_is_no_data_set(monkeypatch):
    def load(*args, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found glue.py")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(DataUnavailableError, match=r"cannot load data set 'my/.*found glue\.py"):
        read_glue("my/glue", "cola")


def test_unreachable_hub_says_what_to_do(monkeypatch):
    def load(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(DataUnavailableError, match=r"'nyu-mll/glue', cola.*no network.*give the folder of its tasks"):
        read_glue("nyu-mll/glue", "cola")


def test_quotes_line_separators_and_byte_order_marks_are_read_right(tmp_path):
    text = "\ufeff" + RTE.replace("\n", "\r\n") + '0\t"One\u2028more\ttwo"\tentailment\r\n1\t"\t""\tnot_entailment'
    put(tmp_path, "train.tsv", text)
    assert [(e.first, e.second, e.label) for e in read_glue(tmp_path, "rte")] == [
        ('"One\u2028more', 'two"', 0),
        ('"', '""', 1),
    ]


BAD = [
    ("rte", RTE.replace("sentence2\t", ""), r"no column of the text \('sentence1' and 'sentence2'\) of rte.*Rename"),
    ("rte", RTE.replace("label", "gold"), r"no column of the label \('label'\) of rte; it has: index, sentence1"),
    ("mrpc", RTE + GOOD, r"line 2: 'label' is 'entailment', expected not_equivalent, equivalent, or 0 to 1"),
    ("rte", RTE + GOOD + "\n" + GOOD, r"line 3: the line is empty, expected a row.*on_bad_row='skip'"),
    ("rte", RTE + GOOD + "1\tA\t \tentailment\n", r"line 3: 'sentence2' is ' ', expected text"),
    (
        "rte",
        RTE + GOOD + "1\tA\tB\tmaybe\n",
        r"line 3: 'label' is 'maybe', expected entailment, not_entailment, or 0 to 1",
    ),
    ("rte", RTE + "1\tA\tB\t2\n", r"line 2: 'label' is '2'"),
    ("rte", RTE + "1\tA\tB\t-1\n", r"line 2: 'label' is '-1'.*test set"),
    (
        "rte",
        RTE + "1\tA\tB\tC\tentailment\n",
        r"line 2: 5 fields, expected 4 \(index, sentence1, sentence2, label\): a tab",
    ),
    ("rte", "", "the file is empty"),
    ("rte", RTE, "no valid row"),
    ("rte", b"\xff\xfe", "not UTF-8 at byte 0"),
    ("stsb", "sentence1\tsentence2\tscore\nA\tB\t5.1\n", r"line 2: 'score' is '5.1', expected a number from 0 to 5"),
    ("stsb", "sentence1\tsentence2\tscore\nA\tB\tnan\n", r"line 2: 'score' is 'nan'"),
    ("cola", "sentence\tgood\nA\t1\n", r"line 1: 2 fields, expected 4 \(source, label, mark, sentence\)"),
    ("cola", "x\t2\t\tA sentence.\n", r"line 1: 'label' is '2', expected unacceptable, acceptable, or 0 to 1"),
]


@pytest.mark.parametrize(("task", "text", "message"), BAD)
def test_bad_tsv(tmp_path, task, text, message):
    put(tmp_path, "train.tsv", text)
    with pytest.raises(GlueFormatError, match=message) as error:
        read_glue(tmp_path, task)
    assert str(tmp_path / "train.tsv") in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"line 1: not JSON at column 2"),
        ("[1]", r"line 1: \[1\], expected a JSON object"),
        ('{"sentence": "A", "label": 1}\n{"label": 1}', r"line 2: no 'sentence' \(it has: label\)"),
        ('{"sentence": 3, "label": 1}', r"line 1: 'sentence' is 3, expected text"),
        ('{"sentence": "A", "label": null}', r"line 1: 'label' is None"),
        ('{"sentence": "A", "label": true}', r"line 1: 'label' is True"),
        ('{"text": "A", "label": 1}', r"line 1 has no column of the text"),
    ],
)
def test_bad_json(tmp_path, text, message):
    put(tmp_path, "train.jsonl", text)
    with pytest.raises(GlueFormatError, match=message):
        read_glue(tmp_path, "sst2")


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path, caplog):
    put(tmp_path, "train.tsv", RTE + GOOD + "\n" + "1\tA\tB\tmaybe\n" + GOOD)
    with caplog.at_level(logging.INFO):
        assert len(read_glue(tmp_path, "rte", on_bad_row="skip")) == 2
    assert "left out 2 bad rows of 4 (first: line 3: the line is empty" in caplog.text
    put(tmp_path, "train.tsv", RTE + "\n")
    with pytest.raises(GlueFormatError, match=r"no valid row \(1 bad ones, line 2"):
        read_glue(tmp_path, "rte", on_bad_row="skip")


def test_missing_and_ambiguous_places(tmp_path):
    with pytest.raises(DataUnavailableError, match=r"no folder .*nowhere.*RTE/train\.tsv"):
        read_glue(tmp_path / "nowhere", "rte")
    put(tmp_path, "RTE/dev.tsv", RTE + GOOD)
    with pytest.raises(DataUnavailableError, match=r"no train\.tsv or train\.jsonl of rte.*there is: dev\.tsv"):
        read_glue(tmp_path, "rte")
    put(tmp_path, "RTE/validation.jsonl", "{}")
    with pytest.raises(ValueError, match=r"holds dev\.tsv and validation\.jsonl, expected one"):
        read_glue(tmp_path, "rte", "dev")
    with pytest.raises(ValueError, match=r"the folder of rte, but the task is wnli"):
        find_glue_file(tmp_path / "RTE", "wnli", "dev")
    with pytest.raises(ValueError, match=r"source is the file"):
        find_glue_file(tmp_path / "RTE" / "dev.tsv", "rte", "dev")


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"task is 'squad', expected one of cola, sst2"):
        read_glue(tmp_path, "squad")
    with pytest.raises(ValueError, match=r"split is 'dev', expected 'train' or 'matched' or 'mismatched' for mnli"):
        read_glue(tmp_path, "mnli", "dev")
    with pytest.raises(ValueError, match=r"on_bad_row is 'drop'"):
        read_glue(tmp_path, "rte", on_bad_row="drop")


def test_made_up_sample_is_the_same_everywhere(tmp_path):
    a, b = write_sample(tmp_path / "a"), write_sample(tmp_path / "b")
    files = sorted(path.relative_to(a) for path in a.rglob("*.tsv"))
    assert len(files) == 9 * 2 + 1  # MNLI has two development sets
    assert all((a / f).read_bytes() == (b / f).read_bytes() for f in files)
    for task, info in TASKS.items():
        labels = {e.label for e in read_glue(a, task)}
        assert len(labels) == (info.num_labels if not info.regression else 6)


ROWS = {"cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408), "stsb": (5749, 1500), "rte": (2490, 277)}


@pytest.mark.parametrize("task", [*ROWS, "wnli"])
def test_real_data(task):
    counts = tuple(len(read_glue(real_glue(), task, split)) for split in ("train", "dev"))
    assert counts == ROWS.get(task, (635, 71))
