"""The distance of hidden states against its formula written out in Python floats."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from slope_pl import Distillation
from slope_pl.models import PreTrainingOutput, QuestionAnsweringOutput
from slope_pl.models.bert import BertModelStates
from slope_pl.models.bert_heads import PreTrainingStates
from tests.unit import bert_cases
from tests.unit.reference import gaussian
from tests.unit.test_distillation import INPUTS, Fixed


def states(count=4, shape=(2, 5, 6), seed=0):
    return [gaussian(*shape, seed=10 * seed + i) for i in range(count)]


def share(teacher, student):
    """Of the teacher's squares, how much is missed, in Python floats."""
    t, s = (tensor.double().flatten().tolist() for tensor in (teacher, student))
    return sum((x - y) ** 2 for x, y in zip(t, s, strict=True)) / sum(x**2 for x in t)


def missed(teacher, student, mask=None, pooled=None):
    """The share that is missed at the positions of the mask; mean over layers, and over the pair of pooled outputs."""
    terms = []
    for a, b in zip(teacher[1:], student[1:], strict=True):
        kept = torch.ones(a.shape[:2]).bool() if mask is None else mask.bool()
        terms.append(share(a[kept], b[kept]))
    terms += [] if pooled is None else [share(*pooled)]
    return sum(terms) / len(terms)


PADDED = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])


@pytest.mark.parametrize("mask", [None, PADDED, PADDED.bool()], ids=["none", "int", "bool"])
@pytest.mark.parametrize("weight", [0.25, 1.0])
@pytest.mark.parametrize(
    "wrap",
    [
        list,
        tuple,
        lambda given: SimpleNamespace(hidden_states=tuple(given)),
        lambda given: BertModelStates(given[-1], gaussian(2, 6), tuple(given)),  # a pooler, and a teacher without one
    ],
    ids=["list", "tuple", "namespace", "named tuple"],
)
def test_hidden_states(mask, weight, wrap):
    teacher, student = states(), states(seed=1)
    teacher[1] *= 7.0  # layers of another size count no more than others
    for state in student:
        state.requires_grad_()
    value = Distillation(Fixed(*teacher), "hidden_states", weight=weight)(
        torch.tensor(0.7), wrap(student), INPUTS, mask
    )
    assert value.item() == pytest.approx((1 - weight) * 0.7 + weight * missed(teacher, student, mask), rel=1e-5)
    value.backward()
    assert student[0].grad is None  # that of the embeddings is left out
    kept = torch.ones(2, 5, 1) if mask is None else mask[..., None].float()
    for a, b in zip(teacher[1:], student[1:], strict=True):
        expected = weight / 3 * 2 * kept * (b.detach() - a) / (kept * a**2).sum()
        torch.testing.assert_close(b.grad, expected)


@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda given, pooled: SimpleNamespace(hidden_states=given, pooler_output=pooled),
        lambda given, pooled: BertModelStates(given[-1], pooled, given),
        lambda given, pooled: PreTrainingStates(gaussian(2, 0, 9), gaussian(2, 2), given, pooled),
    ],
    ids=["namespace", "encoder", "pretraining"],
)
def test_what_both_poolers_give_is_one_more_layer(mask, wrap):
    """Of which all counts: it has no positions, and so no padding."""
    teacher, student = tuple(states()), tuple(states(seed=1))
    pooled = gaussian(2, 6, seed=40), gaussian(2, 6, seed=41)
    for tensor in (*student, pooled[1]):
        tensor.requires_grad_()
    loss = Distillation(Fixed(), "hidden_states")
    theirs = SimpleNamespace(hidden_states=teacher, pooler_output=pooled[0])
    value = loss.distance(wrap(student, pooled[1]), theirs, mask)
    assert value.item() == pytest.approx(missed(teacher, student, mask, pooled), rel=1e-5)
    value.backward()
    a, b = pooled[0], pooled[1].detach()
    torch.testing.assert_close(pooled[1].grad, 2 * (b - a) / a.square().sum() / 4)
    kept = torch.ones(2, 5, 1) if mask is None else mask[..., None].float()
    for a, b in zip(teacher[1:], student[1:], strict=True):
        torch.testing.assert_close(b.grad, 2 * kept * (b.detach() - a) / (kept * a**2).sum() / 4)
    # Half precision: of the pooler too, the squares are float32's.
    low = [300 * tensor.detach().half() for tensor in pooled]
    value = loss.distance(wrap(student, low[1]), SimpleNamespace(hidden_states=teacher, pooler_output=low[0]), mask)
    assert value.item() == pytest.approx(missed(teacher, student, mask, low), rel=1e-5)


