"""The report: groups of seeds, its statistics, what it leaves out, and that nothing in it can run or call home."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from hyperopt.app.report.charts import band, error_point, heights
from hyperopt.app.report.command import main, report
from hyperopt.app.report.groups import group, spread
from hyperopt.app.report.read import ReportError, find
from hyperopt.app.run_directory import RunDirectory

EVIL = "<script>alert(1)</script>"


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
    steps, means, low, high = band(groups[1], "val/loss")
    assert (steps, means, low, high) == ([0, 1], [3.0, 1.5], [2.0, 1.0], [4.0, 2.0])


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
    assert error_point([{"step": 0.0, "hypergrad/error_estimate": math.nan, "cost/vjps": 1.0, "cost/evaluations": 1.0}]) is None


def test_the_page_and_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hyperopt report", str(sweep(tmp_path / "sweep"))])
    main()
    said, out = capsys.readouterr().out, tmp_path / "sweep" / "report"
    assert said.splitlines()[1].split()[:6] == ["0.1", "3", "completed", "1.1", "0.1", "1"]
    assert {path.name for path in out.iterdir()} == {"index.html", "curves.png", "parallel.png", "error_cost.png"}
    assert text_of(out / "index.html").count('src="data:image/png;base64,') == 3
    report([tmp_path / "sweep"], out)  # its own page is not a run, and is replaced
    assert len(find([tmp_path / "sweep"])[0]) == 6


class Tags(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend(attrs)


def test_what_it_shows_is_escaped_and_nothing_is_fetched(tmp_path: Path) -> None:
    make(tmp_path / f"{EVIL.replace('/', '')}", 0, [1.0], name=EVIL)
    make(tmp_path / "1", 1, [1.0], lr=0.2, name='"><img src=x onerror=alert(1)>', overrides=[f"optimizer.lr={EVIL}$"])
    (make(tmp_path / "broken<script>", 1, [1.0]) / "summary.json").write_text("{")
    report([tmp_path], tmp_path / "out")
    page = text_of(tmp_path / "out" / "index.html")
    found = Tags(page)
    assert "script" not in found.tags and page.count("&lt;script&gt;alert(1)") >= 3
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "href"]
    assert all((value or "").startswith("data:image/png;base64,") for name, value in found.attributes if name == "src")
    assert "default-src 'none'" in page and not re.search(r"https?://", page)


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


def test_torch_stays_out() -> None:
    code = "import sys, hyperopt.app.report.command; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
