"""The distillation loss against its formula written out in Python floats; a teacher that nothing reaches."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slope_pl import CheckpointError, ConfigError, ConversionError, Distillation, SLoPeConfig, sparse_layers, sparsify
from slope_pl.lightning import frozen_copy, load_teacher
from tests.unit import bert_cases
from tests.unit.reference import gaussian


def softmax(logits, temperature):
    powers = [math.exp(x / temperature) for x in logits]
    return [p / sum(powers) for p in powers]


def divergence(teacher, student, temperature):
    """KL(teacher || student) of softened outputs, mean over rows, times the temperature squared."""
    rows = []
    for t, s in zip(teacher, student, strict=True):
        p, q = softmax(t, temperature), softmax(s, temperature)
        rows.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return temperature**2 * sum(rows) / len(rows)


class Fixed(nn.Module):
    """A teacher whose outputs are its parameters."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = nn.ParameterList([nn.Parameter(output) for output in outputs])

    def forward(self, x):
        assert not self.training
        assert not torch.is_grad_enabled()
        outputs = tuple(self.outputs)
        return outputs[0] if len(outputs) == 1 else outputs


INPUTS = (torch.zeros(1),)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("weight", [0.25, 1.0])
@pytest.mark.parametrize("wrapped", [False, True])
def test_classification(temperature, weight, wrapped):
    teacher, student = gaussian(5, 3), gaussian(5, 3, seed=1).requires_grad_()
    loss = Distillation(Fixed(teacher), "classification", temperature, weight)
    value = loss(torch.tensor(0.7), SimpleNamespace(logits=student) if wrapped else student, INPUTS)
    expected = (1 - weight) * 0.7 + weight * divergence(teacher.tolist(), student.tolist(), temperature)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    # d KL / d logits = (q - p) / T a row; times T^2 and 1 / rows.
    p, q = ((x.detach() / temperature).softmax(-1) for x in (teacher, student))
    torch.testing.assert_close(student.grad, weight * temperature * (q - p) / 5)


@pytest.mark.parametrize("pair", [lambda a, b: (a, b), lambda a, b: SimpleNamespace(start_logits=a, end_logits=b)])
def test_question_answering_without_padding(pair):
    outputs = [gaussian(2, 6, seed=seed) for seed in range(4)]
    loss = Distillation(Fixed(*outputs[:2]), "question_answering", temperature=2.0, weight=1.0)
    value = loss(torch.tensor(9.0), pair(*outputs[2:]), INPUTS)
    expected = [divergence(outputs[i].tolist(), outputs[i + 2].tolist(), 2.0) for i in (0, 1)]
    assert value.item() == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_question_answering_with_padding():
    """Padded positions are in neither softmax, whatever stands there; they get no gradient."""
    start, end, s, e = (gaussian(2, 6, seed=seed) for seed in range(4))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    for logits in (start, s):
        logits[mask == 0] = 50.0
    e[0, 5] = math.inf
    s.requires_grad_()
    loss = Distillation(Fixed(start, end), "question_answering", weight=1.0)
    value = loss(torch.tensor(0.0), (s, e), INPUTS, mask)
    expected = 0.0
    for teacher, student in ((start, s), (end, e)):
        for row, length in enumerate((4, 2)):
            expected += divergence([teacher[row, :length].tolist()], [student[row, :length].tolist()], 1.0) / 4
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    assert torch.isfinite(s.grad).all()
    assert not s.grad[mask == 0].any()
    assert s.grad[mask == 1].all()


def test_a_row_of_padding_alone_is_no_nan():
    start, end, s, e = (gaussian(2, 4, seed=seed) for seed in range(4))
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    s.requires_grad_()
    value = Distillation(Fixed(start, end), "question_answering", weight=1.0)(torch.tensor(0.0), (s, e), INPUTS, mask)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(s.grad).all()


def test_regression():
    teacher, student = gaussian(5, 1), gaussian(5, 1, seed=1)
    value = Distillation(Fixed(teacher), "regression", weight=0.25)(torch.tensor(2.0), student, INPUTS)
    mean = sum((a - b) ** 2 for a, b in zip(teacher.flatten().tolist(), student.flatten().tolist(), strict=True)) / 5
    assert value.item() == pytest.approx(0.75 * 2.0 + 0.25 * mean, rel=1e-5)


def test_a_student_that_equals_its_teacher_has_no_distance():
    logits = gaussian(4, 3).requires_grad_()
    loss = Distillation(Fixed(logits.detach().clone()), "classification", temperature=3.0, weight=1.0)
    value = loss(torch.tensor(5.0), logits, INPUTS)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits))


# ---------------------------------------------------------------------------------------------------- hidden states


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_compared_in_float32(dtype):
    teacher, student = gaussian(5, 3).to(dtype), gaussian(5, 3, seed=1).to(dtype)
    value = Distillation(Fixed(teacher), "classification", weight=1.0)(torch.tensor(0.0), student, INPUTS)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(divergence(teacher.tolist(), student.tolist(), 1.0), rel=1e-4)


