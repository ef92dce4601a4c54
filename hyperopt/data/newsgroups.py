"""20 newsgroups as word counts, through scikit-learn: headers, footers and quotes removed, nothing ever made dense.

The posts are read from ``ROOT/20news-bydate_py3.pkz``, the file that scikit-learn keeps, or fetched there by it. The words are
those of the training and validation posts together; a word that is in the test posts alone is not a feature.

Reference: K. Lang, NewsWeeder: learning to filter netnews, ICML 1995; the division by date is that of J. Rennie.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from hyperopt.data.errors import DataError
from hyperopt.data.files import md5
from hyperopt.data.settings import NewsgroupsSettings
from hyperopt.data.splits import Rows, Splits, draw_rows
from hyperopt.nn.sparse import compressed_rows

FILE = "20news-bydate_py3.pkz"
CHECKSUMS = {"train": "e44f3017b3aafb1e272b5f8aa10dda90", "test": "c5ef221dfd44569ae0c4d8767e25b373"}  # of the posts, as they are


class Newsgroups(NewsgroupsSettings):
    """Posts to 20 newsgroups; settings in ``NewsgroupsSettings``."""

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Splits:
        """Return the splits, ``x`` in compressed rows.

        Args:
            dtype: floating dtype of the features.
            device: where the rows go.

        Raises:
            DataError: no file and no download, or another text than that of the dataset.
        """
        from sklearn.feature_extraction.text import CountVectorizer  # here: seconds to import, and only this dataset needs them
        from sklearn.preprocessing import normalize

        posts = {part: self._posts(part) for part in ("train", "test")}
        vectorizer: Any = CountVectorizer()
        counts = {"train": vectorizer.fit_transform(posts["train"].data), "test": vectorizer.transform(posts["test"].data)}
        rows = draw_rows(self)

        def split(name: str) -> Rows:
            part, at = "test" if name == "test" else "train", rows[name]
            x: Any = normalize(counts[part][at])
            x.sort_indices()
            places = (x.indptr.astype(np.int64), x.indices.astype(np.int64))
            parts = [torch.from_numpy(np.asarray(array)) for array in (*places, x.data)]
            with compressed_rows():
                features = torch.sparse_csr_tensor(*parts, size=x.shape, dtype=dtype, check_invariants=True)
            y = torch.from_numpy(posts[part].target[at].astype(np.int64))
            return Rows(features.to(device), y.to(device), torch.from_numpy(at.astype(np.int64)).to(device))

        shape = (len(vectorizer.vocabulary_),)
        return Splits(split("train"), split("val"), split("test"), 20, shape, "newsgroups", dict(CHECKSUMS))

    def _posts(self, part: str) -> Any:
        """The texts and labels of one part."""
        from sklearn.datasets import fetch_20newsgroups

        root = Path(self.root).expanduser()
        keys: dict[str, Any] = {"data_home": root, "subset": part, "shuffle": False}
        try:
            whole: Any = fetch_20newsgroups(**keys, download_if_missing=self.download)
        except Exception as error:
            raise DataError(
                f"20 newsgroups: there is no {root / FILE}, and "
                f"{f'scikit-learn cannot fetch it: {error}' if self.download else 'dataset.download=false'}. What to do: "
                f"dataset.root=DIR (or HYPEROPT_DATA=DIR) where DIR/{FILE} is scikit-learn's file, or a machine with network"
            ) from error
        got = md5("\0".join(whole.data).encode("utf-8", "surrogatepass"))
        if got != CHECKSUMS[part]:
            raise DataError(f"20 newsgroups: the {part} posts in {root / FILE} have md5 {got}, expected {CHECKSUMS[part]}")
        return fetch_20newsgroups(**keys, remove=("headers", "footers", "quotes"))
