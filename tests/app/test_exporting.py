"""Exports: what is read back predicts what the run measured, without its data, and no file runs code."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import composed
from omegaconf import OmegaConf
from sklearn.datasets import load_digits

from hyperopt import Picard, load_exported
from hyperopt.app.export import write
from hyperopt.app.export.command import main
from hyperopt.app.export.file import ExportError
from hyperopt.app.export.load import built_from
from hyperopt.app.export.write import export
from hyperopt.app.resolvers import register
from hyperopt.app.run import run
from hyperopt.data.splits import Rows
from hyperopt.tasks.scores import scores

ROOT = Path(__file__).resolve().parents[2]
COMMON = ["device=cpu", "precision=float64", "trainer.progress=false", "trainer.max_steps=2", "debug=none"]
ROWS = ["dataset.train=60", "dataset.val=30", "dataset.test=25"]
SYNTHETIC = ["dataset=synthetic", *ROWS, "dataset.features=5"]
TRAINED = ["inner.max_steps=5", "adjoint=unrolled", *ROWS]
CASES = {
    "equilibrium": ["task.state_size=6", *ROWS],
    "householder": ["task.state_size=6", "task/cell=householder", *ROWS],
    "implicit": ["task=implicit", "task.network.width=6", "task.batch_size=30", *ROWS],
    "l2, two classes": ["task=l2", "dataset.targets=classes", *SYNTHETIC, "adjoint=unrolled"],
    "l2, numbers": ["task=l2", "dataset.targets=numbers", *SYNTHETIC, "adjoint=unrolled"],
    "bias": ["task=bias_regularization", *TRAINED],
    "decay": ["task=weight_decay", "task.hidden=[6]", "task.batch_size=30", *TRAINED],
    "distillation": ["task=data_distillation", *TRAINED],
    "cleaning": ["task=data_cleaning", *TRAINED],
    "stn": ["experiment=stn_mnist_mlp", "dataset=digits", *ROWS, "task.batch_size=20", "task.val_batch_size=20"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``runs(*overrides)``: the directory of a run of two steps, made once."""
    register()
    made: dict[tuple[str, ...], Path] = {}

    def make(*overrides: str) -> Path:
        if overrides not in made:
            made[overrides] = tmp_path_factory.mktemp("run")
            run(composed(*overrides, *COMMON), made[overrides])
        return made[overrides]

    return make


@pytest.mark.cases(quick=1, slow=4, among={"name": [name for name in CASES if name not in ("householder", "implicit")]})
@pytest.mark.parametrize("name", CASES)
def test_what_is_read_back_has_the_metrics_of_the_run(name: str, runs: Any) -> None:
    folder = runs(*CASES[name])
    file, card = export(folder, checkpoint="last")
    state, threads = torch.get_rng_state(), torch.get_default_dtype()
    found = load_exported(file)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() == threads
    task: Any = built_from(OmegaConf.load(folder / "config.yaml"), []).task
    rows: dict[str, Rows] = {"test": task.dataset.load(torch.float64).test}
    expected = {key: value for key, value in found.card["metrics"].items() if key in ("test/loss", "test/accuracy")}
    assert scores(rows, found.module) == pytest.approx(expected, rel=1e-12) and expected
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert expected == pytest.approx({key: last[key] for key in expected}, rel=1e-12)
    assert all(value.isfinite().all() for value in found.hyperparameters.values()) and found.hyperparameters
    assert f"# {found.card['name']}\n" in card.read_text() and not found.module.training


@pytest.mark.slow
def test_a_layer_of_several_states(runs: Any) -> None:
    folder = runs("task=coupled", "task.rows=7")
    found = load_exported(export(folder)[0])
    x, y = found.predict(found.prepare(torch.zeros(3, found.card["input"]["shape"][0])))
    assert x.shape[0] == y.shape[0] == 3 and y.dim() == 3


