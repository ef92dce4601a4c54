"""The study of hybrid search: all of it at a tiny size."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from hyperopt.app.repro import preserved_global_state

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "hybrid"


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module."""
    pytest.importorskip("optuna")
    names = ("problems", "measure")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)  # other studies have scripts of the same names
    monkeypatch.syspath_prepend(str(FOLDER))
    with preserved_global_state():
        yield importlib.import_module("measure")
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_every_way_at_a_tiny_size(measure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text(
        "<!-- strengths -->\n<!-- end of strengths -->\n<!-- decays -->\n<!-- end of decays -->\n"
    )
    monkeypatch.setattr(sys, "argv", ["measure.py", "--small", "--seeds", "0", "--budget", "0.6", "--out", str(tmp_path)])
    measure.main()
    found = json.loads((tmp_path / "results.json").read_text())
    assert [*found] == [f"{name} | {way} | 0" for name in measure.PROBLEMS for way in measure.WAYS]
    for name in measure.PROBLEMS:
        first = [found[f"{name} | {way} | 0"]["curve"][0] for way in measure.WAYS]
        assert len({row["val/loss"] for row in first}) == 1  # every way tries the same start first
        for way in measure.WAYS:
            losses = [row["val/loss"] for row in found[f"{name} | {way} | 0"]["curve"]]
            assert losses == sorted(losses, reverse=True)
            assert f"| {way} | 1 |" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "curves.png").stat().st_size > 1000
    before = (tmp_path / "results.json").read_text()
    measure.main()  # what is there is not measured again
    assert (tmp_path / "results.json").read_text() == before
