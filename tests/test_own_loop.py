"""The study of a tuner beside an ordinary loop: its problem, its table, and all of it at a tiny size."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from hyperopt.app.repro import preserved_global_state

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "own_loop"
NAMES = ("problem", "measure", "libraries", "compare")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules, on made-up images: a bright square whose place is the label, and noise."""
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)  # other studies have scripts of the same names
    monkeypatch.syspath_prepend(str(FOLDER))
    with preserved_global_state():
        found = {name: importlib.import_module(name) for name in NAMES}
        for module in found.values():
            monkeypatch.setattr(module, "images", made_up, raising=False)
        yield found
    for name in NAMES:
        sys.modules.pop(name, None)


def made_up(sizes: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def part(rows: int) -> TensorDataset:
        y = torch.randint(10, (rows,), generator=generator)
        x = 0.5 * torch.rand(rows, 1, 28, 28, generator=generator)
        for image, label in zip(x, y.tolist(), strict=True):
            image[:, 4 * (label // 4) : 4 * (label // 4) + 8, 6 * (label % 4) : 6 * (label % 4) + 8] += 1
        return TensorDataset(x, y)

    return sys.modules["problem"].Rows(part(sizes.train), part(sizes.val), part(sizes.test or 50))


def lam(study: dict[str, ModuleType], **changed: float) -> dict[str, torch.Tensor]:
    values = {name: torch.tensor(value) for name, value in {**study["problem"].DEFAULTS, **changed}.items()}
    return values | {"decay": values["decay"].expand(study["problem"].LAYERS)}


def test_an_image_moves_by_whole_and_by_half_pixels(study: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.zeros(2, 1, 28, 28, dtype=torch.float64)
    image[:, 0, 10, 10] = 1.0
    monkeypatch.setattr(
        torch, "randn", lambda *size, **kwargs: torch.tensor([[1.0, 0.5], [-2.0, 0.0]], dtype=torch.float64).view(size)
    )
    found = study["problem"].moved(image, torch.tensor(1.0, dtype=torch.float64))
    assert found[0, 0, 9, 12] == 1 and found[0].sum() == 1  # up by 1, left by -2
    assert found[1, 0, 10, 10] == 0.5 and found[1, 0, 9, 10] == 0.5 and found[1].sum() == 1
    there = study["problem"].moved(image, torch.tensor(0.0, dtype=torch.float64))
    assert torch.equal(there, image)


def test_the_smoothed_loss_is_that_of_torch(study: dict[str, ModuleType]) -> None:
    logits, y = torch.randn(6, 10, dtype=torch.float64), torch.arange(6)
    for smoothing in (0.0, 0.1, 0.7):
        ours = study["problem"].smoothed(logits, y, torch.tensor(smoothing, dtype=torch.float64))
        assert torch.allclose(ours, cross_entropy(logits, y, label_smoothing=smoothing), rtol=1e-12)


def test_the_training_loss_is_differentiable_in_every_hyperparameter(study: dict[str, ModuleType]) -> None:
    """By a central difference at the same random numbers."""
    problem = study["problem"]
    rows = made_up(problem.Sizes(train=12, val=2, test=2), 0).train[:12]
    batch = rows[0].double(), rows[1]
    torch.manual_seed(0)
    model = problem.network(problem.Sizes(channels=2, hidden=4)).double()
    values = {
        name: value.double().clone().requires_grad_() for name, value in lam(study, shift=0.7, noise=0.2, smoothing=0.1).items()
    }

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        return problem.train_loss(model, batch, values)

    found = torch.autograd.grad(loss(), list(values.values()))
    for (name, value), gradient in zip(values.items(), found, strict=True):
        for place in range(value.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    value.view(-1)[place] += sign * 1e-6
                    ends.append(float(loss()))
                    value.view(-1)[place] -= sign * 1e-6
            difference = (ends[0] - ends[1]) / 2e-6
            assert abs(difference) > 1e-4, name
            assert float(gradient.view(-1)[place]) == pytest.approx(difference, rel=1e-5), name


def test_a_curve_keeps_the_best_weights_and_takes_the_last_point_in_time(study: dict[str, ModuleType]) -> None:
    measure = study["measure"]
    points = [{"cpu": cpu, "test/loss": loss} for cpu, loss in ((1.0, 3.0), (4.0, 2.0), (10.0, 1.0))]
    cell = {"curve": points}
    assert [measure.at(cell, share, "test/loss") for share in (0.05, 0.1, 0.3, 0.45, 1.0)] == [3.0, 3.0, 3.0, 2.0, 1.0]
    curve = measure.Curve(made_up(study["problem"].Sizes(train=2, val=20, test=20), 0), budget=1e9)
    good, bad = (study["problem"].network(study["problem"].Sizes(channels=1, hidden=2)) for _ in range(2))
    with torch.no_grad():
        bad[-1].weight.fill_(0.0)
        bad[-1].bias.copy_(torch.arange(10.0))
        good[-1].weight.fill_(0.0)
        good[-1].bias.fill_(0.0)
    assert curve.see(bad) > curve.see(good) == pytest.approx(math.log(10))
    curve.see(bad)
    curve.measure()
    (row,) = curve.rows
    assert row["val/loss"] == pytest.approx(math.log(10)) and row["test/loss"] == pytest.approx(math.log(10))


def test_lines_of_code_are_those_of_a_body_without_its_docstring(study: dict[str, ModuleType]) -> None:
    compare, libraries = study["compare"], study["libraries"]
    assert compare.lines(libraries.plain) == 7
    assert all(compare.lines(each) > compare.lines(libraries.plain) for each in libraries.LIBRARIES.values())


@pytest.mark.parametrize("file", ["results.json", "libraries.json"])
def test_the_page_shows_what_was_measured(study: dict[str, ModuleType], file: str, tmp_path: Path) -> None:
    """Its tables are those that the scripts write from the files of results."""
    page = tmp_path / "README.md"
    page.write_text(text := (FOLDER / "README.md").read_text(encoding="utf-8"))
    results = json.loads((FOLDER / file).read_text())
    (study["measure"] if file == "results.json" else study["compare"]).tabulate(results, page)
    assert page.read_text() == text


@pytest.mark.slow
def test_the_study_runs_and_tunes(study: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    measure = study["measure"]
    words = ["measure.py", "--small", "--seeds", "0", "--budget", "1.5", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    measure.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == [f"{way} | 0" for way in (*measure.SEARCHES, *measure.TUNERS)]
    start = measure.flat(measure.hyperparameters().read())
    for key, cell in results.items():
        losses = [row["val/loss"] for row in cell["curve"]]
        assert losses == sorted(losses, reverse=True) and cell["tries"] >= 1 and cell["curve"][-1]["cpu"] >= 1.5
        moved = cell["found"] != pytest.approx(start, rel=1e-5)
        assert moved if key.startswith("Tuner") else not (moved and key.startswith("defaults"))
    assert (tmp_path / "curves.png").stat().st_size > 1000
    measure.main()  # what is there is not measured again
    assert json.loads((tmp_path / "results.json").read_text()) == results


@pytest.mark.slow
def test_the_libraries_that_are_there_agree(study: dict[str, ModuleType]) -> None:
    """With as many products conjugate gradients reach the exact hypergradient, and the Neumann series are one another's."""
    compare = study["compare"]
    small = compare.Small(study["problem"].Sizes(12, 12, 2, 1, 2, 12))
    assert small.slope < 1e-7 and float(small.curvatures[0]) > 1e-3  # a strict minimum
    with compare.quiet():
        there = compare.installed(None)
        found = compare.errors(small, [(name, method) for name in there for method in ("neumann", "cg")], [30])
    errors = {way: row["30"] for way, row in found.items()}
    assert errors["ours, cg"] < 0.05 < errors["ours, neumann"] < 1
    for name in there:
        assert errors[f"{name}, neumann"] == pytest.approx(errors["ours, neumann"], rel=0.05)