@pytest.mark.parametrize(
    ("name", "outputs"), [("stn_quadratic", "x_range"), pytest.param("stn_ridge", "decay", marks=pytest.mark.slow)]
)
def test_a_self_tuned_network_is_plain(name: str, outputs: str, runs: Any) -> None:
    folder = runs(f"experiment={name}")
    found = load_exported(export(folder)[0])
    assert list(found.hyperparameters) == [outputs]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert float(found.hyperparameters[outputs]) == pytest.approx(last[f"hyper/{outputs}"], rel=1e-12)
    if name == "stn_quadratic":
        grid = torch.linspace(-2, 2, 100, dtype=torch.float64)[:, None]
        assert float((found.predict(grid) - grid**2).abs().max()) == pytest.approx(
            found.card["metrics"]["val/distance"], rel=1e-12
        )


@pytest.mark.slow
def test_tuned_dropout_comes_along(runs: Any) -> None:
    found = load_exported(export(runs(*CASES["stn"]))[0])
    rates = {name: module.p for name, module in found.module.named_modules() if isinstance(module, torch.nn.Dropout)}
    tuned = {name: float(value) for name, value in found.hyperparameters.items() if name.startswith("dropout")}
    assert rates and {name.removeprefix("network."): rate for name, rate in rates.items()} == tuned
    found.module.train()(torch.zeros(2, 64, dtype=torch.float64))  # it may be trained on, too


def test_raw_inputs_are_prepared_as_the_dataset_does(runs: Any) -> None:
    found = load_exported(export(runs(*CASES["equilibrium"]))[0])
    task: Any = built_from(OmegaConf.create(found.card["config"]), []).task
    digits: Any = load_digits()
    rows, images = task.dataset.load(torch.float64).test, digits["images"]
    assert torch.equal(found.prepare(images[rows.index]), rows.x)
    assert torch.equal(found.prepare(images[rows.index].reshape(-1, 64)), rows.x)
    assert torch.equal(found.predict(rows.x), found.module(rows.x).argmax(1))
    with pytest.raises(ExportError, match=r"shape \(5, 3\), but the model takes \(n, 1, 8, 8\)"):
        found.prepare(torch.zeros(5, 3))


def test_standardised_inputs(runs: Any) -> None:
    found = load_exported(export(runs("task=l2", "dataset=diabetes", "adjoint=unrolled", "inner.max_steps=2"))[0])
    from sklearn.datasets import load_diabetes

    raw: Any = load_diabetes()
    task: Any = built_from(OmegaConf.create(found.card["config"]), []).task
    rows = task.dataset.load(torch.float64).test
    torch.testing.assert_close(found.prepare(raw["data"])[rows.index], rows.x, rtol=1e-12, atol=1e-12)


def test_the_card_says_where_it_comes_from(runs: Any) -> None:
    folder = runs(*CASES["equilibrium"])
    card = load_exported(export(folder)[0]).card
    facts = json.loads((folder / "run.json").read_text())
    assert card["dataset"]["checksums"] == facts["task"]["checksums"] and card["versions"]["torch"] == facts["versions"]["torch"]
    assert card["config"] == (folder / "config.yaml").read_text() and card["certificate"]["hypergrad/is_bound"] == 1.0
    text = (folder / "export" / "MODEL_CARD.md").read_text()
    assert "a bound" in text and f"test/accuracy: `{card['metrics']['test/accuracy']:.6g}`" in text


