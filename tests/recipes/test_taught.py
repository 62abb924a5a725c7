"""The loss of fine-tuning with a teacher, its hidden states included, against the formula written out."""

import math

import pytest
import torch
import torch.nn.functional as F
import yaml

from recipes.bert_large.glue import main
from recipes.bert_large.glue_module import BertGlue
from recipes.bert_large.module import BertSquad
from recipes.bert_large.starts import TeacherConfig
from slope_pl import ConfigError
from slope_pl.models import BertConfig, BertForQuestionAnswering, BertForSequenceClassification
from tests.unit.bert_cases import MINI, batch, randomise

RATE = 1e-3


def dense(kind, config=MINI, seed=0):
    torch.manual_seed(seed)
    net = BertForQuestionAnswering(config) if kind == "squad" else BertForSequenceClassification(config, 2)
    return randomise(net).eval()


def checkpoint(folder, kind, net):
    settings = {"learning_rate": RATE, "bert": net.config.to_dict(), "encoder": None}
    settings |= {} if kind == "squad" else {"task": kind}
    state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    path = folder / "dense.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": settings, "pytorch-lightning_version": "2.6.4"}, path)
    return str(path)


def taught(folder, kind, logged=None, teacher=None, **settings):
    """A module whose teacher is loaded, and what it logs."""
    path = checkpoint(folder, kind, teacher if teacher is not None else dense(kind, seed=1))
    config = TeacherConfig(checkpoint=path, **settings)
    more = {} if kind == "squad" else {"task": kind}
    module = (BertSquad if kind == "squad" else BertGlue)(bert=MINI, learning_rate=RATE, teacher=config, **more)
    module.net = dense(kind)
    module.log = lambda name, value, **_: (logged if logged is not None else {}).update({name: float(value.detach())})
    module.load_teacher()
    return module


def padded():
    inputs = batch()
    inputs["attention_mask"][1, 9:] = 0
    return inputs


def labels(kind):
    if kind == "squad":
        return {"start_positions": torch.tensor([2, 3]), "end_positions": torch.tensor([4, 3])}
    return {"labels": torch.tensor([0, 1])}


def divergence(teacher, student):
    return sum(
        p * math.log(p / q)
        for p, q in zip(
            teacher.double().softmax(-1).flatten().tolist(),
            student.double().softmax(-1).flatten().tolist(),
            strict=True,
        )
        if p > 0
    ) / len(teacher)


def missed(teacher, student, mask):
    """Of the squares of the layers' states, at positions that are no padding."""
    kept = mask.bool()
    shares = [
        ((s - t)[kept].detach().double() ** 2).sum() / (t[kept].detach().double() ** 2).sum()
        for s, t in zip(student[1:], teacher[1:], strict=True)
    ]
    return float(sum(shares) / len(shares))


@pytest.mark.parametrize("hidden", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["rte", "squad"])
def test_the_parts_of_the_loss(tmp_path, kind, hidden):
    logged = {}
    module, inputs = taught(tmp_path, kind, logged, weight=0.4, hidden_weight=hidden), padded()
    loss = module.training_step({**inputs, **labels(kind)}, 0)
    mine, theirs = (net(**inputs, output_hidden_states=True) for net in (module.net, dense(kind, seed=1)))
    mask = inputs["attention_mask"]
    if kind == "squad":
        pairs = [(mine.start_logits, theirs.start_logits), (mine.end_logits, theirs.end_logits)]
        own = sum(F.cross_entropy(a, b) for (a, _), b in zip(pairs, labels(kind).values(), strict=True)) / 2
        pairs = [[x.masked_fill(mask == 0, -1e30) for x in pair] for pair in pairs]
        soft = sum(divergence(b, a) for a, b in pairs) / 2
    else:
        own, soft = F.cross_entropy(mine.logits, labels(kind)["labels"]), divergence(theirs.logits, mine.logits)
    share = missed(theirs.hidden_states, mine.hidden_states, mask)
    assert share > 0.01
    assert loss.item() == pytest.approx(0.6 * own.item() + 0.4 * soft + hidden * share, rel=1e-4)
    assert logged.get("train/imitation") == (pytest.approx(share, rel=1e-4) if hidden else None)
    loss.backward()
    # The last layer's output is a hidden state; so is that of the first, to which the labels alone would lead as well.
    assert all(p.grad is not None for name, p in module.net.named_parameters() if "pooler" not in name)


def test_without_hidden_states_none_are_kept(tmp_path, monkeypatch):
    module = taught(tmp_path, "rte")
    seen = []
    monkeypatch.setattr(module.net.bert, "forward", spy(module.net.bert.forward, seen))
    module.training_step({**padded(), **labels("rte")}, 0)
    assert not any(seen)


def spy(forward, seen):
    def call(*args, **kwargs):
        out = forward(*args, **kwargs)
        seen.append(hasattr(out, "hidden_states"))
        return out

    return call


@pytest.mark.parametrize("weight", [-1, math.inf, math.nan, True, "much"])
def test_weights_out_of_range(weight):
    with pytest.raises(ConfigError, match=r"model\.teacher\.hidden_weight=.*: a number of 0 or more is expected"):
        TeacherConfig(checkpoint="x", hidden_weight=weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers=1, the model 3"),
        ({"hidden_size": 48}, "hidden_size=48, the model 32"),
    ],
)
def test_a_teacher_of_another_shape_has_no_states_to_learn(tmp_path, change, message):
    other = dense("rte", BertConfig.from_dict(MINI.to_dict() | change))
    with pytest.raises(ConfigError, match=f"a teacher as deep and as wide as the model: .*{message}"):
        taught(tmp_path, "rte", teacher=other, hidden_weight=1)
    assert taught(tmp_path, "rte", teacher=other).distillation is not None, "its outputs alone can be learnt"


def test_it_may_be_given_before_the_checkpoint(capsys):
    """As an argument of a runner's sparse runs is."""
    arguments = [
        "fit",
        "--config",
        "recipes/bert_large/glue.yaml",
        "--data.task",
        "rte",
        "--model.teacher.hidden_weight",
        "1",
    ]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--model.teacher.checkpoint", "x.ckpt", "--print_config"])
    assert stop.value.code == 0
    teacher = yaml.safe_load(capsys.readouterr().out)["model"]["teacher"]
    assert teacher == {"checkpoint": "x.ckpt", "weight": 0.5, "temperature": 1.0, "hidden_weight": 1.0}
