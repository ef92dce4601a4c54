"""20 newsgroups as word counts, without headers, footers and quotes; the matrices are always sparse.

The posts are read from ``ROOT/20news-bydate.tar.gz``, the archive of their author, which is fetched if it is missing. A cache
of scikit-learn, ``ROOT/20news-bydate_py3.pkz``, is read too if it has the one known checksum. Such a cache is a pickle with
paths of the machine that made it, so it differs between machines, and scikit-learn's own download, which keeps nothing else,
cannot be used. The words are those of the training and validation posts together; a word that occurs only in test posts is not
a feature.

Reference: K. Lang, NewsWeeder: learning to filter netnews, ICML 1995; the division by date is that of J. Rennie. The same
parts of a post are removed as by scikit-learn's ``fetch_20newsgroups(remove=("headers", "footers", "quotes"))``.
"""

from __future__ import annotations

import io
import pickle
import re
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from hyperopt.core.checks import check_choice
from hyperopt.data.files import FilesDataset, check, obtain, torchvision
from hyperopt.data.sparse import compressed_rows
from hyperopt.data.splits import Rows, Splits, draw_rows

URL = "https://ndownloader.figshare.com/files/5975967"
ARCHIVE, CACHE = "20news-bydate.tar.gz", "20news-bydate_py3.pkz"
CHECKSUMS = {"train": "e44f3017b3aafb1e272b5f8aa10dda90", "test": "c5ef221dfd44569ae0c4d8767e25b373"}  # of the original posts
QUOTE = re.compile(r"writes in|writes:|wrote:|says:|said:|^In article|^Quoted from|^[|>]")

Posts = dict[str, Any]  # for each part, as in scikit-learn: the texts, ``data``, and the numbers of their groups, ``target``


def read_archive(data: bytes) -> Posts:
    """Return the posts of each part, as scikit-learn makes them from the archive, whose checksum was verified."""
    from sklearn.datasets import load_files

    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(folder, filter="data")
        return {part: load_files(str(Path(folder, f"20news-bydate-{part}")), encoding="latin1") for part in CHECKSUMS}


def strip(text: str) -> str:
    """Return a post without its header, its signature (what follows the last blank or dashed line) and quoted lines."""
    _, _, text = text.partition("\n\n")
    lines = text.strip().split("\n")
    last = max((number for number, line in enumerate(lines) if not line.strip().strip("-")), default=0)
    return "\n".join(line for line in (lines[:last] if last else text.split("\n")) if not QUOTE.search(line))


@dataclass(frozen=True)
class Newsgroups(FilesDataset):
    """11,314 training and 7,532 test posts to 20 newsgroups, divided by date, as sparse word counts.

    ``normalize=unit`` scales the counts of a post to length 1; ``standard`` is refused, since the result would not be sparse.
    """

    train: int = 5657
    val: int = 5657

    train_images: ClassVar[int] = 11_314
    test_images: ClassVar[int | None] = 7532
    archive_checksums: ClassVar = {ARCHIVE: "8f1b2514ca22a5ade8fbb9cfa5727df95fa587f4c87b786e15c759fa66d95610"}
    cache_checksums: ClassVar = {CACHE: "38ff3ad44459d11b16f72a67f1d2c58b85527810ad621320a16fd9d5d65fc07a"}
    sources: ClassVar = torchvision("", lambda datasets, root: datasets.utils.download_url(URL, root, ARCHIVE))

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_choice(self, "normalize", ("unit",))

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Splits:
        """Return the splits, with ``x`` in compressed rows; see ``Dataset.load``.

        Raises:
            DataError: there is no file and no download, or the text is not that of the dataset.
        """
        posts = self.posts()
        from sklearn.feature_extraction.text import CountVectorizer  # imported here since it takes seconds
        from sklearn.preprocessing import normalize

        texts = {part: [strip(text) for text in posts[part]["data"]] for part in posts}
        vectorizer: Any = CountVectorizer()
        counts = {"train": vectorizer.fit_transform(texts["train"]), "test": vectorizer.transform(texts["test"])}
        rows = draw_rows(self)

        def split(name: str) -> Rows:
            part, at = "test" if name == "test" else "train", rows[name]
            x: Any = normalize(counts[part][at])
            x.sort_indices()
            places = (x.indptr.astype(np.int64), x.indices.astype(np.int64))
            parts = [torch.from_numpy(np.asarray(array)) for array in (*places, x.data)]
            with compressed_rows():
                features = torch.sparse_csr_tensor(*parts, size=x.shape, dtype=dtype, check_invariants=True)
            y = torch.from_numpy(np.asarray(posts[part]["target"])[at])
            return Rows(features.to(device), y.to(device), torch.from_numpy(at.astype(np.int64)).to(device))

        shape = (len(vectorizer.vocabulary_),)
        return Splits(split("train"), split("val"), split("test"), 20, shape, "newsgroups", dict(CHECKSUMS))

    def posts(self) -> Posts:
        """Return the complete posts of each part."""
        folders = [(Path(), checksums) for checksums in (self.archive_checksums, self.cache_checksums)]
        files = obtain(self, "newsgroups", folders, self.sources)
        posts = read_archive(files[ARCHIVE]) if ARCHIVE in files else pickle.loads(zlib.decompress(files[CACHE]))
        for part, expected in CHECKSUMS.items():
            text = "\0".join(posts[part]["data"]).encode("utf-8", "surrogatepass")
            check(text, expected, f"20 newsgroups: the {part} posts in {self.root}")
        return posts
