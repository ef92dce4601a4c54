"""Runs, checkpoints, reports and overrides that someone else has made: each is refused in a line, and nothing else happens."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import shutil
import subprocess
import sys
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import Place, assert_refused
from launcher import Launcher
from toy_task import config, go, rows, signal_at, summary

from hyperopt.app import checkpoint
from hyperopt.app.checkpoint import CheckpointError
from hyperopt.app.errors import explain
from hyperopt.app.report.command import main
from hyperopt.app.run_directory import RunDirectory
from hyperopt.stn.schedule import TunedSchedule

ROOT = Path(__file__).resolve().parents[2]


def said(error: BaseException) -> str:
    """Return what the command line prints for an error."""
    return explain(error) or "".join(traceback.format_exception(error))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the toy task that was stopped after ten of its twelve steps, with two checkpoints."""
    out = tmp_path_factory.mktemp("base") / "run"
    with pytest.raises(SystemExit):
        go(config(), out, signal_at(9, 15))
    (out / "hyperopt.log").write_text("interrupted\n")
    (out / ".hydra").mkdir()
    (out / ".hydra" / "overrides.yaml").write_text("- seed=3\n")
    (out / "figures").mkdir()
    return out


@pytest.fixture
def place(tmp_path: Path, base: Path) -> Place:
    """A copy of that run in the place of a row."""
    made = Place(tmp_path / "place")
    shutil.copytree(base, made.work, dirs_exist_ok=True)
    (made.root / "elsewhere").mkdir()
    for name in ("config.yaml", "index.html", "0", "last.pt"):
        (made.root / "elsewhere" / name).write_text("the user's own\n")
    return made


def resume(place: Place, **over: Any) -> str:
    """Resume the run; return what is said, or nothing where it went on."""
    try:
        go(config(resume="auto", **over), place.work)
    except Exception as error:
        return said(error)
    return ""


