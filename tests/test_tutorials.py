"""The tutorials run as scripts, each in a folder of its own, and what they claim holds."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import pyplot

from hyperopt.app.repro import preserved_global_state

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "tutorials"
TUTORIALS = sorted(path.name for path in FOLDER.glob("*.py"))


def executed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *argv: str) -> dict[str, Any]:
    """What a tutorial has defined when it has run, called from ``folder`` with these arguments."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *argv])
    with preserved_global_state():
        return runpy.run_path(str(FOLDER / name), run_name="__main__")


CLAIMED = (  # what each of these tutorials asserts itself holds, at closed forms or finite differences where there are some
    "first_hypergradient",
    "your_own_loop",
    "deq_layer",
    "lasso",
    "wrong_labels",
    "certificates",
    "self_tuning_network",
    "sweep_and_report",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMED)
def test_what_a_tutorial_claims_holds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "assert " in (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    executed(f"{name}.py", tmp_path, monkeypatch)
    pyplot.close("all")
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.png"]


@pytest.mark.slow
def test_three_levels_have_the_gradient_of_finite_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = executed("three_levels.py", tmp_path, monkeypatch, "--out", str(tmp_path), "--steps", "3")
    ours, differences = found["ours"], found["differences"]
    assert ours.dtype == torch.float64 and differences.abs().min() > 1e-3  # there is something to compare
    assert torch.allclose(ours, differences, rtol=1e-5, atol=0.0)
    first, last = found["history"][0], found["history"][-1]
    assert last["third"] < first["third"] and last["unseen"] < first["unseen"]
    assert [path.name for path in tmp_path.iterdir()] == ["three_levels.png"]


@pytest.mark.manual
def test_an_architecture_mixture_lowers_its_validation_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = executed("architecture_mixture.py", tmp_path, monkeypatch)
    for losses, mixtures in found["found"].values():
        assert losses[-1] < 0.5 * losses[0]
        assert torch.allclose(mixtures.sum(-1), torch.ones(()), atol=1e-5) and (mixtures[-1] - mixtures[0]).abs().max() > 0.1
    exact = found["gradients"]["auto"]
    gradients = found["gradients"].items()
    cosines = {name: torch.cosine_similarity(each.flatten(), exact.flatten(), dim=0) for name, each in gradients}
    assert cosines["FiniteDifference"] > cosines["T1T2"] and cosines["FiniteDifference"] > 0.9
    assert list(tmp_path.iterdir()) == []  # a picture is drawn only when it is asked for


def test_every_tutorial_is_executed() -> None:
    assert {*(f"{name}.py" for name in CLAIMED), "architecture_mixture.py", "three_levels.py"} == set(TUTORIALS)


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_is_a_notebook_and_is_listed(name: str) -> None:
    """Cells in jupytext's percent format, a text first, and what to try next at the end."""
    cells = (FOLDER / name).read_text(encoding="utf-8").split("# %%")
    assert cells[0] == "" and cells[1].startswith(" [markdown]\n# # ")
    assert cells[-1].startswith(" [markdown]\n# ## What to try next")
    for cell in cells[1:]:
        lines = cell.splitlines()[1:]
        assert cell.startswith("\n") or all(line.startswith("#") for line in lines if line)
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"({name})" in page and f"({name.replace('.py', '.png')})" in page
    assert (FOLDER / name).with_suffix(".png").stat().st_size < 60_000
