"""The model the harness sees, against transformers and the harness' own wrapper of it; and the command line."""

import json
import shutil
import sys

import pytest
import torch
import transformers
from lightning.pytorch import Trainer
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from recipes.gpt2 import zeroshot
from recipes.gpt2.module import GPT2Pretraining
from recipes.gpt2.pretrain import main as pretrain
from recipes.gpt2.zeroshot_harness import load_tasks, score
from recipes.gpt2.zeroshot_report import PUBLISHED, Score, collect, table
from recipes.gpt2.zeroshot_tasks import TASKS
from slope_pl import CheckpointError, ConfigError, SLoPeConfig, dense_state_dict, sparsify, wake_adapters
from slope_pl.data import TextDataModule, load_bpe
from slope_pl.evaluation import harness as module
from slope_pl.evaluation.harness import GPT2LM
from slope_pl.models import GPT2, GPT2Config, save_gpt2
from tests.recipes.test_zeroshot_tasks import CASES, mmlu_rows, write
from tests.unit.test_gpt2 import randomise
from tests.unit.test_squad_reading import real_data
from tests.unit.test_text_bpe import toy_vocabulary

LONG = "It was a day in the inn, and the man ate the thing that he had hidden in the tin. "


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A tokeniser's folder, in OpenAI's file names."""
    return toy_vocabulary(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A folder with a handmade file of every task; RACE has a context longer than the models below can see."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (rows, *_) in CASES.items():
        write(folder, name, [row | ({"context": LONG * 3} if name == "race" else {}) for row in rows])
    return write(folder, "mmlu", mmlu_rows())


def build(tokenizer, sparse, positions=64):
    torch.manual_seed(0)
    # More words than the tokeniser has, as in a vocabulary padded to a multiple of 64.
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size + 7,
        n_positions=positions,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
    )
    net = randomise(GPT2(config))
    if sparse:
        for layer in sparsify(net, SLoPeConfig(adapter_rank=4)).values():
            torch.nn.init.normal_(layer.adapter_up)
        wake_adapters(net)
    return net.eval()


def export(net, folder, tokenizer_folder):
    """A Hugging Face folder as people have it, with the tokeniser under transformers' file names."""
    save_gpt2(net, folder, dense_state_dict(net))
    for suffix, name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copyfile(next(tokenizer_folder.glob(f"*{suffix}")), folder / name)
    return folder


@torch.no_grad()
def plainly(folder, context, continuation):
    """Log-likelihood and greediness by transformers alone: one text at a time, no padding, no sharing."""
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    stripped = context.rstrip()
    head = words.encode(stripped) if context else [words.eos_token_id]
    both = words.encode(context + continuation) if context else head + words.encode(continuation)
    targets = both[len(head) :]
    read = both[-(model.config.n_positions + 1) :][:-1]
    logits = model(torch.tensor([read])).logits[0, -len(targets) :].log_softmax(-1)
    value = logits[range(len(targets)), targets].sum().item()
    return value, logits.argmax(-1).tolist() == targets


def requests(pairs):
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


PAIRS = [
    ("the inn", " in the tin"),
    ("the inn", " in"),
    ("the inn", " t"),
    ("the inn ", "in"),  # a space that belongs to the continuation
    ("", "the thing"),
    (LONG * 3, " in the inn"),
    ("a", " " + "the" * 20),
]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_loglikelihoods_are_those_of_transformers(sparse, toy, tmp_path):
    tokenizer = load_bpe(toy)
    net = build(tokenizer, sparse)
    folder = export(net, tmp_path, toy)
    expected = [plainly(folder, *pair) for pair in PAIRS]
    for size, fixed in ((1, False), (3, False), (3, True), (16, True), (16, False)):
        lm = GPT2LM(net, tokenizer, batch_size=size, progress=False)
        lm.fixed_shapes = fixed
        answers = lm.loglikelihood(requests(PAIRS), disable_tqdm=True)
        assert [best for _, best in answers] == [best for _, best in expected]
        values = torch.tensor([[value for value, _ in found] for found in (answers, expected)], dtype=torch.float64)
        torch.testing.assert_close(values[0], values[1], rtol=0, atol=2e-4)
    # Greedy is not False everywhere: the two likeliest tokens, and the same with another one at either place.
    start = tokenizer.encode_batch(["the inn"])[0]
    first, second = net.generate(torch.tensor([start]), 2, temperature=0)[0, len(start) :].tolist()
    ends = [[first, second], [first, (second + 1) % 99], [(first + 1) % 99, second], [first]]
    answers = lm._loglikelihood_tokens([(None, start, end) for end in ends])
    assert [best for _, best in answers] == [True, False, False, True]


