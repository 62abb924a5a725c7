"""Hundreds of bad inputs: each gives an error that names the value, the expectation and the fix, and leaves files alone."""

import pytest

from tests.faults.bad_inputs import files, layers, settings, surgery, text, training
from tests.faults.bad_inputs.case import contents, why_unclear
from tests.lightning.toy import QUIET

KINDS = {
    "settings": settings.CASES,
    "layers": layers.CASES,
    "surgery": surgery.CASES,
    "training": training.CASES,
    "text": text.CASES,
    "files": files.CASES,
}
CASES = [pytest.param(case, id=f"{kind}: {case.name}"[:120]) for kind, cases in KINDS.items() for case in cases]

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*GPU available but not used.*")]


@pytest.mark.parametrize("case", CASES)
def test_a_bad_input_is_named(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case.prepare(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(Exception) as raised:  # noqa: PT011 (of which kind, is what follows)
        case.call(tmp_path)
    assert why_unclear(raised.value) is None
    assert not [part for part in case.says if part not in str(raised.value)], repr(raised.value)
    assert contents(tmp_path) == before


def test_there_are_more_than_400_different_ones():
    names = {(kind, case.name) for kind, cases in KINDS.items() for case in cases}
    assert len(names) == len(CASES) > 400
