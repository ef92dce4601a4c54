"""What a checkpoint knows of the rows of ``metrics.jsonl``: few marks, and a small loss for a small damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyperopt.app.files import AppendFile
from hyperopt.app.rows import Mark, add_mark, check_position, check_rows, spans


def written(path: Path, count: int) -> dict[str, object]:
    """Write rows as a run does, and return the position after them."""
    file, marks = AppendFile(path), [[0, 0, 0]]
    for step in range(count):
        file.write(f'{{"step": {step}, "val/loss": {step**0.5}}}\n'.encode())
        add_mark(marks, file.size, file.checksum, step + 1)
    file.close()
    end: Mark = [file.size, file.checksum, count]
    position = {"rows": file.size, "events": {}, "wall": 0.0, "marks": [*(mark for mark in marks if mark[0] < end[0]), end]}
    check_position(position)
    return position


@pytest.mark.parametrize("count", [1, 30, 70, 5000])
def test_of_a_long_run_a_small_part_is_lost(tmp_path: Path, count: int) -> None:
    path = tmp_path / "metrics.jsonl"
    position = written(path, count)
    assert isinstance(position["marks"], list) and len(position["marks"]) <= 66
    assert not check_rows(path, position, count).lost
    data = bytearray(path.read_bytes())
    for at in (0, len(data) // 2, len(data) - 2):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        found = check_rows(path, position, count)
        [[first, last]] = found.lost
        kept = [int(line[9:].split(b",")[0]) for line in found.content(path).splitlines()]
        assert kept == [step for step in range(count) if not first <= step <= last]
        assert last - first < max(count / 10, 1)
        path.write_bytes(found.content(path))  # and once more, had the run been killed before its next checkpoint
        assert check_rows(path, position, count).lost == found.lost
        size, _, step = found.marks[-1]
        assert not check_rows(path, {"rows": size, "marks": [*found.marks]}, step).lost
        path.write_bytes(data)


def test_marks_that_are_none_are_refused() -> None:
    good = {"rows": 8, "events": {}, "wall": 0.0, "marks": [[0, 0, 0], [8, 1, 1]]}
    check_position(good)
    for marks in (
        [[8, 1, 1]],
        [[0, 0, 0], [9, 1, 1]],
        [[0, 0, 5], [8, 1, 1]],
        [[0, 0, 0], [0, 0, 0], [8, 1, 1]],
        [[0, 0]],
        "x",
        [[0, -1, 0]],
    ):
        with pytest.raises(ValueError, match=r"position\.marks"):
            check_position({**good, "marks": marks})


def test_steps_in_words() -> None:
    assert spans([[3, 3], [7, 9]]) == "step 3, steps 7 to 9"