def test_texts_are_tokenised_once_and_as_the_harness_does(toy, monkeypatch):
    lm = GPT2LM(build(load_bpe(toy), sparse=False), load_bpe(toy), progress=False)
    seen, own = [], []
    monkeypatch.setattr(
        lm, "_loglikelihood_tokens", lambda found, **_: seen.append(found) or [(0.0, False)] * len(found)
    )
    pairs = [*PAIRS, ("   ", "the"), ("the inn", " in"), ("the inn", " t")]
    TemplateLM.loglikelihood(lm, requests(pairs), disable_tqdm=True)
    encode = lm.bpe.encode_batch
    monkeypatch.setattr(type(lm.bpe), "encode_batch", lambda self, texts: own.extend(texts) or encode(texts))
    monkeypatch.setattr(module, "_TEXTS", 2)
    lm.loglikelihood(requests(pairs), disable_tqdm=True)
    assert seen[0] == seen[1]
    assert len(own) == len(set(own))
    assert set(own) == {text for a, b in pairs for text in (a.rstrip(), a + b)}
    assert not lm._encoded, "texts of a task are not kept for the next"


def test_a_whole_text_is_scored_token_by_token(toy):
    tokenizer = load_bpe(toy)
    net = build(tokenizer, sparse=False)
    lm = GPT2LM(net, tokenizer, progress=False)
    texts = ["the inn", LONG * 3, ""]
    found = lm.loglikelihood_rolling(requests([(text,) for text in texts]), disable_tqdm=True)
    for text, value in zip(texts, found, strict=True):
        tokens = [tokenizer.end_of_text, *tokenizer.encode_batch([text])[0]]
        total, done = 0.0, 0
        while done < len(tokens) - 1:
            # The harness' windows: full ones, the last one reaching back for all the context it can see.
            end = min(done + 64, len(tokens) - 1)
            window = torch.tensor([tokens[max(end - 64, 0) : end]])
            with torch.no_grad():
                logits = net(window)[0].log_softmax(-1)
            total += sum(logits[i - end, tokens[i + 1]].item() for i in range(done, end))
            done = end
        assert value == pytest.approx(total, abs=1e-3)
    assert found[2] == 0


