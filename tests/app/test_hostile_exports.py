"""Exported files, runs to export and overrides from elsewhere: each ends as a one-line refusal, and nothing else happens."""

from __future__ import annotations

import json
import pickle
import random
import resource
import shutil
import socket
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from composing import composed
from hostile import Place, assert_refused
from launcher import Launcher

from hyperopt import load_exported
from hyperopt.app.export.command import main
from hyperopt.app.export.file import ExportError
from hyperopt.app.export.write import export
from hyperopt.app.resolvers import register
from hyperopt.app.run import run

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["device=cpu", "trainer.progress=false", "trainer.max_steps=1", "debug=none"]
SMALL += ["dataset.train=20", "dataset.val=10", "dataset.test=10"]
RUNS = {
    "equilibrium": ["task.state_size=3"],
    "network": ["task=weight_decay", "task.hidden=[3]", "inner.max_steps=1", "adjoint=unrolled"],
}
Config = dict[str, Any]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of exported runs of one step, by name."""
    register()
    made = {}
    for name, overrides in RUNS.items():
        made[name] = tmp_path_factory.mktemp(name)
        run(composed(*overrides, *SMALL), made[name])
        export(made[name])
    return made


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def load(path: Path, **more: Any) -> str:
    """Load an export, and return the refusal."""
    try:
        load_exported(path, **more)
    except ExportError as error:
        return str(error)
    return ""


def content_of(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], Config]:
    """Tensors, card and config of a run's export."""
    content = torch.load(folder / "export" / "model.pt", weights_only=True)
    card = json.loads(content["card"])
    return content["tensors"], card, yaml.safe_load(card["config"])


def put(config: Config, key: str, value: Any) -> None:
    """Set a value, whose key is joined by dots."""
    *way, last = key.split(".")
    for name in way:
        config = config[name]
    config[last] = value


def writes(place: Place) -> Config:
    """A node that names a function of ours which writes the mark."""
    return {"_target_": "hyperopt.app.files.write_text", "path": str(place.mark), "text": "x"}


def empties(place: Place) -> Config:
    """A node that names a class of ours which empties the canary."""
    return {"_target_": "hyperopt.app.files.AppendFile", "path": str(place.canary), "size": 0}


def overwrites(place: Place) -> Config:
    """A node that names a method of ours, and gives it its object."""
    return {"_target_": "hyperopt.app.files.AppendFile.write", "_args_": [empties(place), "x"]}


def allows(place: Place) -> Config:
    """A node that would load another export, and allow what that one may name."""
    return {"_target_": "hyperopt.app.export.load.load_exported", "path": "inner.pt", "allow_targets": ["os"]}


CELL = "hyperopt.nn.cells.ProjectedCell"
SYSTEM = "touch mark"


@dataclass(frozen=True)
class Named:
    """A row: what a config says at a key, and what the refusal says."""

    key: str
    value: Callable[[Place], Any]
    words: str


