"""Omniglot: handwritten characters of many alphabets, twenty drawings of each; what is tested on are other alphabets.

The classes are characters. Those of the training and validation rows come from the first of two sets of the dataset's authors,
those of the test rows from the second, without the alphabets that both have, so that no class is in two splits. ``size=full``
takes ``images_background`` (964 characters of 30 alphabets) and ``images_evaluation`` (659 of 20). ``size=small`` takes the two
small sets of 5 alphabets each, of which both have Greek and Latin: 136 characters to train on and 106 to test on.

Ink is 1. The drawings of 105 x 105 pixels are averaged down to 28 x 28. Those to train on are turned by quarters of a circle
too, which makes further classes of them.

Reference: B. M. Lake, R. Salakhutdinov and J. B. Tenenbaum, Human-level concept learning through probabilistic program
induction, Science 350, 2015.
"""

from __future__ import annotations

import io
import itertools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hyperopt.core.checks import check_choice, check_flag, check_whole
from hyperopt.data.files import Stored, check, obtain, read_file, torchvision
from hyperopt.data.reading import DataError
from hyperopt.data.splits import Rows, Splits

FOLDER, DRAWINGS, PIXELS = "omniglot-py", 20, 28
LARGEST = 10_000  # bytes of a drawing; the largest has 419
PAIRS = {
    "full": ("images_background", "images_evaluation"),
    "small": ("images_background_small1", "images_background_small2"),
}
CHARACTERS = {"full": (964, 659), "small": (136, 106)}  # to train and to test on
ZIPS = {  # md5 of the archives
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
    "images_background_small1": "e704a628b5459e08445c13499850abc4",
    "images_background_small2": "b75a71a51d3b13f821f212756fe481fd",
}
UNPACKED = {  # md5 of the names and bytes of all drawings
    "images_background_small1": "c9a7dfbcb58278a3674cc91fb2c8b6e2",
    "images_background_small2": "94e19b5f2397f8fac4bcaff10bd31194",
}

Drawings = Mapping[str, bytes]  # by "SET/ALPHABET/CHARACTER/FILE.png"


