"""The report: groups of seeds, its statistics, what it leaves out, and that nothing in it can run or call home."""

from __future__ import annotations

import html
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from hyperopt.app.report.advice import command_of, conclusion, next_steps, warning
from hyperopt.app.report.charts import NAMED, error_and_cost, error_point, fanned, heights, style
from hyperopt.app.report.command import main, report, what_to_compare
from hyperopt.app.report.curves import band_of, ceiling, coinciding, series_of
from hyperopt.app.report.groups import Group, group, ranked, spread
from hyperopt.app.report.read import ReportError, find, winners
from hyperopt.app.report.trust import STATUSES, Finding, findings
from hyperopt.app.run_directory import RunDirectory
from hyperopt.core.statuses import Status

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def drawn() -> None:
    """Ask for real figures, which take a second."""


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures empty, except in tests that ask for them."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("hyperopt.app.report.command.svgs", lambda *_: "<svg></svg>")
        monkeypatch.setattr("hyperopt.app.report.command.png", lambda *_: b"")


def make(path: Path, seed: int, losses: list[float], lr: float = 0.1, **changes: Any) -> Path:
    """Leave a run of ``len(losses)`` steps as ``run.py`` would."""
    path.mkdir(parents=True)
    config = {
        "name": changes.get("name", "toy"),
        "seed": seed,
        "task": {"dataset": {"seed": seed, "rows": 8}},
        "dataset": {"seed": seed, "rows": 8},
        "optimizer": {"lr": lr, "_target_": changes.get("target", "torch.optim.SGD")},
        "trainer": {"monitor": "val/loss", "mode": "min"},
    }
    OmegaConf.save(OmegaConf.create(config), path / "config.yaml")
    cost = {"hypergrad/error_estimate": 1e-3 * lr, "hypergrad/is_bound": 0.0}
    rows = [
        {"step": k, "val/loss": loss, **cost, "cost/vjps": 20 * (k + 1), "cost/evaluations": 10 * (k + 1)}
        for k, loss in enumerate(losses)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    best = {"step": losses.index(min(losses)), "metrics": {"val/loss": min(losses)}}
    summary = {"status": changes.get("status", "completed"), "reason": "trainer.max_steps", "metrics": rows[-1], "best": best}
    (path / "summary.json").write_text(json.dumps({**summary, "seconds": 2.0}))
    if "overrides" in changes:
        (path / "job.json").write_text(json.dumps({"number": int(path.name), "overrides": changes["overrides"]}))
    return path


def sweep(root: Path) -> Path:
    for number, (lr, seed) in enumerate((lr, seed) for lr in (0.1, 0.5) for seed in (0, 1, 2)):
        overrides = [f"optimizer.lr={lr}", f"seed={seed}"]
        make(root / str(number), seed, [2.0 + seed, 1.0 + seed * lr], lr, overrides=overrides)
    return root


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_seeds_are_one_group_with_the_statistics_of_its_best_evaluations(tmp_path: Path) -> None:
    groups = group(find([sweep(tmp_path)])[0])
    assert [(each.settings, len(each.runs)) for each in groups] == [({"optimizer.lr": 0.1}, 3), ({"optimizer.lr": 0.5}, 3)]
    found = spread(groups[1].values("val/loss"), min)  # 1, 1.5, 2
    assert (found.count, found.mean, found.deviation, found.best) == (3, 1.5, 0.5, 1.0)
    curve = band_of(groups[1], "val/loss")
    assert (curve.steps, curve.means, curve.widths) == ([0, 1], [3.0, 1.5], [1.0, 0.5])


def test_without_overrides_the_configs_tell_the_groups_apart(tmp_path: Path) -> None:
    make(tmp_path / "a", 0, [1.0])
    make(tmp_path / "b", 1, [1.0], target="torch.optim.Adam")
    make(tmp_path / "c", 2, [1.0], target="torch.optim.Adam")
    groups = group(find([tmp_path])[0])
    assert [(each.label, len(each.runs)) for each in groups] == [("optimizer=SGD", 1), ("optimizer=Adam", 2)]


def test_a_data_seed_that_was_set_by_itself_makes_a_group(tmp_path: Path) -> None:
    make(tmp_path / "0", 0, [1.0], overrides=["seed=0", "dataset.seed=0"])
    make(tmp_path / "1", 1, [1.0], overrides=["seed=1", "dataset.seed=1"])
    assert [each.label for each in group(find([tmp_path])[0])] == ["dataset.seed=0", "dataset.seed=1"]


def test_only_runs_that_ended_count_and_others_are_shown(tmp_path: Path) -> None:
    make(tmp_path / "a", 0, [1.0])
    make(tmp_path / "b", 1, [5.0], status="running")
    (make(tmp_path / "c", 2, [9.0]) / "FAILED").write_text("Traceback")
    [only] = group(find([tmp_path])[0])
    assert only.values("val/loss") == [1.0] and only.statuses == "1 completed, 1 failed, 1 killed"
    with RunDirectory(tmp_path / "b").locked():
        assert "1 completed, 1 failed, 1 running" in report([tmp_path], tmp_path / "out")


def test_one_value_has_no_deviation_and_none_has_nothing() -> None:
    assert spread([2.0], max).mean == 2.0 and math.isnan(spread([2.0], max).deviation)
    assert spread([], max).count == 0 and math.isnan(spread([], max).best)


def test_axes_of_parallel_coordinates() -> None:
    assert heights([1.0, 10.0, 100.0])[0] == pytest.approx([0.0, 0.5, 1.0])  # far apart: logarithmic
    assert heights([0.0, 1.0, 4.0])[0] == [0.0, 0.25, 1.0]
    assert heights(["cg", "neumann", "cg"]) == ([0.0, 1.0, 0.0], [(0.0, "cg"), (1.0, "neumann")])


def test_error_is_held_against_the_cost_of_a_step(tmp_path: Path) -> None:
    [run] = find([make(tmp_path / "a", 0, [3.0, 2.0, 1.0])])[0]
    assert error_point(run.rows) == (30.0, 1e-4, False)
    assert error_and_cost(group([run])) is None  # one point is no comparison
    assert error_point([{"step": 0.0, "hypergrad/error_estimate": math.nan, "cost/vjps": 1.0, "cost/evaluations": 1.0}]) is None


@pytest.mark.usefixtures("drawn")
def test_the_page_and_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hyperopt report", str(sweep(tmp_path / "sweep"))])
    main()
    said, out = capsys.readouterr().out, tmp_path / "sweep" / "report"
    assert said.splitlines()[1].split()[:6] == ["0.1", "1.1", "0.1", "1", "3", "completed"]
    assert {path.name for path in out.iterdir()} == {"index.html", "curves.png", "parallel.png", "error_cost.png"}
    assert text_of(out / "index.html").count("<svg") == 3 * 3  # three figures, each for three widths
    report([tmp_path / "sweep"], out)  # its own page is not a run, and is replaced
    assert len(find([tmp_path / "sweep"])[0]) == 6


class Tags(HTMLParser):
    """Every tag and attribute of a page, and what is in its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend(attrs)

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and data.strip():
            self.scripts.append(data)


@pytest.mark.usefixtures("drawn")
def test_what_it_shows_is_escaped_and_nothing_is_fetched(tmp_path: Path) -> None:
    make(tmp_path / f"{EVIL.replace('/', '')}", 0, [1.0], name=EVIL)
    make(tmp_path / "1", 1, [1.0], lr=0.2, name='"><img src=x onerror=alert(1)>', overrides=[f"optimizer.lr={EVIL}$"])
    make(tmp_path / "javascript:alert(1)", 1, [2.0], lr=0.3)
    (make(tmp_path / "broken<script>", 1, [1.0]) / "summary.json").write_text("{")
    report([tmp_path], tmp_path / "out")
    page = text_of(tmp_path / "out" / "index.html")
    found = Tags(page)
    assert page.count("&lt;script&gt;alert(1)") >= 3 and "img" not in found.tags
    own = (Path(sys.modules[report.__module__].__file__ or "").with_name("page.js")).read_text()
    assert found.tags.count("script") == 1 and "".join(found.scripts).strip() == own.strip()
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "src"]
    links = [value or "" for name, value in found.attributes if name in ("href", "xlink:href")]
    assert links and all(re.fullmatch(r"#[\w-]+|\./[\w./%~-]+/", value) for value in links)
    assert "default-src 'none'" in page and not re.search(r"https?://(?!www\.w3\.org/)", page)


def test_broken_files_are_named_and_left_out(tmp_path: Path) -> None:
    make(tmp_path / "good", 0, [1.0])
    (make(tmp_path / "json", 1, [1.0]) / "summary.json").write_text('{"status": ')
    (make(tmp_path / "row", 1, [1.0]) / "metrics.jsonl").write_text('{"step": 0}\n[1]\n{"step": 2}\n')
    (make(tmp_path / "yaml", 1, [1.0]) / "config.yaml").write_text("a: [1")
    (make(tmp_path / "bytes", 1, [1.0]) / "config.yaml").write_bytes(b"\xff\xfe\x00")
    (make(tmp_path / "none", 1, [1.0]) / "config.yaml").unlink()
    index = {"jobs": [{"directory": "gone", "overrides": ["seed=7"]}, {"directory": "good"}]}
    (tmp_path / "sweep.json").write_text(json.dumps(index))
    runs, left_out = find([tmp_path])
    assert [run.path.name for run in runs] == ["good"] and len(left_out) == 6
    said = report([tmp_path], tmp_path / "out") + text_of(tmp_path / "out" / "index.html")
    for name in (
        "json/summary.json is not JSON",
        "row/metrics.jsonl, line 2,",
        "yaml/config.yaml is not",
        "bytes/config.yaml is not text",
    ):
        assert said.count(name) == 2
    assert "none/config.yaml: No such file" in said and "['seed=7']) is missing" in said


def test_a_last_row_that_is_being_written_is_not_broken(tmp_path: Path) -> None:
    path = make(tmp_path / "a", 0, [2.0, 1.0])
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "val/lo')
    assert [row["step"] for row in find([path])[0][0].rows] == [0, 1]


def test_a_config_reads_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSPHRASE", "swordfish")
    path = make(tmp_path / "a", 0, [1.0])
    (path / "config.yaml").write_text("name: ${oc.env:PASSPHRASE}\ntrainer: {monitor: val/loss, mode: min}\n")
    report([path], tmp_path / "out")
    assert "swordfish" not in text_of(tmp_path / "out" / "index.html")


@pytest.mark.parametrize("what", ["missing", "empty", "broken", "metric"])
def test_nothing_to_report_on_is_said_in_a_line(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, more = tmp_path / "runs", []
    if what == "empty":
        where.mkdir()
    elif what == "broken":
        (make(where, 0, [1.0]) / "summary.json").write_text("")
    elif what == "metric":
        more = ["--metric", "val/nothing", str(make(where, 0, [1.0]))]
    monkeypatch.setattr(sys, "argv", ["hyperopt report", str(where), *more])
    with pytest.raises(SystemExit) as end:
        main()
    said = {"missing": "there is no directory", "empty": "holds no run", "broken": "none of the runs", "metric": "set --metric"}
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.startswith("hyperopt report: ") and said[what] in error and error.count("\n") == 1
    with pytest.raises(ReportError):
        find([tmp_path / "nothing"])


# Names, commands and what to run next


def told(*directories: Path) -> tuple[str, list[Group], list[Finding]]:
    """The sentence on the best settings, the groups, and what is to be known of the runs."""
    runs, _ = find(directories)
    metric, mode = what_to_compare(runs, None, winners(runs))
    groups = ranked(group(runs), metric, mode)
    return conclusion(groups, metric, mode), groups, findings(runs)


def facts(path: Path, **content: Any) -> None:
    (path / "run.json").write_text(json.dumps(content))


def rows_of(path: Path, *rows: dict[str, Any]) -> None:
    (path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": k, "val/loss": 1.0, **row}) + "\n" for k, row in enumerate(rows))
    )


def test_it_is_named_after_the_study(tmp_path: Path) -> None:
    facts(make(tmp_path / "0", 0, [1.0], name="l2_ridge"), task={"name": "l2", "dataset": "digits"})
    assert "1 completed" in report([tmp_path], tmp_path / "out")
    assert "<title>l2_ridge: l2 on digits</title>" in text_of(tmp_path / "out" / "index.html")
    facts(make(tmp_path / "1", 0, [1.0], name="stn_quadratic"), task={"name": "stn_quadratic"})
    assert find([tmp_path / "1"])[0][0].study == "stn_quadratic"


def test_the_best_settings_and_whether_that_is_decided(tmp_path: Path) -> None:
    said, groups, _ = told(sweep(tmp_path))  # 1.1 +- 0.1 and 1.5 +- 0.5
    assert said.startswith("optimizer.lr=0.1: val/loss 1.1 ± 0.1 over 3 runs") and "not decided" in said
    make(tmp_path / "6", 0, [9.0], 0.9, overrides=["optimizer.lr=0.9", "seed=0"])
    [run] = [run for run in groups[0].runs if run.job == 0]
    assert groups[0].winner("val/loss", "min") is run
    steps = next_steps(groups[0].runs, groups, "val/loss", "min")
    assert [shlex.split(each.command)[:2] for each in steps][-1] == ["hyperopt", "export"]


def test_a_longer_run_is_proposed_where_the_last_step_is_the_best(tmp_path: Path) -> None:
    path = make(tmp_path / "0", 0, [2.0, 1.0], overrides=["optimizer.lr=0.1", "seed=0", "trainer.max_steps=2"])
    (path / "config.yaml").write_text("name: toy\nseed: 0\ntrainer: {monitor: val/loss, mode: min, max_steps: 2}\n")
    _, groups, _ = told(tmp_path)
    commands = [each.command for each in next_steps(groups[0].runs, groups, "val/loss", "min")]
    assert "hyperopt optimizer.lr=0.1 trainer.max_steps=4" in commands
    assert "hyperopt optimizer.lr=0.1 trainer.max_steps=2 -m seed=0,1,2,3,4" in commands


@pytest.mark.parametrize(
    "command", ["rm -rf x", "hyperopt; rm x", "hyperopt 'unclosed", "hyperopt seed=0", "sh -c 'hyperopt optimizer.lr=1'"]
)
def test_a_command_from_elsewhere_starts_no_other_program(tmp_path: Path, command: str) -> None:
    make(tmp_path / "0", 0, [1.0], overrides=["optimizer.lr=$(rm x)", "seed=0; rm x", "hydra.run.dir=/", "resume=auto"])
    best = {"metric": ["val/loss"], "direction": ["minimize"], "runs": [{"directory": "0", "command": command}]}
    (tmp_path / "best.json").write_text(json.dumps(best))
    runs, _ = find([tmp_path])
    assert command_of(runs[0], winners(runs)) == "hyperopt 'optimizer.lr=$(rm x)' 'seed=0; rm x'"


def test_options_that_all_jobs_shared_come_from_best_json(tmp_path: Path) -> None:
    make(tmp_path / "0", 0, [1.0], overrides=["task=kepler", "allow_targets=[mine]"])
    command = "hyperopt 'hydra.searchpath=[pkg://mine.configs]' task=kepler 'allow_targets=[mine]'"
    best = {"metric": ["val/loss"], "direction": ["maximize"], "runs": [{"directory": "0", "command": command}]}
    (tmp_path / "best.json").write_text(json.dumps(best))
    runs, _ = find([tmp_path])
    assert command_of(runs[0], winners(runs)) == command and "copy it only" in warning(command)
    assert warning("hyperopt seed=1") == "" and what_to_compare(runs, None, winners(runs)) == ("val/loss", "max")


# Figures


def test_curves_that_coincide_are_named(tmp_path: Path) -> None:
    for number, losses in enumerate(([3.0, 1.0], [3.0, 1.0], [3.0, 1.001], [3.0, 2.0])):
        make(tmp_path / str(number), 0, losses, 0.1 + number, overrides=[f"optimizer.lr={0.1 + number}"])
    series = series_of(group(find([tmp_path])[0]), "val/loss")
    [(names, apart)] = coinciding(series)
    assert names == ["optimizer.lr=0.1", "optimizer.lr=1.1", "optimizer.lr=2.1"] and apart == pytest.approx(1e-3)
    assert coinciding(series[-1:]) == [] and "differ by at most 0.001" in page_of(tmp_path)
    assert ceiling(series) == math.inf


def test_a_curve_that_diverged_leaves_the_others_apart(tmp_path: Path) -> None:
    for number, losses in enumerate(([3.0, 1.0], [3.0, 2.0], [3.0, 1e18])):
        make(tmp_path / str(number), 0, losses, 0.1 + number, overrides=[f"optimizer.lr={0.1 + number}"])
    series = series_of(group(find([tmp_path])[0]), "val/loss")
    assert ceiling(series) == 300.0 and coinciding(series) == []


def test_columns_without_content_are_left_out(tmp_path: Path) -> None:
    page = page_of(make(tmp_path / "0", 0, [1.0], overrides=["seed=0"]))
    assert "<span>seconds</span>" in page and "<span>solves</span>" not in page and "<span>largest residual</span>" not in page


def page_of(directory: Path) -> str:
    report([directory], directory / "out")
    return text_of(directory / "out" / "index.html")


def test_no_two_named_lines_look_the_same() -> None:
    styles = [style(k) for k in range(NAMED)]
    assert all(sum(a[key] != b[key] for key in a) >= 2 for k, a in enumerate(styles) for b in styles[:k])


def test_a_run_that_stopped_neither_shortens_nor_moves_the_mean_of_its_group(tmp_path: Path) -> None:
    make(tmp_path / "a", 0, [4.0, 2.0, 1.0])
    make(tmp_path / "b", 1, [9.0], status="pruned")
    [only] = series_of(group(find([tmp_path])[0]), "val/loss")
    assert only.band.means == [4.0, 2.0, 1.0] and [each.means for each in only.stopped] == [[9.0]]


def test_lines_with_one_value_lie_side_by_side() -> None:
    assert fanned([0.0, 1.0, 0.0, 0.5], [3.0, 1.0, 2.0, 1.0]) == pytest.approx([0.08, 1.0, -0.08, 0.5])


# Trust


def test_a_loose_bound_is_no_problem(tmp_path: Path) -> None:
    bound = {"hypergrad/norm": 1.0, "hypergrad/error_estimate": 36.0, "hypergrad/is_bound": 1.0}
    rows_of(make(tmp_path / "0", 0, [1.0], overrides=["seed=0"]), bound)
    [found] = [each for each in told(tmp_path)[2] if each.subject == "Certificates"]
    assert found.level == "note" and "36 times its norm" in found.text and "do not rule it out" in found.text
    rows_of(tmp_path / "0", bound, {**bound, "hypergrad/is_bound": 0.0})
    assert [each.level for each in told(tmp_path)[2] if each.subject == "Certificates"] == ["bad"]


def test_every_status_has_words() -> None:
    assert set(STATUSES) == set(Status)
    assert all(bool(change) == status.failed for status, (_, change) in STATUSES.items())


def test_what_failed_is_said_with_what_to_change(tmp_path: Path) -> None:
    solved = {
        "inner/status": 0,
        "adjoint/status": 0,
        "inner/residual": 1e-6,
        "hypergrad/norm": 2.0,
        "hypergrad/error_estimate": 1e-3,
    }
    rows_of(make(tmp_path / "0", 0, [1.0], overrides=["seed=0"]), solved, solved)
    rows_of(
        make(tmp_path / "1", 1, [1.0], overrides=["seed=1"]),
        {**solved, "inner/status": 2, "adjoint/fallbacks": 1},
        {**solved, "hypergrad/error_estimate": 0.5, "inner/residual": None},
    )
    found = {(each.subject, each.level): each for each in told(tmp_path)[2]}
    assert found["The inner solves", "bad"].text == "1 of 4 did not meet their tolerance (max_steps)."
    assert "raise max_steps" in found["The inner solves", "bad"].advice
    for key in (("The inner solves", "bad"), ("Certificates", "bad"), ("Fallbacks", "note"), ("Residuals", "bad")):
        assert [run.job for run in found[key].runs] == [1]
    assert "0.05 % of its norm in the median and at most 25 % of its norm" in found["Certificates", "bad"].text
    assert found["The adjoint solves", "good"].text == "All 4 of them met their tolerance."
    said = report([tmp_path], tmp_path / "out")
    assert "problem: The inner solves: 1 of 4 did not meet their" in said and "What to change: raise max_steps" in said


def test_failed_killed_and_pruned_runs_are_told_apart(tmp_path: Path) -> None:
    overrides = {"a": ["optimizer.lr=0.1"], "b": ["optimizer.lr=1e308"], "c": ["optimizer.lr=0.2"], "d": ["optimizer.lr=0.3"]}
    statuses = {"a": "completed", "b": "failed", "c": "pruned", "d": "running"}
    for number, name in enumerate(overrides):
        make(tmp_path / str(number), 0, [2.0, 1.0], 0.1 + number, status=statuses[name], overrides=overrides[name])
    found = {each.subject: each for each in told(tmp_path)[2]}
    assert found["Statuses"].text.startswith("1 of 4 runs ran to the end")
    assert "optimizer.lr=1e308" in found["Failed"].advice and [run.job for run in found["Failed"].runs] == [1]
    assert found["Pruned"].level == "note" and found["Killed"].level == "bad" and "resume=auto" in found["Killed"].advice


def test_equal_runs_with_equal_or_other_numbers_and_lost_rows(tmp_path: Path) -> None:
    for name, losses in (("a", [2.0, 1.0]), ("b", [2.0, 1.0])):
        make(tmp_path / "same" / name, 0, losses)
        make(tmp_path / "other" / name, 0, [*losses, 0.5 if name == "a" else 0.6])
    path = tmp_path / "same" / "b" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lost_rows": [[1, 1], "x"]}))
    facts(tmp_path / "same" / "a", resumed=[{"after_steps": 1}])
    same = [each.text for each in told(tmp_path / "same")[2] if each.subject == "Replays"]
    assert same[0].startswith("1 run was stopped and continued") and same[1] == "The rows of step 1 are lost."
    assert "2 runs repeat the config and seed of another, and its numbers to the last bit." in same
    assert "gave different numbers" in " ".join(each.text for each in told(tmp_path / "other")[2])


def test_hyperparameters_that_never_moved_are_a_problem(tmp_path: Path) -> None:
    rows_of(make(tmp_path / "0", 0, [1.0]), *[{"hypergrad/norm": 0.0, "stn/warming": 1.0}] * 2)
    [found] = [each for each in told(tmp_path)[2] if each.subject == "Hyperparameters"]
    assert found.level == "bad" and "stn.warmup" in found.advice


def test_facts_of_any_kind_are_read(tmp_path: Path) -> None:
    for number, content in enumerate(
        ({"git": 5, "task": [], "argv": 3}, {"resumed": 5, "versions": {"torch": {}}}, {"task": {"name": {}}})
    ):
        facts(make(tmp_path / str(number), number, [1.0], overrides=["seed=0"], status="killed"), **content)
    (tmp_path / "best.json").write_text('{"metric": [{}], "direction": [5], "runs": [3, {"directory": []}]}')
    (tmp_path / "0" / "check.json").write_text('{"passed": "no"}')
    assert "3 killed" in report([tmp_path], tmp_path / "out")


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """
const frame = document.querySelector("iframe"), page = frame.contentDocument, texts = [];
const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode, parent = node.parentElement;
  if (!node.data.trim() || parent.closest("title, script, style") || !parent.checkVisibility()) continue;
  const range = page.createRange();
  range.selectNodeContents(node);
  for (const box of range.getClientRects())
    texts.push({ text: node.data.trim().slice(0, 60), box: [box.left, box.top, box.right, box.bottom],
      drawn: !!parent.closest("svg"), table: !!parent.closest("table"), size: box.height });
}
const sorts = page.querySelector("table.sorts th button");
const column = () => [...page.querySelectorAll("table.sorts tbody")][0].innerText;
const before = sorts && column();
if (sorts) { sorts.click(); sorts.click(); }
const after = sorts && column();
const input = page.querySelector(".filter input");
if (input) { input.value = "optimizer.lr=5 nothing-has-this"; input.dispatchEvent(new Event("input")); }
const shown = [...page.querySelectorAll("table.sorts tbody tr")].filter((row) => row.checkVisibility()).length;
document.body.append(Object.assign(document.createElement("pre"), { id: "found", textContent: JSON.stringify({ texts,
  width: page.documentElement.scrollWidth,
  figure: Math.max(...[...page.querySelectorAll("figure svg")].map((each) => each.getBoundingClientRect().width)),
  sorted: before !== after, filtered: input ? shown : -1 }) }));