NO_OPTION = "is not the class of an option"
NAMED = {
    "empty a file by a class": Named("optimizer", empties, NO_OPTION),
    "write a file by a method": Named("trainer", overwrites, "_args_"),
    "load and allow": Named("trainer", allows, NO_OPTION),
    "write a file by a function": Named("dataset", writes, NO_OPTION),
    "a function as a solver": Named("task.solver", writes, NO_OPTION),
    "a function in a list": Named("task.fallback", lambda place: [writes(place)], NO_OPTION),
    "a function deep in plain values": Named("task.l2", lambda place: {"A": [{"x": writes(place)}]}, NO_OPTION),
    "a function in the tracker's place": Named("tracker", writes, "tracker"),
    "another package": Named("task.cell", lambda _: {"_target_": "os.system", "command": SYSTEM}, "is outside hyperopt"),
    "a package by its own leave": Named("allow_targets", lambda _: ["hyperopt", "subprocess"], "is outside hyperopt"),
    "another package through ours": Named("task.cell", lambda _: {"_target_": "hyperopt.app.files.os.system"}, NO_OPTION),
    "a class of ours that is not a setting": Named("task.cell", lambda _: {"_target_": "hyperopt.nn.deq.DEQ"}, NO_OPTION),
    "partial": Named("task.cell", lambda _: {"_target_": CELL, "_partial_": True}, "_partial_"),
    "arguments": Named("task.cell", lambda _: {"_target_": CELL, "_args_": [0.3]}, "_args_"),
    "call": Named("task.cell", lambda _: {"_target_": CELL, "_call_": False}, "_call_"),
    "recursion in plain values": Named("task.l2", lambda _: {"_recursive_": False}, "_recursive_"),
    "an interpolation": Named("task.cell.input_scale", lambda _: "${oc.decode:'0.3'}", "is not a plain value"),
    "the environment": Named("name", lambda _: "${oc.env:HOME}", "is not a plain value"),
    "a list as a target": Named("task.cell", lambda _: {"_target_": ["os", "system"]}, "_target_"),
    "a number as a target": Named("task.cell", lambda _: {"_target_": 5}, "_target_"),
    "a dataset as a cell": Named("task.cell", lambda _: {"_target_": "hyperopt.data.digits.Digits"}, "is not a CellFactory"),
    "a cell as an optimizer": Named("optimizer", lambda _: {"_target_": CELL}, "is not an OuterOptimizer"),
    "a text as a cell": Named("task.cell", lambda _: "projected", "does not name a CellFactory"),
    "a list as a cell": Named("task.cell", lambda _: [{"_target_": CELL}], "does not name a CellFactory"),
    "no target": Named("task.cell", lambda _: {"bias": True}, "does not name a CellFactory"),
    "a text as a size": Named("task.state_size", lambda _: "many", "must be a whole number"),
    "a number that is none": Named("task.cell.max_norm", lambda _: [1], "is not in (0, 1)"),
    "a list as a task": Named("task", lambda _: [1], "task"),
}


def named(row: str, folder: Path, place: Place) -> Config:
    """The config of a row."""
    *_, config = content_of(folder)
    if row == "a package by its own leave":
        put(config, "task.cell", {"_target_": "subprocess.Popen", "args": ["touch", str(place.mark)]})
    put(config, NAMED[row].key, NAMED[row].value(place))
    return config


@pytest.mark.cases(quick=3)
@pytest.mark.parametrize("row", NAMED)
def test_a_config_in_an_export(row: str, honest: dict[str, Path], place: Place) -> None:
    tensors, card, _ = content_of(honest["equilibrium"])
    card["config"] = yaml.safe_dump(named(row, honest["equilibrium"], place))
    path = place.work / "model.pt"
    torch.save({"tensors": tensors, "card": json.dumps(card)}, path)
    assert_refused(place, lambda: load(path), words=[NAMED[row].words])