@dataclass(frozen=True)
class Omniglot(Stored):
    """Handwritten characters, 28 x 28, ink 1; see the head of this file.

    Attributes:
        size: ``full`` or ``small``: which pair of sets.
        train: characters to train on (None: all that ``val`` leaves of the first set).
        val: characters of the first set that are kept from training.
        test: characters to test on (None: all of the second set, without the alphabets that both have).
        rotations: whether the training drawings turned by 90, 180 and 270 degrees are classes of their own.
        seed: which characters are drawn for each split, 0 to 2**32 - 1.

    Raises:
        ValueError: a value out of range, or more characters than there are.
    """

    size: str = "full"
    train: int | None = None
    val: int = 20
    test: int | None = None
    rotations: bool = True
    seed: int = 0

    name: ClassVar[str] = "omniglot"
    regression: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check every value against the dataset's size."""
        super().__post_init__()
        check_choice(self, "size", tuple(PAIRS))
        first, second = CHARACTERS[self.size]
        check_whole(self, "val", 1, first - 1, f", which leaves some of the {first} characters to train on")
        if self.train is not None:
            check_whole(self, "train", 1, first - self.val, f", what val={self.val} leaves of {first} characters")
        if self.test is not None:
            check_whole(self, "test", 1, second, ", the characters of the second set")
        check_flag(self, "rotations")
        check_whole(self, "seed", 0, 2**32 - 1)

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Splits:
        """Return the splits, fetching the files if need be; a class is a character, and in one split alone.

        Raises:
            DataError: see ``obtain``.
        """
        sets, checksums = self.drawings()
        first, second = (by_character(each) for each in sets)
        both = {name.partition("/")[0] for name in first} & {name.partition("/")[0] for name in second}
        second = {name: drawings for name, drawings in second.items() if name.partition("/")[0] not in both}
        draw = np.random.RandomState(self.seed)
        names, others = draw.permutation(sorted(first)), draw.permutation(sorted(second))
        chosen = {
            "train": sorted(names[self.val :][: self.train]),
            "val": sorted(names[: self.val]),
            "test": sorted(others[: self.test]),
        }
        classes = 0

        def rows(split: str) -> Rows:
            nonlocal classes
            of = second if split == "test" else first
            numbers = {name: i for i, name in enumerate(sorted(of))}
            ink = torch.stack([read_drawing(data) for name in chosen[split] for data in of[name]]).to(device, dtype)
            index = torch.tensor([DRAWINGS * numbers[name] + i for name in chosen[split] for i in range(len(of[name]))])
            turns = range(4 if self.rotations and split == "train" else 1)
            x = torch.cat([torch.rot90(ink, turn, (1, 2)) for turn in turns])
            y = torch.arange(len(turns) * len(chosen[split])).repeat_interleave(DRAWINGS) + classes
            classes += len(turns) * len(chosen[split])
            return Rows(x.flatten(1), y.to(device), index.repeat(len(turns)).to(device))

        train, val, test = (rows(split) for split in ("train", "val", "test"))
        return Splits(train, val, test, classes, (1, PIXELS, PIXELS), self.name, checksums)

    def drawings(self) -> tuple[list[Drawings], dict[str, str]]:
        """Return the drawings of both sets, and what their bytes were checked by."""
        pair, folder = PAIRS[self.size], Path(self.root).expanduser() / FOLDER
        packed = all((folder / f"{name}.zip").exists() for name in pair)
        if not packed and all(name in UNPACKED and (folder / name).is_dir() for name in pair):
            return [read_unpacked(folder / name) for name in pair], {name: UNPACKED[name] for name in pair}
        checksums = {f"{name}.zip": ZIPS[name] for name in pair}

        def download(datasets: Any, root: str) -> None:
            for file, md5 in checksums.items():
                url = f"{datasets.Omniglot.download_url_prefix}/{file}"
                datasets.utils.download_url(url, str(Path(root, FOLDER)), file, md5)

        files = obtain(self, self.name, [(Path(FOLDER), checksums)], torchvision(FOLDER, download))
        return [read_packed(files[file]) for file in checksums], checksums


def read_packed(data: bytes) -> Drawings:
    """Return the drawings in an archive, whose checksum is right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.endswith(".png")}


def read_unpacked(folder: Path) -> Drawings:
    """Return the drawings of a set that was unpacked.

    Raises:
        DataError: they are not those of the archive.
    """
    most = DRAWINGS * 1000
    paths = list(itertools.islice(folder.glob("*/*/*.png"), most))
    found = {f"{folder.name}/{path.relative_to(folder).as_posix()}": read_file(path, LARGEST) for path in paths}
    try:
        check(b"".join(name.encode() + b"\0" + found[name] for name in sorted(found)), UNPACKED[folder.name], folder)
    except DataError as error:
        raise DataError(f"{error}; it is damaged or not the known set: move it away, or change dataset.root") from error
    return found


def by_character(drawings: Drawings) -> dict[str, list[bytes]]:
    """Return the drawings of each ``ALPHABET/CHARACTER``, in the order of their names."""
    found: dict[str, list[bytes]] = {}
    for name in sorted(drawings):
        _, alphabet, character, _ = name.split("/")
        found.setdefault(f"{alphabet}/{character}", []).append(drawings[name])
    return found


def read_drawing(data: bytes) -> Tensor:
    """Return the ink of a drawing, averaged down. shape: (28, 28), float32."""
    from PIL import Image  # here: only a drawing needs it

    white = np.array(Image.open(io.BytesIO(data)).convert("1"))
    return functional.adaptive_avg_pool2d(torch.from_numpy(~white).float()[None], PIXELS)[0]