# ---------------------------------------------------------------------------------------------------- the teacher


def test_nothing_reaches_the_teacher():
    net = bert_cases.build("classification")
    teacher = frozen_copy(net)
    before = copy.deepcopy(teacher.state_dict())
    sparsify(net, SLoPeConfig())
    net.train()
    loss = Distillation(teacher, "classification", temperature=2.0)
    batch = bert_cases.batch()
    logits = net(**batch).logits
    loss(F.cross_entropy(logits, torch.tensor([0, 2])), logits, batch).backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(layer.values.grad is not None for layer in sparse_layers(net).values())
    assert not any(part.training for part in teacher.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_a_copy_shares_nothing_with_the_model():
    net = bert_cases.build("qa").train()
    teacher = frozen_copy(net)
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert {p.data_ptr() for p in net.parameters()}.isdisjoint(p.data_ptr() for p in teacher.parameters())


def test_a_copy_of_a_sparse_model_is_an_error():
    net = bert_cases.build("qa")
    sparsify(net, SLoPeConfig())
    with pytest.raises(ConversionError, match="make the teacher's copy before sparsify"):
        frozen_copy(net)


def test_the_teacher_is_no_part_of_its_holder():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)
            self.distillation = Distillation(Fixed(gaussian(2, 2)), "classification")

    holder = Holder()
    assert set(holder.state_dict()) == {"net.weight", "net.bias"}
    assert len(list(holder.parameters())) == 2
    holder.train()
    assert not holder.distillation.teacher.training
    assert copy.deepcopy(holder).distillation is holder.distillation, "copies share one teacher"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_teacher_follows_the_students_dtype(dtype):
    teacher = nn.Linear(8, 3)
    loss = Distillation(teacher, "classification", weight=1.0)
    x = gaussian(2, 8, dtype=dtype)
    loss(torch.tensor(0.0), gaussian(2, 3, dtype=dtype), (x,))
    assert teacher.weight.dtype == dtype


def test_autocast_leaves_the_teacher_in_its_dtype():
    teacher = nn.Linear(8, 3)
    loss = Distillation(teacher, "classification", weight=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss(torch.tensor(0.0), gaussian(2, 3, dtype=torch.bfloat16), (gaussian(2, 8),))
    assert teacher.weight.dtype == torch.float32


def test_memory_of_the_teacher():
    assert Distillation(nn.Linear(8, 3), "classification").teacher_bytes() == 4 * (24 + 3)


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "ranking"}, "task='ranking' is unknown; choose one of classification"),
        ({"task": "classification", "temperature": 0.0}, "temperature=0.0: a number above 0"),
        ({"task": "classification", "temperature": math.inf}, "temperature=inf"),
        ({"task": "regression", "temperature": 2.0}, "no effect in regression"),
        ({"task": "hidden_states", "temperature": 2.0}, "no effect in hidden states"),
        ({"task": "classification", "weight": 0.0}, "weight=0.0: above 0 and at most 1"),
        ({"task": "classification", "weight": 1.5}, "weight=1.5"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        Distillation(nn.Linear(2, 2), **settings)


def test_outputs_that_do_not_fit():
    loss = Distillation(Fixed(gaussian(5, 3)), "classification")
    with pytest.raises(ValueError, match=r"student's outputs are \(5, 2\), the teacher's \(5, 3\)"):
        loss(torch.tensor(0.0), gaussian(5, 2), INPUTS)
    with pytest.raises(ValueError, match=r"mask of shape \(5, 3\).*question answering"):
        loss(torch.tensor(0.0), gaussian(5, 3), INPUTS, torch.ones(5, 3))
    questions = Distillation(Fixed(gaussian(5, 3), gaussian(5, 3)), "question_answering")
    with pytest.raises(ValueError, match=r"mask of shape \(3, 5\)"):
        questions(torch.tensor(0.0), (gaussian(5, 3), gaussian(5, 3)), INPUTS, torch.ones(3, 5))


def test_a_teacher_from_a_checkpoint(tmp_path):
    net, path = bert_cases.build("qa", seed=3), tmp_path / "teacher.ckpt"
    state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()} | {"other.weight": torch.zeros(1)}
    torch.save({"state_dict": state}, path)
    teacher = load_teacher(bert_cases.build("qa"), path)
    assert bert_cases.same_outputs(teacher, net, bert_cases.batch())
    assert not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(CheckpointError, match=r"not a dense checkpoint of this net under 'model\.'"):
        load_teacher(bert_cases.build("qa"), path, prefix="model.")
    with pytest.raises(CheckpointError, match="is not there"):
        load_teacher(net, tmp_path / "nowhere.ckpt")
