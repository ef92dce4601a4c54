"""Omniglot from made-up archives, unpacked or not: no character is in two splits, and nothing is parsed before its checksum."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hyperopt.data import omniglot
from hyperopt.data.omniglot import Omniglot
from hyperopt.data.reading import DataError

FIRST = {"Balinese": 3, "Greek": 2, "Latin": 1}
SECOND = {"Greek": 2, "Sanskrit": 4, "Tagalog": 3}
NAMES = omniglot.PAIRS["small"]


def drawing(alphabet: str, character: int, number: int) -> np.ndarray:
    """White paper with a square of ink, whose place and size say which drawing it is."""
    paper = np.ones((105, 105), dtype=bool)
    paper[: 5 + number, 10 * character : 10 * character + len(alphabet)] = False
    return paper


def packed(name: str, alphabets: dict[str, int]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(f"{name}/", "")
        for alphabet, characters in alphabets.items():
            for c in range(characters):
                for i in range(20):
                    png = io.BytesIO()
                    Image.fromarray(drawing(alphabet, c, i)).save(png, "png")
                    archive.writestr(f"{name}/{alphabet}/character{c + 1:02}/{c:04}_{i + 1:02}.png", png.getvalue())
    return out.getvalue()


@pytest.fixture(scope="module")
def archives() -> dict[str, bytes]:
    return {name: packed(name, of) for name, of in zip(NAMES, (FIRST, SECOND), strict=True)}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archives: dict[str, bytes]) -> Path:
    """A data directory with both archives, whose checksums are known."""
    folder = tmp_path / "omniglot-py"
    folder.mkdir()
    for name, data in archives.items():
        (folder / f"{name}.zip").write_bytes(data)
        monkeypatch.setitem(omniglot.ZIPS, name, hashlib.md5(data).hexdigest())
        drawings = omniglot.read_packed(data)
        joined = b"".join(key.encode() + b"\0" + drawings[key] for key in sorted(drawings))
        monkeypatch.setitem(omniglot.UNPACKED, name, hashlib.md5(joined).hexdigest())
    monkeypatch.setitem(omniglot.CHARACTERS, "small", (6, 7))
    return tmp_path


def made(root: Path, **settings: Any) -> Omniglot:
    return Omniglot(**{"size": "small", "root": str(root), "val": 2, "download": False, **settings})


def unpack(root: Path) -> None:
    for name in NAMES:
        file = root / "omniglot-py" / f"{name}.zip"
        zipfile.ZipFile(file).extractall(file.parent)
        file.unlink()


def assert_same(one: Any, two: Any) -> None:
    for split in ("train", "val", "test"):
        for part in ("x", "y", "index"):
            assert torch.equal(getattr(getattr(one, split), part), getattr(getattr(two, split), part)), (split, part)


def test_the_splits_share_no_class(root: Path) -> None:
    splits = made(root).load()
    labels = [set(rows.y.tolist()) for rows in (splits.train, splits.val, splits.test)]
    assert [len(each) for each in labels] == [16, 2, 7]  # four turns of 4 characters; 2; those of Sanskrit and Tagalog
    assert sorted(label for each in labels for label in each) == list(range(splits.num_classes)) == list(range(25))
    for rows in (splits.train, splits.val, splits.test):
        assert set(torch.unique(rows.y, return_counts=True)[1].tolist()) == {20} and rows.x.shape[1] == 784
    assert splits.shape == (1, 28, 28) and splits.name == "omniglot"
    fitted, kept = (set((rows.index // 20).tolist()) for rows in (splits.train, splits.val))
    assert fitted | kept == set(range(6)) and not fitted & kept


def test_a_class_is_one_character_and_its_ink_is_what_was_drawn(root: Path) -> None:
    splits = made(root, rotations=False).load(torch.float64)
    assert len(splits.train) == 80
    characters = [(alphabet, c) for alphabet, count in sorted(FIRST.items()) for c in range(count)]
    for rows in (splits.train, splits.val):
        for label in rows.y.unique():
            of = rows.take(rows.y == label)
            (which,) = set((of.index // 20).tolist())
            alphabet, character = characters[which]
            for x, number in zip(of.x, of.index % 20, strict=True):
                ink = torch.from_numpy(~drawing(alphabet, character, int(number))).float()[None]
                wanted = torch.nn.AdaptiveAvgPool2d(28)(ink)
                assert torch.equal(x, wanted.flatten().double())


def test_turned_drawings_are_classes_of_their_own(root: Path) -> None:
    plain, turned = made(root, rotations=False).load().train, made(root).load().train
    assert torch.equal(turned.index, plain.index.repeat(4)) and torch.equal(turned.x[: len(plain)], plain.x)
    assert not set(turned.y[: len(plain)].tolist()) & set(turned.y[len(plain) :].tolist())
    quarter = turned.x[len(plain) : 2 * len(plain)].view(-1, 28, 28)
    assert torch.equal(quarter, torch.rot90(plain.x.view(-1, 28, 28), 1, (1, 2)))


def test_unpacked_files_give_the_same_rows(root: Path) -> None:
    before = made(root).load()
    unpack(root)
    after = made(root).load()
    assert_same(before, after)
    assert set(after.checksums) == set(NAMES)


def test_the_seed_draws_the_characters(root: Path) -> None:
    chosen = {tuple(sorted(set((made(root, seed=seed).load().val.index // 20).tolist()))) for seed in range(6)}
    assert len(chosen) > 1
    assert_same(made(root, seed=3).load(), made(root, seed=3).load())
    few = made(root, train=1, test=2, rotations=False).load()
    assert (len(few.train), len(few.val), len(few.test), few.num_classes) == (20, 40, 40, 5)


def damage(root: Path) -> None:
    file = root / "omniglot-py" / f"{NAMES[0]}.zip"
    file.write_bytes(file.read_bytes()[:-1] + b"x")


def lose_a_drawing(root: Path) -> None:
    unpack(root)
    next((root / "omniglot-py").rglob("*.png")).unlink()


def change_a_drawing(root: Path) -> None:
    unpack(root)
    next((root / "omniglot-py").rglob("*.png")).write_bytes(b"no drawing")


def rename_a_drawing(root: Path) -> None:
    unpack(root)
    path = next((root / "omniglot-py").rglob("*.png"))
    path.rename(path.with_name("9999_99.png"))


@pytest.mark.parametrize("harm", [damage, lose_a_drawing, change_a_drawing, rename_a_drawing])
def test_other_bytes_are_refused_before_they_are_parsed(harm: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harm(root)
    monkeypatch.setattr(omniglot, "read_drawing", None)
    monkeypatch.setattr(omniglot, "read_packed", None)
    with pytest.raises(DataError, match=r"md5 .* expected .*; it is damaged or not the known .*dataset\.root"):
        made(root).load()


def test_where_nothing_is_it_says_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"omniglot: no source has it(.|\n)*images_background\.zip(.|\n)*dataset\.download=false"):
        Omniglot(root=str(tmp_path), download=False).load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "tiny"}, "size='tiny' is not one of full, small; change size"),
        ({"val": 0}, "val=0 must be a whole number from 1 to 963"),
        ({"size": "small", "val": 136}, "val=136 must be a whole number from 1 to 135"),
        ({"size": "small", "train": 117}, "train=117 must be a whole number from 1 to 116, what val=20 leaves of 136"),
        ({"size": "small", "test": 107}, "test=107 must be a whole number from 1 to 106"),
        ({"rotations": 4}, "rotations=4 must be true or false"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"root": ""}, "root='' does not name a file or directory"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Omniglot: {message}"):
        Omniglot(**settings)


def test_the_authors_small_sets(real_root: Any) -> None:
    splits = Omniglot(size="small", root=real_root(*(f"omniglot-py/{name}" for name in NAMES)), download=False).load()
    assert (len(splits.train), len(splits.val), len(splits.test), splits.num_classes) == (4 * 116 * 20, 400, 2120, 590)
    assert 0.05 < float(splits.train.x.mean()) < 0.1 and float(splits.test.x.max()) == 1
