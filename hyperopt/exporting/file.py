"""The file of an export: tensors by name, and one JSON text, the card. No code runs when it is read.

``model.pt`` is written by ``torch.save`` and read with ``weights_only=True``; ``model.safetensors`` by the library of that name,
the card in its metadata. Both hold ``model.<name>``, the state of the predictor, and ``hyperparameters.<name>``.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperopt.files import plain, write_bytes

FORMAT = 1
KEY = "hyperopt"
MISSING = "format safetensors needs the package safetensors: pip install 'hyperopt-bilevel[export]', or use --format pt"


class ExportError(ValueError):
    """There is nothing to export, or a file is no export; the message says what to change."""


def write(path: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write a file, as a whole or not at all.

    Args:
        path: ends in ``.pt`` or ``.safetensors``.
        tensors: by name.
        card: plain data.

    Raises:
        ExportError: safetensors is not installed.
        WriteError: it could not be written.
    """
    # Copies: two names of one tensor, or a part of a larger one, would be refused by one format and kept whole by the other.
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, **plain(card)})
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import save
        except ImportError as error:
            raise ExportError(MISSING) from error
        data = save(own, metadata={KEY: text})
    else:
        buffer = io.BytesIO()
        torch.save({"card": text, "tensors": own}, buffer)
        data = buffer.getvalue()
    write_bytes(path, data)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, on the CPU, and the card.

    Raises:
        ExportError: no such file, or one that is no export.
    """
    if not path.is_file():
        raise ExportError(f"there is no file {path}; name the model.pt or model.safetensors that hyperopt-export wrote")
    try:
        tensors, text = _from_zip(path) if zipfile.is_zipfile(path) else _from_safetensors(path)
        card = json.loads(text)
        version = card["format"]
    except ExportError:
        raise
    except Exception as error:  # a damaged file makes errors of every kind
        raise ExportError(
            f"{path} is no export, or a damaged one ({type(error).__name__}); write it again by hyperopt-export"
        ) from error
    if version != FORMAT:
        raise ExportError(f"{path} has format {version!r}, but this version reads {FORMAT}; write it again by hyperopt-export")
    return tensors, card


def _from_zip(path: Path) -> tuple[dict[str, Tensor], str]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ExportError(
            f"{path} holds objects other than tensors and plain containers, and was not loaded, since that could run code"
        ) from error
    return content["tensors"], content["card"]


def _from_safetensors(path: Path) -> tuple[dict[str, Tensor], str]:
    if path.suffix != ".safetensors":  # a bare pickle would do as it likes; nothing of it is read
        raise ExportError(f"{path} is no export; name the model.pt or model.safetensors that hyperopt-export wrote")
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ExportError(MISSING) from error
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()[KEY]
