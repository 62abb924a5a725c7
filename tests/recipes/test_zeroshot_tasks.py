"""The tasks: prompts from local files are those of the harness on the hub's layout; files that are wrong are refused."""

import json
import lzma
from unittest import mock

import datasets
import lm_eval.utils
import pytest
from lm_eval.api.model import LM

from recipes.gpt2 import zeroshot_harness
from recipes.gpt2.zeroshot_harness import load_tasks, score, task_manager
from recipes.gpt2.zeroshot_tasks import TASKS, TaskFileError
from slope_pl import ConfigError
from slope_pl.data import DataUnavailableError
from tests.unit.test_squad_reading import real_data

# One document of each task: rows of a local file, the same in the fields of the hub's data set, and what the model is to be
# asked, written out.
ARC = "Question: What melts?\nAnswer:"
CASES = {
    "arc_challenge": (
        [{"id": "a", "question": "What melts?", "choices": ["ice", "a rock", "air"], "label": 0}],
        {
            "id": "a",
            "question": "What melts?",
            "choices": {"text": ["ice", "a rock", "air"], "label": ["1", "2", "3"]},
            "answerKey": "1",
        },
        [(ARC, " ice"), (ARC, " a rock"), (ARC, " air")],
        0,
    ),
    "openbookqa": (
        [{"question": "Ice is", "choices": ["warm", "cold", "loud", "red"], "label": 1}],
        {
            "question_stem": "Ice is",
            "choices": {"text": ["warm", "cold", "loud", "red"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        },
        [("Ice is", " warm"), ("Ice is", " cold"), ("Ice is", " loud"), ("Ice is", " red")],
        1,
    ),
    "winogrande": (
        [{"sentence": "Ann beat Eve so _ was glad.", "options": ["Ann", "Eve"], "label": 0}],
        {"sentence": "Ann beat Eve so _ was glad.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        [("Ann beat Eve so Ann", " was glad."), ("Ann beat Eve so Eve", " was glad.")],
        0,
    ),
    "hellaswag": (
        [
            {
                "activity_label": "Baking",
                "ctx_a": "A man bakes. [title] Mix.",
                "ctx_b": "he",
                "endings": ["stirs [step] it.", "sings.", "runs.", "eats  flour."],
                "label": "3",
            }
        ],
        {
            "ind": 7,
            "activity_label": "Baking",
            "ctx_a": "A man bakes. [title] Mix.",
            "ctx_b": "he",
            "ctx": "A man bakes. [title] Mix. he",
            "endings": ["stirs [step] it.", "sings.", "runs.", "eats  flour."],
            "source_id": "x",
            "split": "val",
            "split_type": "indomain",
            "label": "3",
        },
        [
            ("Baking: A man bakes.. Mix. He", " stirs it."),
            ("Baking: A man bakes.. Mix. He", " sings."),
            ("Baking: A man bakes.. Mix. He", " runs."),
            ("Baking: A man bakes.. Mix. He", " eats flour."),
        ],
        3,
    ),
    "mathqa": (
        [{"question": "1 + 1 ?", "choices": ["1", "2 , 0", "3", "4", "none"], "label": 1}],
        {
            "Problem": "1 + 1 ?",
            "Rationale": "",
            "options": "a ) 1 , b ) 2 , 0 , c ) 3 , d ) 4 , e ) none",
            "correct": "b",
            "category": "general",
        },
        [("Question: 1 + 1 ?\nAnswer:", f" {choice}") for choice in ("1", "2", "3", "4", "none")],
        1,
    ),
    "piqa": (
        [{"question": "dry hands", "choices": ["use a towel", "use soup"], "label": 0}],
        {"goal": "dry hands", "sol1": "use a towel", "sol2": "use soup", "label": 0},
        [("Question: dry hands\nAnswer:", " use a towel"), ("Question: dry hands\nAnswer:", " use soup")],
        0,
    ),
    "race": (
        [
            {"passage_id": "p", "context": "Tom's dog ran.\nIt barked.", "label": label, **question}
            for label, question in (
                (1, {"question": "Who ran?", "choices": ["a cat", 'Tom\'s "dog"', "Tom", "all"]}),
                (0, {"question": "The dog  _  .", "choices": ["barked", "slept", "ate", "sang"]}),
                (2, {"question": "The story is  _  .", "choices": ["long", "sad", "short", "new"]}),
            )
        ],
        {
            "article": "Tom's dog ran.\nIt barked.",
            "problems": "[{'question': 'Who ran?', 'answer': 'B', 'options': ['a cat', 'Tom\\'s \"dog\"', 'Tom', 'all']}, "
            "{'question': 'The dog  _  .', 'answer': 'A', 'options': ['barked', 'slept', 'ate', 'sang']}, "
            "{'question': 'The story is  _  .', 'answer': 'C', 'options': ['long', 'sad', 'short', 'new']}]",
        },
        [
            (
                "Article: Tom's dog ran.\nIt barked.\n\nQuestion: Who ran?\nAnswer: Tom's \"dog\"\nThe dog barked\n"
                "The story is  _  .",
                f" {choice}",
            )
            for choice in ("long", "sad", "short", "new")
        ],
        2,
    ),
    "lambada": (
        [{"context": "He gave her the", "target": "key"}],
        {"text": "He gave her the key"},
        [("He gave her the", " key")],
        None,
    ),
}
MMLU_ROW = {"question": " 1 + 1 ? ", "choices": ["1", "2", "3", "4"], "label": 1}
MMLU_PROMPT = (
    "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    "1 + 1 ?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
)
SUBJECTS = sorted(
    entry.cfg["dataset_name"]
    for name, entry in task_manager().task_index.items()
    if name.startswith("mmlu_") and entry.yaml_path and entry.yaml_path.parent.parts[-2:] == ("mmlu", "default")
    if "dataset_name" in entry.cfg
)


def write(folder, name, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def mmlu_rows(split="test"):
    return [MMLU_ROW | {"subject": subject, "split": split} for subject in SUBJECTS]


def asked(loaded, name, shots=0):
    """What the model is asked about the first document, and the index of the right answer."""
    task = loaded["tasks"][name]
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(0)
    task.build_all_requests(limit=1)
    document = next(iter(task.eval_docs))
    target = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    return [instance.args for instance in task.instances], target


def test_the_cases_are_all_tasks():
    assert len(SUBJECTS) == 57
    assert set(CASES) | {"mmlu"} == set(TASKS)


@pytest.mark.parametrize("name", CASES)
def test_local_prompts_are_the_harness_own(name, tmp_path):
    rows, hub_row, expected, right = CASES[name]
    harness = TASKS[name].harness
    local, target = asked(load_tasks([name], write(tmp_path, name, rows), 0), harness)
    assert local == expected
    everything = datasets.Dataset.from_list([hub_row])
    hub_data = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), everything))
    with mock.patch.object(datasets, "load_dataset", return_value=hub_data):
        hub = load_tasks([name], None, 0)
    assert asked(hub, harness) == (local, target)
    assert hub["tasks"][harness].VERSION == load_tasks([name], tmp_path, 0)["tasks"][harness].VERSION
    if right is not None:
        assert target == right


def test_local_mmlu_is_the_harness_own(tmp_path):
    write(tmp_path, "mmlu", [*mmlu_rows("dev"), *mmlu_rows()])
    loaded = load_tasks(["mmlu"], tmp_path, 0)
    assert len(loaded["tasks"]) == 57
    assert {"mmlu", "mmlu_stem", "mmlu_other", "mmlu_humanities", "mmlu_social_sciences"} == loaded["groups"].keys()
    local = asked(loaded, "mmlu_abstract_algebra")
    assert local == ([(MMLU_PROMPT, f" {letter}") for letter in "ABCD"], 1)
    hub_row = {key: MMLU_ROW[key] for key in ("question", "choices")} | {"answer": 1, "subject": "abstract_algebra"}
    hub_data = datasets.DatasetDict(dict.fromkeys(("dev", "test"), datasets.Dataset.from_list([hub_row])))
    with mock.patch.object(datasets, "load_dataset", return_value=hub_data):
        hub = task_manager().load(["mmlu_abstract_algebra"])
    assert asked(hub, "mmlu_abstract_algebra") == local


def test_only_the_folders_of_our_tasks_are_read(monkeypatch):
    assert {task.harness for task in TASKS.values()} <= task_manager().task_index.keys()
    assert len(task_manager().task_index) < 200
    made = []
    monkeypatch.setattr(zeroshot_harness, "TaskManager", lambda **given: made.append(given))
    monkeypatch.setattr(zeroshot_harness, "_FOLDERS", ("arc", "nowhere"))
    task_manager.__wrapped__()
    assert made == [{}], "all of the harness, where a version of it keeps them elsewhere"


def test_the_templates_of_prompts_are_compiled_once(tmp_path, monkeypatch):
    rows = [CASES["piqa"][0][0] | {"question": question} for question in ("dry hands", "wet hands", "cold hands")]
    write(tmp_path, "piqa", rows)
    asked, compiled = [], []
    compile_one = lm_eval.utils.env.compile

    class Model(LM):
        def loglikelihood(self, requests):
            asked.extend(request.args for request in requests)
            return [(-len(request.args[1]), False) for request in requests]

        loglikelihood_rolling = generate_until = None

    monkeypatch.setattr(
        type(lm_eval.utils.env), "compile", lambda self, source: compiled.append(source) or compile_one(source)
    )
    loaded = load_tasks(["piqa"], tmp_path, 0)
    compiled.clear()
    score(Model(), loaded)
    assert [prompt for prompt, _ in asked[::2]] == [f"Question: {row['question']}\nAnswer:" for row in rows]
    assert compiled, "the harness asks for templates as we think it does"
    assert len(compiled) == len(set(compiled))


def test_shots_come_from_the_split_the_harness_takes_them_from(tmp_path):
    dev = [row | {"question": "2 + 2 ?", "label": 3} for row in mmlu_rows("dev")]
    write(tmp_path, "mmlu", [*dev, *mmlu_rows()])
    loaded = load_tasks(["mmlu"], tmp_path, 1)
    (prompt, _), *_ = asked(loaded, "mmlu_abstract_algebra", shots=1)[0]
    assert "\n\n2 + 2 ?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D\n\n1 + 1 ?\n" in prompt
    write(tmp_path, "piqa", CASES["piqa"][0])
    with pytest.raises(
        ConfigError, match=r"--shots 2: .* 3 examples of piqa from the split 'train', of which .* has 0 rows"
    ):
        load_tasks(["piqa"], tmp_path, 2)
    train = CASES["piqa"][0][0] | {"question": "wet hands", "split": "train"}
    write(tmp_path, "piqa", [*CASES["piqa"][0], train, train])
    (prompt, _), *_ = asked(load_tasks(["piqa"], tmp_path, 1), "piqa", shots=1)[0]
    assert prompt == "Question: wet hands\nAnswer: use a towel\n\nQuestion: dry hands\nAnswer:"


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("piqa", [1], "line 2: list, expected a JSON object"),
        (
            "piqa",
            {"question": "a", "choices": ["b", "c"]},
            "line 2: no 'label', expected question, choices, label; there",
        ),
        (
            "piqa",
            {"question": "a", "choices": ["b", "c"], "label": "0"},
            "line 2: label is '0', expected <class 'int'>",
        ),
        ("piqa", {"question": "a", "choices": ["b", "c"], "label": True}, "line 2: label is True"),
        ("piqa", {"question": "a", "choices": ["b", "c"], "label": 2}, "line 2: label is 2, expected 0 to 1"),
        ("piqa", {"question": "a", "choices": ["b", "c"], "label": -1}, "line 2: label is -1, expected 0 to 1"),
        ("piqa", {"question": "a", "choices": ["b", "c", "d"], "label": 0}, "line 2: 3 choices, expected 2"),
        (
            "piqa",
            {"question": "a", "choices": ["b", 3], "label": 0},
            r"line 2: the choices are \['b', 3\], expected texts",
        ),
        ("arc_challenge", {"question": "a", "choices": ["b"], "label": 0}, "line 2: 1 choices, expected 2 to 10"),
        ("winogrande", {"sentence": "a", "options": ["b", "c"], "label": 0}, "sentence is 'a', expected one '_' in it"),
        ("race", {"question": "a", "choices": list("abcd"), "label": 0, "context": "b"}, "line 2: no 'passage_id'"),
        ("hellaswag", CASES["hellaswag"][0][0] | {"label": ""}, "line 2: label is '', expected 0 to 3"),
        ("lambada", {"context": "a", "target": None}, "line 2: target is None, expected <class 'str'>"),
    ],
)
def test_rows_that_are_wrong_are_named(name, row, message, tmp_path):
    write(tmp_path, name, [CASES[name][0][0], row])
    with pytest.raises(TaskFileError, match=rf"{name}\.jsonl, {message}.*--help" if "line 2" in message else message):
        load_tasks([name], tmp_path, 0)