def test_a_pooler_that_only_one_of_them_has_does_not_count():
    teacher, student = tuple(states()), tuple(states(seed=1))
    loss = Distillation(Fixed(), "hidden_states")
    expected = loss.distance(student, teacher)
    pooled = gaussian(2, 6, seed=40)

    def given(found, *pooler):
        return SimpleNamespace(hidden_states=found, **dict(zip(["pooler_output"], pooler, strict=False)))

    for mine, theirs in (((pooled,), (None,)), ((None,), (pooled,)), ((), (pooled,)), ((pooled,), ()), ((None,), ())):
        assert loss.distance(given(student, *mine), given(teacher, *theirs)) == expected
    assert loss.distance(student, given(teacher, pooled)) == expected
    assert loss.distance(given(student, 2 * pooled), given(teacher, pooled)) != expected


def test_the_state_of_the_embeddings_does_not_count():
    teacher, student = states(), states(seed=1)
    loss = Distillation(Fixed(), "hidden_states", weight=1.0)
    value = loss.distance(student, teacher)
    assert loss.distance([torch.full((2, 5, 6), math.inf), *student[1:]], teacher) == value
    assert loss.distance([torch.zeros(1), *student[1:]], [torch.zeros(2), *teacher[1:]]) == value
    assert loss.distance([*student[:3], 2 * student[3]], teacher) != value


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_whatever_stands_in_padding_counts_nothing(junk):
    teacher, student = states(), states(seed=1)
    expected = missed(teacher, student, PADDED)
    for state in (*teacher, *student):
        state[PADDED == 0] = junk
    for state in student[1:]:
        state.requires_grad_()
    value = Distillation(Fixed(), "hidden_states").distance(student, teacher, PADDED)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    for state in student[1:]:
        assert not state.grad[PADDED == 0].any()
        assert torch.isfinite(state.grad).all()
        assert state.grad[PADDED == 1].all()