"""


def rendered(page: Path, width: int, work: Path) -> dict[str, Any]:
    """What Chromium makes of a page at a width: each visible piece of text with its box, and whether tables sort and filter."""
    frame = html.escape(text_of(page))
    style = f"width:{width}px;height:900px;border:0"
    (work / "frame.html").write_text(
        f'<!doctype html><meta charset="utf-8"><body><iframe style="{style}" srcdoc="{frame}"></iframe>'
        f'<script>document.querySelector("iframe").addEventListener("load", () => {{{MEASURE}}})</script>'
    )
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command = [str(CHROMIUM), *flags, f"--user-data-dir={work / 'profile'}"]
    address = (work / "frame.html").as_uri()
    done = subprocess.run(
        [*command, "--virtual-time-budget=5000", "--dump-dom", address], capture_output=True, text=True, timeout=300
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def overlapping(texts: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes share more than a pixel in both directions; the heads of tables stay over their rows."""
    found = []
    for k, one in enumerate(texts):
        for other in texts[:k]:
            (a, b, c, d), (e, f, g, h) = one["box"], other["box"]
            if (
                min(c, g) - max(a, e) > 1
                and min(d, h) - max(b, f) > 0.3 * min(d - b, h - f)
                and not (one["table"] and other["table"])
            ):
                found.append((one["text"], other["text"]))
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_no_text_lies_over_another_at_the_widths_of_a_phone_and_a_desk(tmp_path: Path) -> None:
    names = ["solver=anderson", "solver=newton_krylov", "solver=a_name_that_is_quite_long_as_names_of_ones_own_are"]
    for number in range(24):
        lr = 0.001 * 1.6 ** (number % 12)
        overrides = [
            f"optimizer.lr={lr}",
            names[number % 3],
            f"task.some.long_key_of_a_setting={number % 5}",
            f"seed={number % 2}",
        ]
        status = ("completed", "completed", "pruned", "failed")[number % 4]
        make(
            tmp_path / str(number),
            number % 2,
            [3.0 + lr, 1.0 + lr, 0.5 + lr * number],
            lr,
            overrides=overrides,
            status=status,
            target=names[number % 3],
        )
    report([tmp_path], tmp_path / "out")
    for width in (390, 1400):
        found = rendered(tmp_path / "out" / "index.html", width, tmp_path)
        drawn = [each for each in found["texts"] if each["drawn"]]
        assert len(drawn) > 40 and overlapping(found["texts"]) == []
        assert min(each["size"] for each in drawn) >= 12  # heights of lines
        assert found["width"] <= width and found["figure"] >= 0.9 * min(width, 1340)
        assert found["sorted"] and found["filtered"] < 60
        assert overlapping([*drawn, {**drawn[0], "text": "the same again"}])


def test_torch_stays_out() -> None:
    code = "import sys, hyperopt.app.report.command; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
