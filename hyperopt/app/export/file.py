"""The file of an export: tensors by name, and one JSON text, the card. No code runs when it is read.

``model.pt`` is written by ``torch.save``, and ``model.safetensors`` by the library of that name, with the card in its
metadata. Both hold ``model.<name>``, the state of the predictor, ``hyperparameters.<name>``, and a checksum of all that and
the card.

``model.pt`` is read by ``hyperopt.app.tensor_files``, and not unpickled by torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hyperopt.app import tensor_files
from hyperopt.app.files import plain, write_bytes
from hyperopt.core.text import one_line
from hyperopt.data.reading import LARGEST, parse_json

FORMAT = 1
KEY = "hyperopt"
MISSING = "format safetensors needs the package safetensors: pip install 'hyperopt-bilevel[export]', or use --format pt"


CHECKSUM = "sha256"
AGAIN = "name the model.pt or model.safetensors that hyperopt export wrote, or write it again"
LONGEST = 10_000
"""Largest number of characters of a text in a card, except the config."""
CARD: dict[str, type] = {
    **dict.fromkeys(("name", "task", "checkpoint", "precision", "config"), str),
    **dict.fromkeys(("step", "classes"), int),
    **dict.fromkeys(("input", "dataset", "hyperparameters", "metrics", "certificate", "versions"), dict),
}
"""The entries that every card has."""


class ExportError(ValueError):
    """There is nothing to export, or a file is not an export; the message, always one line, says what to change."""

    def __init__(self, message: object) -> None:
        """Make the message one line, since parts of it may come from a file."""
        super().__init__(one_line(message))


def write(path: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write tensors by name and a card to a path that ends in ``.pt`` or ``.safetensors``, as a whole or not at all.

    Raises:
        ExportError: safetensors is not installed.
        WriteError: the file could not be written.
    """
    # Copies are needed: for two names of one tensor, or a part of a larger one, one format fails and the other keeps the whole.
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, **plain(card)})
    check_card(card)
    if len(text) > LARGEST:
        raise ExportError(f"the card would have {len(text)} characters, more than {LARGEST}; the run's config is too long")
    found = checksum(own, text)
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import save
        except ImportError as error:
            raise ExportError(MISSING) from error
        data = save(own, metadata={KEY: text, CHECKSUM: found})
    else:
        buffer = io.BytesIO()
        torch.save({"card": text, "tensors": own, CHECKSUM: found}, buffer)
        data = buffer.getvalue()
    write_bytes(path, data)


def checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return a checksum of a card and all tensors, with their names, types and shapes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_card(card: Mapping[str, Any]) -> None:
    """Refuse a card that lacks an entry or contains text that is not plain."""
    for name, kind in CARD.items():
        if not isinstance(card.get(name), kind) or isinstance(card[name], bool):
            raise ExportError(f"the card's {name} is {card.get(name)!r:.60}, and no {kind.__name__}")
    shape, scaling = card["input"].get("shape"), card["input"].get("scaling")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise ExportError(f"the card's input.shape is {shape!r:.60}, and no list of whole numbers above 0")
    names = ("largest", "mean", "std")
    if scaling is not None and not (isinstance(scaling, dict) and all(_numbers(scaling.get(name)) for name in names)):
        raise ExportError(f"the card's input.scaling is {scaling!r:.60}, and no lists of numbers under {', '.join(names)}")
    stack: list[tuple[str, Any]] = [("card", {name: value for name, value in card.items() if name != "config"})]
    while stack:
        key, value = stack.pop()
        texts = [value] if isinstance(value, str) else list(value) if isinstance(value, dict) else []
        for text in texts:
            if isinstance(text, str) and (len(text) > LONGEST or not text.isprintable()):
                raise ExportError(f"{key} has {text!r:.60}, which is not one line of at most {LONGEST} characters")
        if isinstance(value, dict | list | tuple):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            stack += [(f"{key}.{name}", child) for name, child in pairs]


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int | float) and math.isfinite(n) for n in value) and bool(value)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, on the CPU, and the card.

    Raises:
        ExportError: there is no such file, or it is not an export, is damaged, or holds more than tensors and a card.
    """
    if not path.is_file():
        raise ExportError(f"there is no file {path}; name the model.pt or model.safetensors that hyperopt export wrote")
    try:
        with path.open("rb") as file:
            tensors, text, expected = _from_zip(file) if zipfile.is_zipfile(file) else _from_safetensors(path)
        if expected is not None and expected != checksum(tensors, text):  # older versions wrote no checksum
            raise ExportError(f"it is damaged: its checksum is not the one in it; {AGAIN}")
        card = parse_json(text, "its card")
        if card.get("format") != FORMAT:
            raise ExportError(f"it has format {card.get('format')!r:.60}, but this version reads {FORMAT}; {AGAIN}")
        check_card(card)
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from error
    except Exception as error:  # a damaged file can cause any kind of error
        reason = f"{type(error).__name__}: {one_line(error, 200)}"
        raise ExportError(f"{path}: this is not an export, or it is damaged ({reason}); {AGAIN}") from error
    return tensors, card


Content = tuple[dict[str, Tensor], str, str | None]
"""Tensors, the text of the card, and the checksum."""


def _from_zip(file: BinaryIO) -> Content:
    try:
        content = tensor_files.read(file)
    except (tensor_files.UnsafeError, tensor_files.DamagedFileError) as error:
        raise ExportError(f"{error}; {AGAIN}") from error
    tensors, text, expected = content["tensors"], content["card"], content.get(CHECKSUM)
    if not isinstance(text, str) or not all(isinstance(name, str) and type(each) is Tensor for name, each in tensors.items()):
        raise ExportError(f"it holds something other than tensors by name and a card; {AGAIN}")
    places = {each.untyped_storage().data_ptr() for each in tensors.values() if each.numel()}
    if len(places) < sum(each.numel() > 0 for each in tensors.values()) or not all(map(_whole, tensors.values())):
        raise ExportError(f"one of its tensors is not the whole of a storage of its own; {AGAIN}")
    return tensors, text, expected


def _whole(tensor: Tensor) -> bool:
    """Whether a tensor is a plain one that fills its storage."""
    return tensor.is_contiguous() and not tensor.requires_grad and tensor.untyped_storage().nbytes() == tensor.nbytes


def _from_safetensors(path: Path) -> Content:
    if path.suffix != ".safetensors":  # a bare pickle could run code, so nothing of it is read
        raise ExportError(f"this is not an export; {AGAIN}")
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ExportError(MISSING) from error
    # The library checks that the tensors are as long as the file.
    with safe_open(path, framework="pt", device="cpu") as file:
        facts = file.metadata()
        return {name: file.get_tensor(name) for name in file.keys()}, facts[KEY], facts.get(CHECKSUM)
