"""The table of traps cannot rot: this library is put to them again, and the page is what the recorded numbers make."""

import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "traps"


@pytest.fixture
def module(monkeypatch):
    """A module of the experiment, by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.cases(slow=0, among={"number": range(1, 17)})  # 17 starts two ranks, as core/test_distributed.py does
@pytest.mark.parametrize("number", range(1, 18))
def test_this_library_passes(module, number):
    protocol, ours = module("protocol"), module("ours_traps")
    (outcome,) = protocol.run(ours.Ours(), (number,))
    assert outcome.verdict == "pass", outcome
    recorded = json.loads((FOLDER / "results.json").read_text())["libraries"]["ours"]["outcomes"][number - 1]
    assert (recorded["trap"], recorded["verdict"]) == (number, outcome.verdict)


def test_a_verdict_is_not_always_pass(module):
    protocol, traps = module("protocol"), module("traps")
    first, fifth = traps.TRAPS[0], traps.TRAPS[4]
    wrong = {name: 2 * limit for name, limit in first.limits.items()}
    assert protocol.judge(first, protocol.Measured(wrong, "")).verdict == "fail"
    assert protocol.judge(first, protocol.Measured(wrong, "", "warned")).verdict == "pass"
    assert protocol.judge(first, protocol.Measured(dict.fromkeys(wrong, float("nan")), "")).verdict == "fail"
    firm = {name: 2 * limit for name, limit in fifth.limits.items()}
    assert protocol.judge(fifth, protocol.Measured(firm, "", "warned")).verdict == "fail"


def test_the_page_shows_the_results(module):
    run = module("run")
    text, found = (FOLDER / "README.md").read_text(), json.loads((FOLDER / "results.json").read_text())["libraries"]
    assert set(found) == set(run.LIBRARIES)
    for part in (run.table(found), run.criteria(), run.details(found)):
        assert part in text
    assert not any(x["verdict"] == "error" for library in found.values() for x in library["outcomes"])