def test_generation_stops_where_it_is_told(toy):
    tokenizer = load_bpe(toy)
    lm = GPT2LM(build(tokenizer, sparse=False), tokenizer, progress=False)
    prompt = torch.tensor([tokenizer.encode_batch(["the inn"])[0]])
    whole = tokenizer.decode(lm.model.generate(prompt, 40, temperature=0)[0, prompt.shape[1] :].tolist())
    stop = whole[len(whole) // 2 :][:3]
    jobs = [
        {"until": [stop], "max_gen_toks": 40},
        {"until": [], "max_gen_toks": 40},
        {"until": stop, "max_gen_toks": 3},
    ]
    answers = lm.generate_until(requests([("the inn", job) for job in jobs]), disable_tqdm=True)
    assert answers[:2] == [whole.split(stop)[0], whole]
    assert whole.startswith(answers[2])
    with pytest.raises(ConfigError, match="generation setting 'num_beams' is not known here"):
        lm.generate_until(requests([("a", {"num_beams": 2})]), disable_tqdm=True)


def test_what_cannot_be_scored_is_refused_at_once(toy):
    tokenizer = load_bpe(toy)
    lm = GPT2LM(build(tokenizer, sparse=False), tokenizer, progress=False)
    with pytest.raises(
        ConfigError, match=r"1 of 2 continuations are longer than the model's n_positions=64, the longest has"
    ):
        lm.loglikelihood(requests([("a", " b"), ("a", LONG * 2)]), disable_tqdm=True)
    small = GPT2(GPT2Config(vocab_size=tokenizer.vocab_size - 1, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(
        ConfigError, match=r"the tokenizer has 265 tokens, the model's vocabulary 264: they do not belong"
    ):
        GPT2LM(small, tokenizer)
    with pytest.raises(ConfigError, match="batch_size=0, expected at least 1"):
        GPT2LM(lm.model, tokenizer, batch_size=0)


# --- the harness' own wrapper of the export --------------------------------------------------------------------------


def compare_with_hflm(net, tokenizer_folder, folder, data, names, limit):
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(str(export(net, folder, tokenizer_folder)), device="cpu", dtype="float32", batch_size=4)
    ours = GPT2LM(net, load_bpe(tokenizer_folder), batch_size=4, progress=False)
    loaded = load_tasks(names, data, 0)
    both = []
    for lm in (ours, theirs):
        for task in loaded["tasks"].values():
            task._instances = None
        both.append(collect(score(lm, loaded, limit), names))
        both.append([instance.resps[-1] for task in loaded["tasks"].values() for instance in task.instances])
    assert len(both[0]) > len(names)
    for mine, other in zip(both[0], both[2], strict=True):
        assert (mine.task, mine.metric, mine.documents) == (other.task, other.metric, other.documents)
        assert mine.value == pytest.approx(other.value, rel=1e-5)
    assert [best for _, best in both[1]] == [best for _, best in both[3]]
    values = torch.tensor([[value for value, _ in both[i]] for i in (1, 3)], dtype=torch.float64)
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_the_export_scores_the_same(sparse, toy, local, tmp_path):
    compare_with_hflm(build(load_bpe(toy), sparse), toy, tmp_path, local, list(TASKS), None)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_the_export_scores_the_same_on_real_items(sparse, tmp_path):
    tokenizer = real_data("tokenizers/gpt2-encoder.json").parent
    data = real_data("zeroshot/lambada.jsonl.xz").parent
    names = ["arc_challenge", "openbookqa", "winogrande", "mathqa", "piqa", "race", "lambada"]
    net = build(load_bpe(tokenizer), sparse, positions=256)  # below the length of most RACE passages
    compare_with_hflm(net, tokenizer, tmp_path, data, names, 4)


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(toy, tmp_path_factory):
    """A checkpoint of the recipe, sparse with adapters awake, and its export."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("\0".join([LONG * 20] * 12))
    torch.manual_seed(0)
    module = GPT2Pretraining(
        learning_rate=0.01,
        gpt2=GPT2Config(vocab_size=320, n_positions=128, n_embd=32, n_layer=2, n_head=4),
        slope=SLoPeConfig(adapter_rank=4, adapter_start_step=2),
        sample_tokens=0,
    )
    data = TextDataModule(
        str(folder / "text"), str(toy), context=64, val_fraction=0, cache_dir=str(folder / "cache"), separator="\0"
    )
    trainer = Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "last.ckpt")
    module.export(folder / "export")
    return folder / "last.ckpt"


def test_checkpoint_and_export_from_the_command_line(checkpoint, toy, local, tmp_path, capsys):
    common = ["--data", str(local), "--device", "cpu", "--limit", "1"]
    output = tmp_path / "new" / "out.json"
    assert zeroshot.main(["--ckpt", str(checkpoint), *common, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert "2:4 sparse in 7 layers" in shown
    assert "published: GPT2-small, 400,000 steps of 512 x 1024 tokens of OpenWebText" in shown
    assert "--limit 1: NOT a score" in shown
    assert "Do not report this score for a model trained on it." in shown
    assert {entry["task"] for entry in found["scores"]} == set(TASKS)
    assert {entry["documents"] for entry in found["scores"]} == {1, 57}
    assert found["settings"]["limit"] == 1
    assert found["versions"]["lm_eval"]
    assert found["model"]["sparse_layers"] == 7
    # The export brings the tokeniser that the checkpoint names.
    other, export = tmp_path / "export.json", str(tmp_path / "hf")
    pretrain(["export", "--ckpt_path", str(checkpoint), "--folder", export])
    assert zeroshot.main(["--ckpt", export, *common, "--output", str(other)]) == 0
    for mine, theirs in zip(found["scores"], json.loads(other.read_text())["scores"], strict=True):
        assert mine | {"value": 0, "stderr": 0} == theirs | {"value": 0, "stderr": 0}
        assert mine["value"] == pytest.approx(theirs["value"], rel=1e-4)


def test_errors_from_the_command_line(checkpoint, local, tmp_path, capsys, monkeypatch):
    def fails(message, *arguments, ckpt=checkpoint):
        assert zeroshot.main(["--ckpt", str(ckpt), "--data", str(local), *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("zeroshot: ")

    fails("unknown task 'piqua', expected some of: mmlu arc_challenge openbookqa", "--tasks", "piqua")
    fails("task 'piqa' is named twice", "--tasks", "piqa", "race", "piqa")
    fails("limit=0, expected at least 1", "--limit", "0")
    fails("shots=-1, expected at least 0", "--shots", "-1")
    fails("no tokeniser /nowhere", "--tokenizer", "/nowhere")
    fails("has no file of the task 'piqa'", "--tasks", "piqa", "--data", str(tmp_path))
    fails("no file missing.ckpt (working directory: ", ckpt="missing.ckpt")
    fails("No such folder: ", ckpt="./missing")
    fails(" lacks config.json and weights", ckpt=tmp_path)
    fails(f"Give its folder: {checkpoint.parent / 'export'}", ckpt=checkpoint.parent / "export" / "model.safetensors")
    for content, message in (
        ({"state_dict": {"net.bert.pooler.weight": torch.ones(1)}}, "its tensors are net.bert.pooler.weight, ..."),
        ({"wte.weight": torch.ones(1)}, "cannot be read as a checkpoint. Expected a checkpoint of recipes.gpt2"),
        (torch.ones(1), "holds no state_dict"),
    ):
        torch.save(content, tmp_path / "other.ckpt")
        fails(message, ckpt=tmp_path / "other.ckpt")
    (tmp_path / "other.ckpt").write_bytes(b"PK")
    fails("cannot be read as a checkpoint", ckpt=tmp_path / "other.ckpt")
    if not torch.cuda.is_available():
        fails("--device cuda: torch sees no GPU here; use --device cpu", "--device", "cuda")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    fails("is not installed: pip install 'slope_pl[eval]'")


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        CheckpointError, match=r"is not a GPT-2 that can be scored: .*model_type='opt'.* Expected a checkpoint"
    ):
        zeroshot.load_model(str(tmp_path))


def test_help_documents_the_layout(capsys):
    with pytest.raises(SystemExit, match="0"):
        zeroshot.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in TASKS)
    assert "label`` counts from 0" in shown


def test_the_table():
    scores = [
        Score("piqa", "acc", 60.0, 1.1, 1838),
        Score("piqa", "acc_norm", 61.0, 1.1, 1838),
        Score("race", "acc", 30.0, None, 1045),
        Score("lambada", "perplexity", 40.05, 1.0, 5153),
    ]
    lines = [" ".join(line.split()) for line in table(scores).splitlines()]
    assert lines[2:6] == [
        "piqa acc 1,838 60.0 ± 1.1 50 | 59.8 57.4 57.5 57.6 54.8 54.5 55.2",
        "piqa acc_norm 1,838 61.0 ± 1.1 50",
        "race acc 1,045 30.0 25 | 28.4 27.1 27.1 27.2 24.0 24.2 24.2",
        "lambada perplexity 5,153 40.05 ± 1.00",
    ]
    untrained = table([Score("lambada", "perplexity", 1.5354e21, 7e23, 60)]).splitlines()[2]
    assert untrained.split() == ["lambada", "perplexity", "60", "1.54e+21", "±", "7e+23"]
    assert lines[6].startswith("mean of 2 acc 45.00 37.5 | 44.10 ")
    assert "--limit" not in table(scores)


def test_published_means():
    """Means over the eight tasks as slope-method.md gives them: a digit typed wrongly would show."""
    means = [sum(row.values()) / len(row) for row in PUBLISHED.values()]
    assert means == pytest.approx([31.11, 30.15, 30.24, 30.33, 28.68, 28.86, 28.99], abs=0.0051)