def reported(place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    """Run ``hyperopt report`` in this process; return its status and what it prints."""
    monkeypatch.setattr(sys, "argv", ["hyperopt report", str(place.work), "--metric", "val/loss", *more])
    status = 0
    try:
        main()
    except SystemExit as end:
        status = int(end.code or 0)
    except Exception as error:
        return 1, said(error)
    captured = capfd.readouterr()
    return status, captured.out + captured.err


# Links and special files


def link(name: str, to: str) -> Callable[[Place], None]:
    """Put a link at ``name``, to the canary, to nothing, or to a directory elsewhere."""

    def spoil(place: Place) -> None:
        path = place.work / name
        remove(path)
        path.parent.mkdir(exist_ok=True)
        path.symlink_to({"canary": place.canary, "new": place.root / "new", "elsewhere": place.root / "elsewhere"}[to])

    return spoil


def remove(path: Path) -> None:
    """Remove a file or a directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def pipe(name: str) -> Callable[[Place], None]:
    """Put a pipe at ``name``, on which opening or reading would wait for ever."""

    def spoil(place: Place) -> None:
        remove(place.work / name)
        os.mkfifo(place.work / name)

    return spoil


def second_name(name: str) -> Callable[[Place], None]:
    """Put a second name of the canary at ``name``."""

    def spoil(place: Place) -> None:
        remove(place.work / name)
        os.link(place.canary, place.work / name)

    return spoil


def swapped(name: str, kind: str) -> Callable[[Place], None]:
    """Put a directory where a file belongs, or the other way round."""

    def spoil(place: Place) -> None:
        remove(place.work / name)
        (place.work / name).mkdir() if kind == "directory" else (place.work / name).write_text("x")

    return spoil


FOREIGN: dict[str, tuple[Callable[[Place], None], str]] = {
    **{
        f"{name} -> a file": (link(name, "canary"), "a link")
        for name in (".lock", "metrics.jsonl", "hyperopt.log", "config.yaml")
    },
    **{
        f"{name} -> a file": (link(name, "canary"), "a link")
        for name in ("run.json", "summary.json", "FAILED", "checkpoints/last.pt")
    },
    **{f"{name} -> nothing yet": (link(name, "new"), "a link") for name in (".lock", "metrics.jsonl", "hyperopt.log")},
    "tb/events -> a file": (link("tb/events.out.tfevents.0000000001.h.1.0", "canary"), "a link"),
    ".hydra/config.yaml -> a file": (link(".hydra/config.yaml", "canary"), "a link"),
    "a temporary file -> a file": (link(f".config.yaml.{os.getpid()}.tmp", "canary"), "a link"),
    **{f"{name} -> a directory": (link(name, "elsewhere"), "a link") for name in ("checkpoints", "figures", "tb", ".hydra")},
    **{
        f"{name} is a pipe": (pipe(name), "not a regular file")
        for name in (".lock", "metrics.jsonl", "hyperopt.log", "config.yaml")
    },
    "checkpoints/last.pt is a pipe": (pipe("checkpoints/last.pt"), "not a regular file"),
    **{f"{name} is a second name": (second_name(name), "a hard link") for name in (".lock", "metrics.jsonl", "hyperopt.log")},
    "metrics.jsonl is a directory": (swapped("metrics.jsonl", "directory"), "a directory"),
    "checkpoints is a file": (swapped("checkpoints", "file"), "a file"),
}


@pytest.mark.parametrize("row", FOREIGN)
def test_a_run_directory_that_leads_elsewhere(place: Place, row: str) -> None:
    spoil, words = FOREIGN[row]
    spoil(place)
    assert_refused(place, lambda: resume(place), words=[words, "left untouched", "hydra.run.dir"], seconds=30)
    assert not (place.root / "new").exists()


@pytest.fixture
def launched(launch: Launcher, tmp_path: Path) -> Callable[..., str]:
    """Give the command line arguments; return what it says on stderr, nothing where it started a job."""

    def act(*argv: str) -> str:
        done = launch(*argv)
        return "" if done.runs or done.status == 0 else done.err

    return act


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize(
    "name", [".lock", "metrics.jsonl", "hyperopt.log", ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra", "tb"]
)
def test_the_command_refuses_it_before_hydra_opens_anything(place: Place, launched: Callable[..., str], name: str) -> None:
    link(name, "elsewhere" if name in (".hydra", "tb") else "canary")(place)
    assert_refused(place, lambda: launched(f"hydra.run.dir={place.work}", "resume=auto"), words=["a link"], seconds=30)


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize("name", ["0", ".sweep.lock", ".lock", "0/hyperopt.log", "0/job.json", "sweep.json", "multirun.yaml"])
def test_a_sweep_that_leads_elsewhere(launched: Callable[..., str], tmp_path: Path, name: str) -> None:
    place = Place(tmp_path / "place")
    (place.work / "0").mkdir()
    (place.work / "0" / "job.json").write_text('{"number": 0, "overrides": ["seed=1"]}')
    (place.root / "elsewhere").mkdir()
    link(name, "elsewhere" if name == "0" else "canary")(place)
    argv = ["-m", f"hydra.sweep.dir={place.work}", "seed=1,2", "resume=auto"]
    assert_refused(place, lambda: launched(*argv), words=["a link"], seconds=30)


def test_a_directory_that_is_reached_through_a_link_is_fine(place: Place) -> None:
    (place.root / "outputs").symlink_to(place.work)
    go(config(resume="auto"), place.root / "outputs")
    assert summary(place.work)["status"] == "completed" and len(rows(place.work)) == 12


def test_a_directory_below_a_link_is_fine(tmp_path: Path, launch: Launcher) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("other")
    assert launch(f"hydra.run.dir={tmp_path / 'link' / 'run'}").status == 0 and (tmp_path / "other" / "run").is_dir()


# Files that a run wrote

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghij", "bcdefghijk", strict=True)
)
CONFIGS = {
    "an alias bomb": (BOMB, "an anchor or an alias"),
    "a tag that would run code": (
        "seed: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [MARK]]\n",
        "a tag",
    ),
    "cut short": ("task:\n  solver: {rtol: 1e-", "is not YAML"),
    "binary": ("\x00\x01\x02\x1b[31m", "is not YAML"),
    "no mapping": ("- 1\n- 2\n", "holds no mapping"),
    "nested deeply": ("a: " + "[" * 5000, "nested more than"),
    "far too long": ("".join(f"a{k}: {k}\n" for k in range(300_000)), "more than"),
    "a key twice": ("seed: 3\nseed: 4\n", "a key twice"),
}


@pytest.mark.cases(quick=2, among={"way": ["resume"]})
@pytest.mark.parametrize("row", CONFIGS)
@pytest.mark.parametrize("way", ["resume", "report"])
def test_a_hostile_config(place: Place, launched: Callable[..., str], row: str, way: str, monkeypatch: Any, capfd: Any) -> None:
    text, words = CONFIGS[row]
    (place.work / "config.yaml").write_text(text.replace("MARK", str(place.mark)))

    def act() -> str:
        if way == "resume":
            return launched(f"hydra.run.dir={place.work}", "resume=auto")
        status, message = reported(place, monkeypatch, capfd, "--out", str(place.root / "out"))
        return message if status == 1 else ""

    assert_refused(place, act, words=[words, "config.yaml"], seconds=30)


def test_a_config_that_asks_for_the_environment_shows_nothing_of_it(
    place: Place, launched: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PASSPHRASE", "swordfish")
    (place.work / "config.yaml").write_text("seed: ${oc.env:PASSPHRASE}\n")
    found = assert_refused(place, lambda: launched(f"hydra.run.dir={place.work}", "resume=auto"), words=["another experiment"])
    assert "swordfish" not in found.message


def test_a_config_with_a_hundred_strange_keys_is_told_in_one_short_line(place: Place, launched: Callable[..., str]) -> None:
    (place.work / "config.yaml").write_text("".join(f'"\\e[31m{k}": {"x" * 900}\n' for k in range(100)))
    found = assert_refused(place, lambda: launched(f"hydra.run.dir={place.work}", "resume=auto"), words=["more", "\\x1b"])
    assert len(found.message) < 6000


def change(name: str, **values: Any) -> Callable[[Place], None]:
    """Change values of a JSON file."""

    def spoil(place: Place) -> None:
        path = place.work / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**found, **values}))

    return spoil


def text_of(name: str, text: str) -> Callable[[Place], None]:
    """Replace a file."""

    def spoil(place: Place) -> None:
        (place.work / name).write_text(text)

    return spoil


ESCAPE = "\x1b]0;owned\x07\x1b[2J\nall is well"
SHOWN: dict[str, Callable[[Place], None]] = {
    "status with escapes": change("summary.json", status=ESCAPE),
    "reason with escapes": change("summary.json", reason=ESCAPE),
    "overrides with escapes": change("job.json", overrides=[f"seed={ESCAPE}", f"{ESCAPE}=1"]),
    "directory of a job with escapes": change(
        "sweep.json", jobs=[{"directory": ESCAPE}, {"directory": "x" * 5000}, {"directory": "\0"}]
    ),
    "a name with escapes": text_of("config.yaml", 'name: "\\e[2J"\ntrainer: {monitor: val/loss, mode: min}\n'),
    "keys that are numbers": text_of("config.yaml", "trainer: {monitor: val/loss, mode: min}\nx: [{1: a, b: c}]\n1: 2\n"),
    "seconds that are text": change("summary.json", seconds="long", steps=[]),
    "numbers without end": change("summary.json", metrics={"val/loss": 10**400}, best={"metrics": {"val/loss": 10**400}}),
    "an index that is none": change("sweep.json", jobs=[1, None, {"directory": 5}]),
    "numbers without end in the rows": text_of(
        "metrics.jsonl",
        '{"step": 0, "val/loss": 1}\n{"step": 1, "val/loss": 1' + "0" * 400 + '}\n{"step": 2, "val/loss": 1e999}\n',
    ),
}


@pytest.mark.cases(quick=2, slow=4)
@pytest.mark.parametrize("row", SHOWN)
def test_a_report_shows_it_as_plain_text(place: Place, row: str, monkeypatch: Any, capfd: Any) -> None:
    SHOWN[row](place)
    before = place.listing()
    status, message = reported(place, monkeypatch, capfd, "--out", str(place.root / "out"))
    page = (place.root / "out" / "index.html").read_text()
    assert status == 0 and "Traceback" not in message
    assert not {each for each in message + page if not each.isprintable()} - {"\n"} and "\nall is well" not in message
    assert {name: found for name, found in place.listing().items() if not name.startswith("out")} == before


BROKEN: dict[str, tuple[Callable[[Place], None], str]] = {
    "metrics that are a list": (change("summary.json", metrics=[1]), "summary.json"),
    "a best that is text": (change("summary.json", best="x"), "summary.json"),
    "a summary with NaN": (text_of("summary.json", '{"status": NaN}'), "summary.json"),
    "a summary nested deeply": (text_of("summary.json", '{"a":' * 90000), "summary.json"),
    "a summary that is far too long": (text_of("summary.json", '{"a": "' + "x" * 5_000_000 + '"}'), "summary.json"),
    "a summary that is a pipe": (pipe("summary.json"), "summary.json"),
    "a row that is none": (text_of("metrics.jsonl", '{"step": 0}\n[1]\n'), "metrics.jsonl, line 2"),
    "a step without end": (text_of("metrics.jsonl", '{"step": 1e999}\n'), "metrics.jsonl, line 1"),
    "a job that is none": (text_of("job.json", "[1"), "job.json"),
    "a report that leads elsewhere": (link("report", "elsewhere"), "a link"),
}


@pytest.mark.parametrize("row", BROKEN)
def test_a_report_leaves_it_out_in_a_line(place: Place, row: str, monkeypatch: Any, capfd: Any) -> None:
    spoil, words = BROKEN[row]
    spoil(place)

    def act() -> str:
        status, message = reported(place, monkeypatch, capfd)
        return message if status == 1 else ""

    assert_refused(place, act, words=[words], seconds=30)


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize("text", ["[1", "[1]", '{"resumed": 5}', '{"resumed": {"a": 1}}'])
def test_a_damaged_run_json_does_not_stop_a_resume(place: Place, text: str) -> None:
    (place.work / "run.json").write_text(text)
    assert resume(place) == "" and json.loads((place.work / "run.json").read_text())["resumed"][0]["after_steps"] == 10


SCHEDULES = {
    "cut short": '{"names": ["a"], "st',
    "no list": '{"names": 5, "steps": 5, "raw": 5, "values": 5}',
    "other lengths": '{"names": ["a"], "steps": [1], "raw": [[1.0, 2.0]], "values": [[1.0]]}',
    "steps without end": '{"names": ["a"], "steps": [1000000000000000], "raw": [[1.0]], "values": [[1.0]]}',
}


@pytest.mark.parametrize("row", SCHEDULES)
def test_a_schedule_that_is_none(tmp_path: Path, row: str) -> None:
    place = Place(tmp_path / "place")
    path = place.work / "schedule.json"
    path.write_text(SCHEDULES[row])

    def act() -> str:
        try:
            TunedSchedule.load(path)
        except Exception as error:
            return said(error)
        return ""

    assert_refused(place, act, words=["schedule.json"])


# Checkpoints


class Runs:
    """Unpickling this leaves the mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def content(**changes: Any) -> Callable[[Place], None]:
    """Change what the last checkpoint holds; keys may reach inside, with two underscores."""

    def spoil(place: Place) -> None:
        path = place.work / "checkpoints" / "last.pt"
        found = torch.load(path, weights_only=True)
        for key, value in changes.items():
            *above, last = key.split("__")
            node = found
            for name in above:
                node = node[name]
            if value is ...:
                del node[last]
            else:
                node[last] = value
        torch.save(found, path)

    return spoil


def bare_pickle(place: Place) -> None:
    (place.work / "checkpoints" / "last.pt").write_bytes(pickle.dumps({"format": checkpoint.FORMAT, "state": Runs(place.mark)}))


def runs_code(place: Place) -> None:
    torch.save({"format": checkpoint.FORMAT, "state": Runs(place.mark)}, place.work / "checkpoints" / "last.pt")


class Large:
    """Unpickling this takes twenty gigabytes, and torch admits the class."""

    def __init__(self, kind: Any, count: int) -> None:
        self.kind, self.count = kind, count

    def __reduce__(self) -> tuple[Any, ...]:
        return self.kind, (self.count,)


def asks_for_memory(kind: Any, count: int) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        torch.save({"format": checkpoint.FORMAT, "state": Large(kind, count)}, place.work / "checkpoints" / "last.pt")

    return spoil


CHECKPOINTS: dict[str, tuple[Callable[[Place], None], str]] = {
    "a pickle that runs code": (bare_pickle, "was not loaded"),
    "a checkpoint that runs code": (runs_code, "was not loaded"),
    "a checkpoint that asks for memory": (asks_for_memory(bytearray, 20_000_000_000), "was not loaded"),
    "a checkpoint that asks for a large tensor": (asks_for_memory(torch.Tensor, 5_000_000_000), "was not loaded"),
    "rows before the first": (content(position={"rows": -1, "events": {}, "wall": 0.0}), "position.rows"),
    "rows that are text": (content(position__rows="7"), "position.rows"),
    "events that are a list": (content(position__events=[1]), "position.events"),
    "a time without end": (content(position__wall=float("inf")), "position.wall"),
    "no position": (content(position=...), "position"),
    "a state that is text": (content(state="x"), "state"),
    "a step that is text": (content(state__step="9"), "state.step"),
    "a row that is text": (content(state__row={"outer/step_loss": "x"}), "state.row"),
    "a seed that is none": (content(config__seed=[1]), "another experiment"),
    "a config that is none": (content(config=[1]), "config"),
    "no generators": (content(rng={}), "does not fit"),
    "a generator outside of its numbers": (content(rng__numpy=["MT19937", torch.zeros(624), 10**9, 0, 0.0]), "rng"),
    "a generator that is text": (content(generator="x"), "generator"),
    "a generator of another kind": (content(generator=torch.zeros(7)), "does not fit"),
    "a task of another shape": (content(task__a=torch.zeros(7)), "does not fit"),
    "no task": (content(task={}), "does not fit"),
    "an optimizer that is none": (content(optimizer={"state": 5, "param_groups": "x"}), "does not fit"),
    "a schedule that is none": (content(schedule=[1]), "schedule"),
}


@pytest.mark.parametrize("row", CHECKPOINTS)
def test_a_hostile_checkpoint(place: Place, row: str) -> None:
    spoil, words = CHECKPOINTS[row]
    spoil(place)
    assert_refused(place, lambda: resume(place), words=[words, "last.pt"], seconds=30)


def packed(path: Path) -> None:
    """Write the members of a checkpoint packed, with many zeros among them."""
    with zipfile.ZipFile(path) as archive:
        members = {each.filename: archive.read(each) for each in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        with archive.open("last/data/99", "w", force_zip64=True) as file:
            for _ in range(60):
                file.write(bytes(5_000_000))


DAMAGED: dict[str, Callable[[Path], Any]] = {
    "packed": packed,
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "text": lambda path: path.write_text("loss,accuracy\n1,2\n"),
    "a first byte": lambda path: path.write_bytes(b"Q" + path.read_bytes()[1:]),
    "more behind": lambda path: path.write_bytes(path.read_bytes() + bytes(100_000)),
}


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize("row", DAMAGED)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(place: Place, row: str, caplog: pytest.LogCaptureFixture) -> None:
    DAMAGED[row](place.work / "checkpoints" / "last.pt")
    with caplog.at_level(logging.WARNING):
        assert resume(place) == ""
    assert "going on from the one before it, after 8 steps: step 8 is repeated" in caplog.text
    assert [row["step"] for row in rows(place.work)] == list(range(12))


def same(one: Any, other: Any) -> bool:
    """Whether two contents of checkpoints are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or one != one)


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize("previous", [True, False])
def test_three_hundred_flipped_bits(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, previous: bool) -> None:
    last = tmp_path / "last.pt"
    if previous:
        shutil.copy(base / "checkpoints" / "last.prev.pt", tmp_path)
    whole, want = (base / "checkpoints" / "last.pt").read_bytes(), checkpoint.load(base / "checkpoints" / "last.pt")
    draw, found = random.Random(0), dict.fromkeys(("unnoticed", "fallen back", "refused"), 0)
    for _ in range(300):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        last.write_bytes(data)
        caplog.clear()
        try:
            path, got = checkpoint.load_last(tmp_path) or (None, {})
        except CheckpointError as error:
            assert not previous and len(str(error).splitlines()) == 1
            found["refused"] += 1
            continue
        assert path is not None
        if path.name == "last.pt":
            assert same(got, want)
            found["unnoticed"] += 1
        else:
            assert got["state"]["step"] == 8 and "step 8 is repeated" in caplog.text
            found["fallen back"] += 1
    assert found["fallen back" if previous else "refused"] > 200, found


# Rows


def edit(change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    """Change the bytes of ``metrics.jsonl``; None removes it."""

    def spoil(path: Path) -> None:
        changed = change(path.read_bytes())
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)

    return spoil


def flipped(data: bytes) -> bytes:
    """Change a digit of the row of step 3."""
    at = data.index(b'"outer/step_loss": ', data.index(b'"step": 3')) + 22
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def without(data: bytes, step: int) -> bytes:
    """Take one row out."""
    lines = data.splitlines(keepends=True)
    return b"".join([*lines[:step], *lines[step + 1 :]])


LOST: dict[str, tuple[Callable[[Path], None], list[list[int]]]] = {
    "removed": (edit(lambda data: None), [[0, 8]]),
    "emptied": (edit(lambda data: b""), [[0, 8]]),
    "cut short": (edit(lambda data: data[: len(data) // 2]), [[4, 8]]),
    "a flipped bit": (edit(flipped), [[3, 3]]),
    "a row taken out": (edit(lambda data: without(data, 5)), [[5, 5]]),
    "of another run": (edit(lambda data: b'{"step": 0}\n' * 500), [[0, 8]]),
}


@pytest.mark.cases(quick=1)
@pytest.mark.parametrize("row", LOST)
def test_lost_rows(place: Place, tmp_path: Path, row: str, caplog: pytest.LogCaptureFixture) -> None:
    whole = [*rows(place.work)[:9]]
    spoil, lost = LOST[row]
    spoil(place.work / "metrics.jsonl")
    assert_refused(place, lambda: resume(place), words=["metrics.jsonl", "accept_lost_rows=true", "missing or changed"])
    assert resume(place, accept_lost_rows=True) == ""
    gone = set(range(lost[0][0], lost[0][1] + 1))
    assert summary(place.work)["lost_rows"] == lost and "going on without them" in caplog.text
    found = rows(place.work)
    assert [each["step"] for each in found] == [step for step in range(12) if step not in gone]
    assert [each for each in found if each["step"] < 9] == [each for each in whole if each["step"] not in gone]
    assert (
        resume(place, trainer={"max_steps": 13}) == "" and summary(place.work)["lost_rows"] == lost
    )  # whole again, and not forgotten


def test_rows_whose_checkpoints_are_gone(place: Place) -> None:
    shutil.rmtree(place.work / "checkpoints")
    assert_refused(place, lambda: resume(place), words=["metrics.jsonl", "no checkpoint", "accept_lost_rows=true"])


def test_rows_behind_the_checkpoint_are_cut_off_as_after_a_kill(place: Place) -> None:
    with (place.work / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10}\n{"step": 11, "x"')
    assert resume(place) == "" and [row["step"] for row in rows(place.work)] == list(range(12))
    assert "lost_rows" not in summary(place.work)


# Paths and overrides

PLACES: dict[str, tuple[list[str], str]] = {
    "a name that climbs": (["name=../../evil"], "name="),
    "a name with a separator": (["name=a/b"], "name="),
    "a name from the root": (["name=/etc"], "name="),
    "no name": (["name="], "name="),
    "a name that is a dot": (["name=."], "name="),
    "a name of two dots": (["name=.."], "name="),
    "a name with an escape": (["name='\x1b[2J'"], "name="),
    "a name with a line in it": (["name='a\nb'"], "name="),
    "a long name": (["name=" + "x" * 101], "name="),
    "no run directory": (["hydra.run.dir="], "hydra.run.dir"),
    "a run directory of blanks": (["hydra.run.dir='  '"], "hydra.run.dir"),
    "no run directory to resume": (["hydra.run.dir=", "resume=auto"], "hydra.run.dir"),
    "the working directory": (["hydra.run.dir=."], "hydra.run.dir"),
    "the working directory to resume": (["hydra.run.dir=.", "resume=auto"], "hydra.run.dir"),
    "no sweep directory": (["-m", "hydra.sweep.dir=", "seed=1,2"], "hydra.sweep.dir"),
    "the working directory for a sweep": (["-m", "hydra.sweep.dir=.", "seed=1,2"], "hydra.sweep.dir"),
    "the working directory for a sweep to resume": (["-m", "hydra.sweep.dir=.", "seed=1,2", "resume=auto"], "hydra.sweep.dir"),
    "a job that climbs": (["-m", "hydra.sweep.subdir=../x", "seed=1,2"], "hydra.sweep.subdir"),
    "a log that climbs": (["hydra.job.name=../../evil"], "hydra.job.name"),
    "settings that climb": (["hydra.output_subdir=../evil"], "hydra.output_subdir"),
    "settings that climb in a sweep": (["-m", "hydra.output_subdir=../evil", "seed=1,2"], "hydra.output_subdir"),
    "threads without end": (["threads=100000"], "cores"),
    "threads without end in a sweep": (["-m", "threads=1,100000"], "cores"),
}


@pytest.mark.cases(quick=2, slow=7, among={"row": list(PLACES)[::3]})
@pytest.mark.parametrize("row", PLACES)
def test_a_place_outside(tmp_path: Path, launched: Callable[..., str], row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    argv, words = PLACES[row]
    place = Place(tmp_path / "place")
    (place.work / "mine.txt").write_text("mine")
    monkeypatch.chdir(place.work)
    assert_refused(place, lambda: launched(*argv), words=[words], seconds=30)
    assert sorted(path.name for path in place.root.iterdir()) == ["canary.txt", "work"]


# Life and death

NAMED = "import sys, pathlib; from hyperopt.app.run_directory import RunDirectory; run = RunDirectory(pathlib.Path(sys.argv[1]));"
HOLD = f"{NAMED} run.acquire(); print('held'); sys.stdout.flush(); sys.stdin.read()"
LOOK = f"{NAMED} print(run.running)"


@pytest.mark.slow
def test_a_report_tells_a_killed_run_from_a_living_one(place: Place, monkeypatch: Any, capfd: Any) -> None:
    change("summary.json", status="running")(place)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(place.work)], env=env, text=True, stdin=-1, stdout=-1)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    before = place.listing()
    seen = []
    for _ in range(2):
        seen.append(reported(place, monkeypatch, capfd, "--out", str(place.root / "out"))[1])
        if other.poll() is None:
            other.kill()
            other.communicate()
    assert "1 running" in seen[0] and "1 killed" in seen[1]
    assert {name: found for name, found in place.listing().items() if not name.startswith("out")} == before


def test_a_look_at_ones_own_run_leaves_its_lock(place: Place) -> None:
    directory = RunDirectory(place.work)

    def seen_by_another() -> str:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, "-c", LOOK, str(place.work)], env=env, capture_output=True, text=True).stdout

    with directory.locked():
        assert directory.running and seen_by_another() == "True\n"
    assert directory.running is False
    (place.work / ".lock").unlink()
    assert directory.running is False
    os.mkfifo(place.work / ".lock")
    assert directory.running is False


@pytest.mark.cases(quick=0, slow=2)
@pytest.mark.parametrize("row", ["unsafe", "checkpoint", "rows", "content"])
def test_the_command_changes_nothing_where_it_refuses_to_go_on(command: Launcher, tmp_path: Path, row: str) -> None:
    place = Place(tmp_path / "place")
    argv = [f"hydra.run.dir={place.work}", "debug=default", "device=cpu", "task.state_size=5", "dataset.train=40"]
    assert command(*argv).status == 0
    last = place.work / "checkpoints" / "last.pt"
    if row == "rows":
        (place.work / "metrics.jsonl").write_text("")
    elif row == "checkpoint":
        for path in last.parent.glob("last*.pt"):
            path.write_bytes(path.read_bytes()[:-100])
    elif row == "unsafe":
        runs_code(place)
    else:
        content(state__step="9")(place)

    def act() -> str:
        done = command(*argv, "resume=auto")
        return done.err if done.status == 1 else ""

    assert_refused(place, act, words=[str(place.work)], may_write=["work/.lock"])