def exported(argv: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """Run ``hyperopt export``, and return what it refuses."""
    monkeypatch.setattr(sys, "argv", ["hyperopt export", *argv])
    capfd.readouterr()
    try:
        main()
    except SystemExit as end:
        assert end.code == 1
        return capfd.readouterr().err
    return ""


@pytest.mark.cases(quick=6)
@pytest.mark.parametrize("row", NAMED)
def test_a_config_of_a_run(
    row: str, honest: dict[str, Path], place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = place.work / "run"
    shutil.copytree(honest["equilibrium"], folder, ignore=shutil.ignore_patterns("export"))
    (folder / "config.yaml").write_text(yaml.safe_dump(named(row, honest["equilibrium"], place)))
    assert_refused(place, lambda: exported([str(folder)], monkeypatch, capfd), words=[NAMED[row].words])


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def damaged_config(folder: Path) -> None:
    text = (folder / "config.yaml").read_bytes()
    (folder / "config.yaml").write_bytes(text[: len(text) // 2] + b"\xff\x00{[")


def of_run(name: str, text: str) -> Callable[[Path], None]:
    """Write a file of a run."""

    def do(folder: Path) -> None:
        (folder / name).write_text(text)

    return do


def add(name: str, key: str, value: Any) -> Callable[[Path], None]:
    """Change a JSON file of a run, or a value of its config."""

    def do(folder: Path) -> None:
        content = yaml.safe_load((folder / name).read_text())
        put(content, key, value)
        (folder / name).write_text((json.dumps if name.endswith("json") else yaml.safe_dump)(content))

    return do


OF_RUNS: dict[str, tuple[Callable[[Path], None], str]] = {
    "an alias bomb": (of_run("config.yaml", BOMB), "alias"),
    "a tag": (of_run("config.yaml", "name: !!python/object/apply:os.system ['touch mark']\n"), "tag"),
    "a damaged config": (damaged_config, "config.yaml"),
    "a deep config": (of_run("config.yaml", "x: " + "[" * 3000 + "]" * 3000), "config.yaml"),
    "an empty config": (of_run("config.yaml", ""), "config.yaml"),
    "facts that are not JSON": (of_run("run.json", '{"git": '), "run.json"),
    "deep facts": (of_run("run.json", '{"git": ' + "[" * 100_000 + "]" * 100_000 + "}"), "run.json"),
    "facts of another kind": (of_run("run.json", '{"versions": [1, 2]}'), "cannot be built here"),
    "an escape sequence in the facts": (of_run("run.json", '{"versions": {"torch": "\\u001b[2J"}}'), "versions"),
    "rows that are not JSON": (of_run("metrics.jsonl", "{]\n"), "metrics.jsonl, line 1"),
    "rows of another kind": (of_run("metrics.jsonl", '{"step": "x", "hypergrad/error_estimate": 1}\n'), "cannot be built here"),
    "no rows": (lambda folder: (folder / "metrics.jsonl").unlink(), "metrics.jsonl"),
    "a seed that is none": (add("config.yaml", "seed", "x"), "cannot be built here"),
    "a precision that is none": (add("config.yaml", "precision", "__class__"), "precision"),
    "no optimizer": (add("config.yaml", "optimizer", None), "optimizer=None"),
    "a state of 2e4": (add("config.yaml", "task.state_size", 23_000), "far more numbers"),
}


@pytest.mark.parametrize("row", OF_RUNS)
def test_a_file_of_a_run(
    row: str, honest: dict[str, Path], place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    change, words = OF_RUNS[row]
    folder = place.work / "run"
    shutil.copytree(honest["equilibrium"], folder, ignore=shutil.ignore_patterns("export"))
    change(folder)
    monkeypatch.chdir(place.root)
    assert_refused(place, lambda: exported([str(folder)], monkeypatch, capfd), words=[words])


def test_a_run_does_not_decide_to_download(
    honest: dict[str, Path], place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def reach(*args: Any, **more: Any) -> None:
        place.mark.touch()
        raise OSError("no network in tests")

    for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo"), (subprocess, "run"), (subprocess, "Popen")):
        monkeypatch.setattr(owner, name, reach)
    folder = place.work / "run"
    shutil.copytree(honest["equilibrium"], folder, ignore=shutil.ignore_patterns("export"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    dataset = {"_target_": "hyperopt.data.mnist.MNIST", "root": str(place.work / "data"), "download": True}
    config["dataset"], config["task"]["dataset"] = dataset, dict(dataset)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert_refused(place, lambda: exported([str(folder)], monkeypatch, capfd), words=["download"], lines=1)
    with pytest.raises(AssertionError, match="code from the input was run"):  # the user may decide so
        assert_refused(place, lambda: exported([str(folder), "--download"], monkeypatch, capfd))


def test_a_link_in_the_place_of_the_export(
    honest: dict[str, Path], place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = place.work / "run"
    shutil.copytree(honest["equilibrium"], folder, ignore=shutil.ignore_patterns("export"))
    (place.root / "model.pt").write_bytes(b"the user's own model")
    (folder / "export").symlink_to(place.root)
    assert_refused(place, lambda: exported([str(folder)], monkeypatch, capfd), words=["is a link to"])


def card_with(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Change a value of a card."""
    return lambda card: put(card, key, value)


CARDS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an alias bomb": (card_with("config", BOMB), "alias"),
    "a tag": (card_with("config", "task: !!python/object/apply:os.system ['touch mark']"), "tag"),
    "a deep config": (card_with("config", "x: " + "[" * 3000 + "]" * 3000), "config"),
    "no config": (lambda card: card.pop("config"), "config"),
    "a list as a config": (card_with("config", "[1, 2]"), "config"),
    "no input": (lambda card: card.pop("input"), "input"),
    "a shape of texts": (card_with("input.shape", ["64"]), "input.shape"),
    "a shape below 0": (card_with("input.shape", [-8, -8]), "input.shape"),
    "a huge shape": (card_with("input.shape", [2**30, 2**30, 2**30]), "cannot be built here"),
    "a text of classes": (card_with("classes", "10"), "classes"),
    "a huge number of classes": (card_with("classes", 10**12), "far more numbers"),
    "a precision that is none": (card_with("precision", "__dict__"), "precision"),
    "a scaling that is none": (card_with("input.scaling", {"largest": ["x"]}), "input.scaling"),
    "an escape sequence": (card_with("name", "\x1b]0;owned\x07\x1b[2J"), "name"),
    "an escape sequence as a key": (card_with("metrics", {"\x1b[2J": 1.0}), "metrics"),
    "an escape sequence in the config": (card_with("config", 'task: {"\\e[2J": 1}'), "task"),
    "a huge text": (card_with("task", "x" * 100_000), "10000 characters"),
    "a version with line ends": (card_with("versions", {"hyperopt-bilevel": "1\n" * 50}), "versions"),
    "another format": (card_with("format", [1]), "format"),
}


@pytest.mark.parametrize("row", CARDS)
def test_a_card(row: str, honest: dict[str, Path], place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    change, words = CARDS[row]
    tensors, card, _ = content_of(honest["equilibrium"])
    change(card)
    path = place.work / "model.pt"
    torch.save({"tensors": tensors, "card": json.dumps(card)}, path)
    monkeypatch.chdir(place.root)
    assert_refused(place, lambda: load(path), words=[words])


@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize("text", ['{"format": ' + "[" * 100_000, '{"format": 1, "step": NaN}', "[]", "\x00"])
def test_a_card_that_is_no_json(text: str, form: str, honest: dict[str, Path], place: Place) -> None:
    tensors, *_ = content_of(honest["equilibrium"])
    path = place.work / f"model.{form}"
    if form == "pt":
        torch.save({"tensors": tensors, "card": text}, path)
    else:
        library = pytest.importorskip("safetensors.torch", reason="pip install 'hyperopt-bilevel[export]'")
        library.save_file(tensors, path, metadata={"hyperopt": text})
    assert_refused(place, lambda: load(path), words=["model."])


SIZES: dict[str, tuple[str, str, Any]] = {
    "a state of 1e12": ("equilibrium", "task.state_size", 10**12),
    "a state of 2e4": ("equilibrium", "task.state_size", 20_000),
    "a state of 10^400": ("equilibrium", "task.state_size", 10**400),
    "a layer of 1e12": ("network", "task.hidden", [10**12]),
    "a layer of 1e8": ("network", "task.hidden", [10**7]),
    "many layers": ("network", "task.hidden", [1] * 3000),
    "a million layers": ("network", "task.hidden", [1] * 10**6),
    "another state": ("equilibrium", "task.state_size", 4),
}


@pytest.mark.cases(quick=3)
@pytest.mark.parametrize("row", SIZES)
def test_a_size_that_the_tensors_do_not_have(row: str, honest: dict[str, Path], place: Place) -> None:
    name, key, value = SIZES[row]
    tensors, card, config = content_of(honest[name])
    put(config, key, value)
    # As JSON, which is YAML too and which the library reads in a blink.
    card["config"] = json.dumps(config)
    path = place.work / "model.pt"
    torch.save({"tensors": tensors, "card": json.dumps(card)}, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(place, lambda: load(path), words=["cannot be built here"], seconds=30)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def repacked(path: Path, method: int = zipfile.ZIP_STORED, **changes: bytes) -> None:
    """Write a zip anew, with other bytes for some of its members (data.pkl: ``pickle``, data/0: ``storage``)."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name in members:
        kind = {"data.pkl": "pickle", "data/0": "storage"}.get(name.partition("/")[2], "")
        members[name] = changes.get(kind, members[name])
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def tensor_of(make: Callable[[], torch.Tensor]) -> Callable[[Path, dict[str, Any]], None]:
    """Replace the first tensor."""

    def do(path: Path, content: dict[str, Any]) -> None:
        name = next(iter(content["tensors"]))
        torch.save({**content, "tensors": {**content["tensors"], name: make()}}, path)

    return do


def with_object(made: Callable[[], Any]) -> Callable[[Path, dict[str, Any]], None]:
    """Add an object."""
    return lambda path, content: torch.save({**content, "more": made()}, path)


def bomb(path: Path, content: dict[str, Any]) -> None:
    """Some hundred kilobytes that unpack to some hundred megabytes."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in members.items():
            if name.endswith("data/0"):
                with archive.open(name, "w") as member:
                    for _ in range(40):
                        member.write(bytes(10_000_000))
            else:
                archive.writestr(name, data)


def claims_more(path: Path, content: dict[str, Any]) -> None:
    """A tensor that claims a larger storage than there is."""
    torch.save({**content, "tensors": {"model.x": torch.ones(77)}}, path)
    with zipfile.ZipFile(path) as archive:
        text = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert text.count(b"KMtq") == 1
    repacked(path, pickle=text.replace(b"KMtq", b"J\x00\x00\x00\x10tq"))


def flipped_tensor(path: Path, content: dict[str, Any]) -> None:
    """One bit of a tensor, the checksum of the zip made anew: as a safetensors file would have it."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        data = bytearray(archive.read(next(name for name in archive.namelist() if name.endswith("data/0"))))
    data[1] ^= 1
    repacked(path, storage=bytes(data))


def twice(path: Path, content: dict[str, Any]) -> None:
    """A member twice, of which two readers may take a different one."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data/0"))
        data = archive.read(name)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, bytes(len(data)))


ONES = torch.ones(7)
FILES: dict[str, tuple[Callable[[Path, dict[str, Any]], Any], str]] = {
    "a call": (with_object(lambda: Calls(Path.touch, Path("mark"))), "could run code"),
    "a call that takes memory": (with_object(lambda: Calls(bytearray, 3 * 10**9)), "could run code"),
    "a tensor by its class": (with_object(lambda: Calls(torch.Tensor, 10**9)), "could run code"),
    "a bare pickle": (lambda path, _: path.write_bytes(pickle.dumps(Calls(Path.touch, Path("mark")))), "not an export"),
    "a pickle under another name": (lambda path, _: path.write_bytes(b"\x80\x04" + b"." * 100), "not an export"),
    "a zip bomb": (bomb, "it is packed"),
    "an expanded tensor": (tensor_of(lambda: torch.zeros(1).expand(10**12)), "lies in a storage of 1 numbers"),
    "a part of a tensor": (tensor_of(lambda: torch.zeros(1000)[10:13]), "not the whole of a storage"),
    "a transposed tensor": (tensor_of(lambda: torch.zeros(64, 3).T), "not the whole of a storage"),
    "a sparse tensor": (tensor_of(lambda: torch.zeros(9, 9).to_sparse()), "was not loaded"),
    "a meta tensor": (tensor_of(lambda: torch.empty(10**9, device="meta")), "was not loaded"),
    "a parameter": (tensor_of(lambda: torch.nn.Parameter(torch.zeros(3))), "was not loaded"),
    "an array of objects": (with_object(lambda: Calls(getattr, "x", "upper")), "could run code"),
    "two tensors in one storage": (
        lambda path, content: torch.save({**content, "tensors": {"model.a": ONES, "model.b": ONES.view(7)}}, path),
        "not the whole of a storage of its own",
    ),
    "a storage that is not there": (claims_more, "has 308 bytes"),
    "a flipped bit behind a right checksum of the zip": (flipped_tensor, "its checksum is not"),
    "a member twice": (twice, "it is packed"),
    "tensors in a list": (lambda path, content: torch.save({**content, "tensors": [torch.ones(2)]}, path), "model.pt"),
    "a number as the card": (lambda path, content: torch.save({**content, "card": 5}, path), "a card"),
    "names of neither kind": (
        lambda path, content: torch.save({"card": content["card"], "tensors": {"\x1b[2J": torch.ones(2)}}, path),
        "cannot be built here",
    ),
    "an empty zip": (lambda path, _: zipfile.ZipFile(path, "w").close(), "not an export"),
    "nothing": (lambda path, _: path.write_bytes(b""), "not an export"),
}


@pytest.mark.cases(quick=5)
@pytest.mark.parametrize("row", FILES)
def test_a_file(row: str, honest: dict[str, Path], place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    write, words = FILES[row]
    path = place.work / "model.pt"
    write(path, torch.load(honest["equilibrium"] / "export" / "model.pt", weights_only=True))
    monkeypatch.chdir(place.root)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(place, lambda: load(path), words=[words])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


@pytest.fixture(scope="module")
def plain(honest: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export as safetensors."""
    pytest.importorskip("safetensors.torch", reason="pip install 'hyperopt-bilevel[export]'")
    return export(honest["equilibrium"], tmp_path_factory.mktemp("safetensors"), form="safetensors")[0]


def test_a_config_in_safetensors(plain: Path, honest: dict[str, Path], place: Place) -> None:
    library = pytest.importorskip("safetensors.torch")
    tensors, card, _ = content_of(honest["equilibrium"])
    card["config"] = yaml.safe_dump(named("empty a file by a class", honest["equilibrium"], place))
    library.save_file(tensors, place.work / "model.safetensors", metadata={"hyperopt": json.dumps(card)})
    assert_refused(place, lambda: load(place.work / "model.safetensors"), words=[NO_OPTION])


@pytest.mark.parametrize("row", ["a tensor", "the card", "a header of 2^60 bytes", "a shape", "half of it"])
def test_a_damaged_file_of_safetensors(row: str, plain: Path, place: Place) -> None:
    data = bytearray(plain.read_bytes())
    if row == "a tensor":
        data[-3] ^= 4
    elif row == "the card":
        data[data.index(b"val/loss") + 12] ^= 1
    elif row == "a header of 2^60 bytes":
        data[:8] = struct.pack("<Q", 2**60)
    elif row == "a shape":
        at = data.index(b'"shape":[3,3]')
        data[at : at + 13] = b'"shape":[9,1]'
    else:
        del data[len(data) // 2 :]
    path = place.work / "model.safetensors"
    path.write_bytes(data)
    assert_refused(place, lambda: load(path), words=["model.safetensors"])


def test_old_exports_have_no_checksum(honest: dict[str, Path], plain: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    tensors, card, _ = content_of(honest["equilibrium"])
    torch.save({"card": json.dumps(card), "tensors": tensors}, tmp_path / "old.pt")
    library.save_file(tensors, tmp_path / "old.safetensors", metadata={"hyperopt": json.dumps(card)})
    expected = load_exported(plain)
    for path in tmp_path.iterdir():
        assert same(load_exported(path), expected, exported=False)


def same(found: Any, expected: Any, *, exported: bool = True) -> bool:
    """Whether two exports are equal bit for bit, their time aside without ``exported``."""
    cards = [{**each.card, "exported": each.card["exported"] if exported else ""} for each in (found, expected)]
    states = [{**each.module.state_dict(), **each.hyperparameters} for each in (found, expected)]
    return cards[0] == cards[1] and all(torch.equal(states[0][name], states[1][name]) for name in {*states[0], *states[1]})


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize(("form", "flips"), [("pt", 300), ("safetensors", 100)])
def test_a_flipped_bit_is_refused_or_changes_nothing(
    form: str, flips: int, honest: dict[str, Path], plain: Path, place: Place
) -> None:
    original = honest["equilibrium"] / "export" / "model.pt" if form == "pt" else plain
    expected, data = load_exported(original), original.read_bytes()
    drawn, path = random.Random(0), place.work / f"model.{form}"
    refused = 0
    for _ in range(flips):
        at, bit = drawn.randrange(len(data)), drawn.randrange(8)
        path.write_bytes(bytes([*data[:at], data[at] ^ 1 << bit, *data[at + 1 :]]))
        try:
            found = load_exported(path)
        except ExportError as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
        else:
            assert same(found, expected), (at, bit)
    assert refused > flips / 2


OWN = """
import os
from dataclasses import dataclass
from typing import Any
from hyperopt.nn.cells import CellFactory, ProjectedCell

@dataclass(frozen=True)
class Cell(CellFactory):
    inside: Any = None

    def build(self, features, state_size, generator=None):
        return ProjectedCell().build(features, state_size, generator)
"""


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of the user's own, with a cell that takes anything."""
    module = types.ModuleType("own_parts")
    monkeypatch.setitem(sys.modules, "own_parts", module)
    exec(OWN, module.__dict__)
    return "own_parts"


INSIDE: dict[str, tuple[Callable[[Place], Any], str]] = {
    "a function of ours": (writes, NO_OPTION),
    "another package": (lambda _: [{"x": {"_target_": "os.system", "command": SYSTEM}}], "is outside hyperopt"),
    "another package through the allowed one": (lambda _: {"_target_": "own_parts.os.system"}, "which is not allowed"),
    "arguments": (lambda _: {"_target_": "own_parts.Cell", "_args_": [1]}, "_args_"),
    "an interpolation": (lambda _: ["${oc.env:HOME}"], "is not a plain value"),
}


@pytest.mark.parametrize("row", INSIDE)
def test_below_a_part_of_an_allowed_package(
    row: str, own: str, honest: dict[str, Path], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, words = INSIDE[row]
    tensors, card, config = content_of(honest["equilibrium"])
    config["task"]["cell"] = {"_target_": "own_parts.Cell", "inside": inside(place)}
    card["config"] = yaml.safe_dump(config)
    path = place.work / "model.pt"
    torch.save({"tensors": tensors, "card": json.dumps(card)}, path)
    monkeypatch.chdir(place.root)
    assert_refused(place, lambda: load(path, allow_targets=[own]), words=[words])


def test_a_part_of_an_allowed_package_is_built(own: str, honest: dict[str, Path], tmp_path: Path) -> None:
    tensors, card, config = content_of(honest["equilibrium"])
    config["task"]["cell"] = {"_target_": "own_parts.Cell", "inside": [{"_target_": CELL}, {"_target_": "own_parts.Cell"}]}
    card["config"] = yaml.safe_dump(config)
    torch.save({"tensors": tensors, "card": json.dumps(card)}, tmp_path / "model.pt")
    assert load_exported(tmp_path / "model.pt", allow_targets=[own]).module


OVERRIDES: dict[str, tuple[Callable[[Place], list[str]], str]] = {
    "empty a file in a list": (
        lambda place: [f"task.fallback=[{{_target_: hyperopt.app.files.AppendFile, path: '{place.canary}', size: 0}}]"],
        NO_OPTION,
    ),
    "write a file in a list": (
        lambda place: [f"adjoint.fallback=[{{_target_: hyperopt.app.files.write_text, path: '{place.mark}', text: x}}]"],
        NO_OPTION,
    ),
    "allow ours": (
        lambda place: ["allow_targets=[hyperopt]", "solver._target_=hyperopt.app.files.os.system"],
        NO_OPTION,
    ),
    "call through ours": (lambda _: ["solver._target_=hyperopt.app.config.copy.deepcopy"], NO_OPTION),
    "partial": (lambda _: ["+solver._partial_=true"], "_partial_"),
    "arguments": (lambda _: ["+optimizer._args_=[1]"], "_args_"),
    "a dataset as a cell": (lambda _: ["task.cell._target_=hyperopt.data.digits.Digits"], "is not a CellFactory"),
    "a cell as a trainer": (lambda _: [f"trainer._target_={CELL}"], "is not a TrainerSettings"),
}


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize("row", OVERRIDES)
def test_an_override(row: str, command: Launcher, tmp_path: Path) -> None:
    place = Place(tmp_path)
    overrides, words = OVERRIDES[row]

    def act() -> str:
        done = command(*overrides(place), "debug=default", "device=cpu")
        return done.err if done.status == 1 else ""

    assert_refused(place, act, words=[words])


def test_text_of_a_run_stays_in_its_code_marks(honest: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(honest["equilibrium"], folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["name"] = "``` <script>[x](y)"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps({"versions": {"torch": "1` <b>", "[a](b)": "x"}, "git": {"hash": "`` <i>"}}))
    page = export(folder)[1].read_text()
    assert page.startswith("# ```` ``` <script>[x](y) ````\n")
    assert "- torch: `` 1` <b> ``\n" in page and '- git: ``` {"hash": "`` <i>"} ```\n' in page and "- `[a](b)`: `x`\n" in page
    block = page.partition("## Config\n\n")[2]
    marks = block.partition("yaml")[0]
    assert marks == "````" and block.count("````") == 2 and block.rstrip().endswith(marks)