@pytest.mark.slow
def test_safetensors(runs: Any, tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch", reason="pip install 'hyperopt-bilevel[export]'")
    folder = runs(*CASES["decay"])
    one, other = load_exported(export(folder)[0]), load_exported(export(folder, tmp_path, form="safetensors")[0])
    assert {**one.card, "exported": ""} == {**other.card, "exported": ""}
    assert all(torch.equal(value, other.module.state_dict()[name]) for name, value in one.module.state_dict().items())
    held = library.load_file(tmp_path / "model.safetensors")
    assert torch.equal(held["hyperparameters.decay.0.weight"], one.hyperparameters["decay.0.weight"])


@pytest.mark.slow
def test_a_program_runs_on_its_own(runs: Any, tmp_path: Path) -> None:
    folder = runs(*CASES["equilibrium"])
    with pytest.raises(ExportError, match=r"stops where the numbers say so, and a graph cannot; set --steps T"):
        export(folder, tmp_path, program=True)
    file, _, program = export(folder, tmp_path, program=True, steps=80)
    x = torch.rand(5, 64, dtype=torch.float64)
    loaded = torch.export.load(program)
    own: Any = load_exported(file).module
    torch.testing.assert_close(loaded.module()(x), own(x), rtol=0, atol=1e-4)  # solver.rtol=1e-5
    own.solver = Picard(0.0, 0.0, max_steps=80)
    torch.testing.assert_close(loaded.module()(x), own(x), rtol=1e-12, atol=1e-14)
    assert loaded.module()(x[:2]).shape == (2, 10)
    trained = export(runs(*CASES["decay"]), tmp_path, program=True)
    torch.testing.assert_close(torch.export.load(trained[2]).module()(x), load_exported(trained[0]).module(x))


@pytest.mark.slow
def test_what_is_no_graph_says_so(runs: Any) -> None:
    with pytest.raises(ExportError, match=r"network\.deq is an implicit layer"):
        export(runs(*CASES["implicit"]), program=True)
    with pytest.raises(ExportError, match="--steps=5 is for an equilibrium model, and this is a weight_decay"):
        export(runs(*CASES["decay"]), program=True, steps=5)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code ran",)


@pytest.mark.parametrize("how", ["zip", "bare"])
def test_a_hostile_pickle_is_not_run(how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt"
    if how == "zip":
        torch.save({"card": Evil(), "tensors": {}}, path)
    else:
        path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ExportError, match="not loaded, since that could run code" if how == "zip" else "is not an export"):
        load_exported(path)
    assert "code ran" not in capfd.readouterr().out


def test_a_config_cannot_name_what_is_built(runs: Any, tmp_path: Path) -> None:
    file, _ = export(runs(*CASES["equilibrium"]))
    content = torch.load(file, weights_only=True)
    card = json.loads(content["card"])
    config = OmegaConf.create(card["config"])
    OmegaConf.update(config, "task.cell._target_", "subprocess.Popen")
    OmegaConf.update(config, "allow_targets", ["subprocess"])
    changed = {"tensors": content["tensors"], "card": json.dumps({**card, "config": OmegaConf.to_yaml(config)})}
    torch.save(changed, tmp_path / "model.pt")
    with pytest.raises(ExportError, match=r"task\.cell\._target_='subprocess\.Popen' is outside hyperopt"):
        load_exported(tmp_path / "model.pt")


def test_files_that_are_none(runs: Any, tmp_path: Path) -> None:
    file, _ = export(runs(*CASES["equilibrium"]))
    with pytest.raises(ExportError, match="there is no file"):
        load_exported(tmp_path / "model.pt")
    (tmp_path / "cut.pt").write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ExportError, match="is not an export"):
        load_exported(tmp_path / "cut.pt")
    buffer = io.BytesIO()
    torch.save({"format": 2, "task": {}}, buffer)
    (tmp_path / "checkpoint.pt").write_bytes(buffer.getvalue())
    with pytest.raises(ExportError, match="is not an export"):
        load_exported(tmp_path / "checkpoint.pt")


def test_the_command_line(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def command(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hyperopt export", *argv])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        done = capfd.readouterr()
        return status, done.out, done.err

    folder = runs(*CASES["equilibrium"])
    status, out, _ = command(str(folder), "--out", str(tmp_path))
    assert status == 0 and out.splitlines() == [str(tmp_path / "model.pt"), str(tmp_path / "MODEL_CARD.md")]
    for argv, message in (
        ([str(tmp_path)], "holds no run"),
        ([str(folder), "--data", "elsewhere"], "has no root; drop --data"),
        ([str(folder), "--steps", "0"], "max_steps"),
    ):
        status, _, err = command(*argv)
        assert status == 1 and message in err and len(err.splitlines()) == 1, err


def test_help_and_import_are_free_of_torch() -> None:
    code = "import sys; from hyperopt.app.export import command; sys.argv = ['hyperopt export', '--help']\n"
    code += "try:\n    command.main()\nexcept SystemExit:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.rstrip().endswith("False") and "--program" in done.stdout


def test_a_task_without_a_predictor_says_so(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hyperopt.tasks.base import Task
    from hyperopt.tasks.equilibrium import EquilibriumTask

    monkeypatch.setattr(EquilibriumTask, "learned", Task.learned)
    with pytest.raises(write.REFUSALS, match=r"task=equilibrium has no learned\(\)"):
        export(runs(*CASES["equilibrium"]))