def test_files_that_are_wrong_are_named(tmp_path):
    path = tmp_path / "piqa.jsonl"
    good = json.dumps(CASES["piqa"][0][0]).encode()
    for content, message in (
        (good + b"\n{", r"piqa\.jsonl cannot be read after line 1: Expecting property name"),
        (b"\xff" + good, "cannot be read after line 0: 'utf-8' codec"),
        (b"", r"has no row of the split 'validation', which is scored \(splits: none\)"),
        (json.dumps(CASES["piqa"][0][0] | {"split": "dev"}).encode(), r"'validation', which is scored \(splits: dev\)"),
    ):
        path.write_bytes(content)
        with pytest.raises(TaskFileError, match=message):
            load_tasks(["piqa"], tmp_path, 0)
    path.unlink()
    (tmp_path / "piqa.jsonl.xz").write_bytes(lzma.compress(good * 50)[:-20])
    with pytest.raises(TaskFileError, match=r"piqa\.jsonl\.xz cannot be read after line 0"):
        load_tasks(["piqa"], tmp_path, 0)
    write(tmp_path, "mmlu", mmlu_rows()[1:])
    with pytest.raises(TaskFileError, match=r"no row with subject='abstract_algebra' and split='test'"):
        load_tasks(["mmlu"], tmp_path, 0)


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "race_high.jsonl").touch()
    message = (
        r"no file of the task 'hellaswag': expected hellaswag\.jsonl or hellaswag\.jsonl\.xz, it holds race_high\.jsonl"
    )
    with pytest.raises(DataUnavailableError, match=message):
        load_tasks(["race", "hellaswag"], tmp_path, 0)
    with pytest.raises(DataUnavailableError, match=r"no folder .*nowhere \(--data\): expected one with <task>\.jsonl"):
        load_tasks(["race"], tmp_path / "nowhere", 0)

    def unreachable(path, name, **options):
        raise ConnectionError("no route")

    with (
        mock.patch.object(datasets, "load_dataset", unreachable),
        pytest.raises(DataUnavailableError, match=r"did not deliver piqa \(ConnectionError: no route\).*--data FOLDER"),
    ):
        load_tasks(["piqa"], None, 0)


@pytest.mark.parametrize(
    ("name", "documents"),
    [
        ("mmlu", 14_042),
        ("arc_challenge", 1_172),
        ("openbookqa", 500),
        ("winogrande", 1_267),
        ("mathqa", 2_985),
        ("piqa", 1_838),
        ("race", 1_045),
        ("lambada", 5_153),
    ],
)
def test_real_files(name, documents):
    path = real_data(f"zeroshot/{'race_high' if name == 'race' else name}.jsonl.xz")
    loaded = load_tasks([name], path.parent, 0)
    assert sum(len(task.eval_docs) for task in loaded["tasks"].values()) == documents
    for task in loaded["tasks"].values():
        for document in task.eval_docs:
            choices = task.doc_to_choice(document) if task.config.doc_to_choice else [task.doc_to_target(document)]
            assert all(isinstance(choice, str) for choice in choices)
            right = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
            assert name == "lambada" or 0 <= right < len(choices)