def test_hidden_states_that_are_the_teachers_or_are_padding_alone():
    student = [state.requires_grad_() for state in states()]
    loss = Distillation(Fixed(), "hidden_states")
    same = loss.distance(student, [state.detach().clone() for state in student])
    empty = loss.distance(student, states(seed=1), torch.zeros(2, 5, dtype=torch.int64))
    (same + empty).backward()
    assert same.item() == empty.item() == 0.0
    assert not any(state.grad.any() for state in student[1:])
    # A student of zeros misses all, whatever the size.
    assert loss.distance([torch.zeros(2, 5, 6)] * 4, [1e-3 * state for state in states()]).item() == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_hidden_states_are_compared_in_float32(dtype):
    teacher, student = (
        [300 * state.to(dtype) for state in states(seed=seed)] for seed in (0, 1)
    )  # squares: over 65,504
    value = Distillation(Fixed(), "hidden_states").distance(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(missed(teacher, student), rel=1e-5)


@pytest.mark.parametrize("pooler", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states_of_a_net_and_its_teacher(masked, pooler):
    """A model that differs from its teacher in the last layer alone misses something there alone, and in the pooler."""
    teacher = bert_cases.build("base")
    net = copy.deepcopy(teacher)
    if not pooler:
        teacher.pooler = None
    inputs = bert_cases.batch() | {"output_hidden_states": True}
    loss = Distillation(teacher, "hidden_states", weight=1.0)
    mask = inputs["attention_mask"] if masked else None
    assert loss(torch.tensor(9.0), net(**inputs), inputs, mask).item() == 0.0
    with torch.no_grad():
        net.encoder.layer[2].output.LayerNorm.bias += 0.1
    output = net(**inputs)
    value = loss(torch.tensor(9.0), output, inputs, mask)
    kept = torch.ones(2, 16) if mask is None else mask
    theirs = teacher(**inputs)
    last = theirs.last_hidden_state[kept == 1]
    terms = [0.0, 0.0, 0.01 * last.numel() / last.square().sum().item()]
    terms += [share(theirs.pooler_output, output.pooler_output)] if pooler else []
    assert min(terms[2:]) > 1e-4
    assert value.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    value.backward()
    assert net.encoder.layer[0].intermediate.dense.weight.grad is not None
    assert (net.pooler.dense.weight.grad is not None) == pooler
    assert all(p.grad is None for p in teacher.parameters())


def test_a_pooler_that_differs_alone_is_what_a_pretraining_net_is_taught():
    net = bert_cases.build("pretraining")
    teacher = copy.deepcopy(net.bert)
    with torch.no_grad():
        net.bert.pooler.dense.bias += 0.3
    inputs = bert_cases.batch() | {"output_hidden_states": True}
    output = net(**inputs, masked_positions=torch.empty(2, 0, dtype=torch.int64))
    value = Distillation(teacher, "hidden_states", weight=1.0)(torch.tensor(9.0), output, inputs)
    expected = share(teacher(**inputs).pooler_output, output.pooler_output) / 4
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert expected > 1e-3
    value.backward()
    assert net.bert.pooler.dense.weight.grad.abs().max() > 0
    assert all(p.grad is None for name, p in net.cls.named_parameters() if name != "predictions.decoder.weight")


@pytest.mark.parametrize(
    ("student", "mask", "message"),
    [
        (states(3), None, "the student has 2 hidden states, the teacher 3; a teacher as deep is expected"),
        (states(5), None, "the student has 4 hidden states, the teacher 3"),
        (states(4, (2, 5, 8)), None, r"are \(2, 5, 8\), the teacher's \(2, 5, 6\); a teacher as wide is expected"),
        (states(4, (2, 3, 6)), None, r"are \(2, 3, 6\), the teacher's \(2, 5, 6\)"),
        (None, None, r"no hidden states of layers among the outputs.*output_hidden_states=True"),
        (SimpleNamespace(hidden_states=None), None, "no hidden states"),
        (gaussian(4, 5, 6), None, "no hidden states"),
        (SimpleNamespace(hidden_states=gaussian(4, 5, 6)), None, "no hidden states"),
        (
            QuestionAnsweringOutput(gaussian(2, 5, 6), gaussian(2, 5, 6)),
            None,
            r"no hidden states.*output_hidden_states",
        ),
        (PreTrainingOutput(gaussian(2, 5, 6), gaussian(2, 5, 6)), None, "no hidden states"),
        (states(1), None, "no hidden states of layers"),
        ([], None, "no hidden states"),
        (states(), torch.ones(2, 4), r"mask of shape \(2, 4\) with outputs \(2, 5, 6\) and task 'hidden_states'"),
        (states(), torch.ones(2, 5, 6), r"mask of shape \(2, 5, 6\)"),
        (states(), torch.ones(2, 1), r"mask of shape \(2, 1\)"),
    ],
)
def test_hidden_states_that_do_not_fit(student, mask, message):
    loss = Distillation(Fixed(*states()), "hidden_states")
    with pytest.raises(ValueError, match=message):
        loss(torch.tensor(0.0), student, INPUTS, mask)


def test_a_model_that_was_not_asked_for_its_hidden_states_is_named():
    net, inputs = bert_cases.build("pretraining"), bert_cases.batch()
    loss = Distillation(bert_cases.build("base"), "hidden_states")
    with pytest.raises(ValueError, match="ask the model for them"):
        loss(torch.tensor(0.0), net(**inputs), inputs)
    with pytest.raises(ValueError, match="ask the model for them"):  # the teacher's
        loss(torch.tensor(0.0), net(**inputs, output_hidden_states=True), inputs)


def test_a_model_without_hidden_states_is_no_sequence_of_them():
    """Its named tuple is one: start logits would pass for the embeddings', end logits for those of a layer."""
    net, inputs = bert_cases.build("qa"), bert_cases.batch()
    for teacher in (net, bert_cases.build("base")):
        with pytest.raises(ValueError, match="no hidden states of layers among the outputs"):
            Distillation(copy.deepcopy(teacher), "hidden_states")(torch.tensor(0.0), net(**inputs), inputs)
    with pytest.raises(ValueError, match="no hidden states of layers among the outputs"):
        Distillation(net, "hidden_states")(torch.tensor(0.0), states(2), inputs)
