"""``load_exported`` reads an export as a model that predicts, with its hyperparameters and its card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hyperopt.app.building import Built, build, build_task
from hyperopt.app.config import ConfigError, plain_config
from hyperopt.app.export.file import ExportError, read
from hyperopt.app.repro import resolve_precision
from hyperopt.app.resolvers import register
from hyperopt.core.random import drawing
from hyperopt.core.text import one_line
from hyperopt.data.reading import UnreadableError, parse_yaml
from hyperopt.tasks.scores import classes

NEW = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.randperm, torch.eye),
    *(torch.arange, torch.linspace, torch.empty_strided),
    *(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full),
}
"""Functions that make a tensor of a given size."""


class Bounded(TorchFunctionMode):
    """Limits the memory of new tensors in a block, so that a few bytes of settings cannot ask for all of it.

    The size of a new tensor is found by the same call on the device ``meta``, before any memory is taken.

    Args:
        tensors: the tensors that will be loaded into the new ones; the limit grows with them.
        numbers: how many entries may be created whatever the tensors are.
        calls: how many tensors may be created whatever the tensors are.
    """

    def __init__(self, tensors: Iterable[Tensor], numbers: int = 1_000_000, calls: int = 1000) -> None:
        """Start with nothing created."""
        super().__init__()
        sizes = [tensor.numel() for tensor in tensors]
        self.held, self.numbers, self.calls = sum(sizes), numbers + 20 * sum(sizes), calls + 50 * len(sizes)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Make one call, unless its result is too large."""
        given = dict(kwargs or {})
        if func in NEW:
            sketch = {name: value for name, value in given.items() if name not in ("generator", "out", "pin_memory")}
            self.numbers -= func(*args, **{**sketch, "device": "meta"}).numel()
            self.calls -= 1
            if self.numbers < 0 or self.calls < 0:
                raise ExportError(
                    f"its settings ask for far more numbers than its tensors have ({self.held}), and nothing was built"
                )
        return func(*args, **given)


@dataclass(frozen=True)
class Exported:
    """A model from an export.

    Attributes:
        module: the model in eval mode, from rows to outputs; an ordinary module.
        hyperparameters: their values by name; the model's parameters if these are the hyperparameters.
        card: task, dataset with its checksums, metrics, certificate, config and versions, as plain data.
    """

    module: nn.Module
    hyperparameters: dict[str, Tensor]
    card: dict[str, Any]

    def prepare(self, raw: Any) -> Tensor:
        """Return raw inputs as the model takes them: ``(raw / largest - mean) / std``, flattened. shape: (n, features).

        Args:
            raw: numbers as in the dataset (pixels from 0 to 255 for images, 0 to 16 for digits). shape: (n, *shape)

        Raises:
            ExportError: the inputs have another shape, or the rows of the dataset are not made by scaling.
        """
        shape, scaling = tuple(self.card["input"]["shape"]), self.card["input"]["scaling"]
        if scaling is None:
            raise ExportError(
                f"rows of {self.card['dataset']['name']} are not made by scaling; give module the dataset's own rows"
            )
        like = next(self.module.parameters())
        x = torch.as_tensor(raw).to(like)
        if x.shape[1:] != shape and x.shape[1:].numel() != torch.Size(shape).numel():
            raise ExportError(f"inputs have shape {tuple(x.shape)}, but the model takes (n, {', '.join(map(str, shape))})")
        largest, mean, std = (
            x.new_tensor(scaling[name]).view(-1, *[1] * (len(shape) - 1)) for name in ("largest", "mean", "std")
        )
        return ((x.view(-1, *shape) / largest - mean) / std).flatten(1)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Any:
        """Return the class of each row, or the outputs if there are no classes. shape of x: (n, features)."""
        out = self.module(x)
        return classes(out) if self.card["classes"] else out


def load_exported(path: str | Path, *, allow_targets: Sequence[str] = ()) -> Exported:
    """Read what ``hyperopt export`` wrote.

    No code of the file is run. Its config may name registered settings of this package, with plain values. Only
    ``allow_targets`` allows more; nothing in the file can. Only what the model needs is built.

    Args:
        path: ``model.pt`` or ``model.safetensors``.
        allow_targets: packages of yours that hold the task, the cell or the network.

    Returns:
        ``Exported``: ``module`` from rows to outputs, ``hyperparameters`` by name, and the ``card``.

    Raises:
        ExportError: there is no such file, it is not an export, or this version cannot build its config.

    Example:
        >>> import hyperopt
        >>> try:
        ...     model = hyperopt.load_exported("no/such/model.pt")
        ... except Exception as error:  # with a file, model.predict(model.prepare(images)) are its outputs
        ...     print(type(error).__name__)
        ExportError
    """
    path = Path(path)
    tensors, card = read(path)
    try:
        config = plain_config(parse_yaml(card["config"], "its config"), "its config")
        task = build_task(config, NOT_OF_THE_MODEL, allow_targets)
        found: dict[str, dict[str, Tensor]] = {"model": {}, "hyperparameters": {}}
        for name, tensor in tensors.items():
            kind, _, own = name.partition(".")
            found[kind][own] = tensor
        dtype, shape = resolve_precision(card["precision"]), tuple(card["input"]["shape"])
        with drawing(torch.Generator().manual_seed(0)), Bounded(tensors.values()):  # initial values, all of which are replaced
            module = task.predictor(shape, card["classes"], found["hyperparameters"])
        module.to(dtype).load_state_dict(found["model"])
    except Exception as error:  # a config that no run wrote can cause any kind of error
        by = card["versions"].get("hyperopt-bilevel")
        raise ExportError(f"{path}, written by version {by}, cannot be built here: {explained(error)}") from error
    module.eval()
    return Exported(module, found["hyperparameters"] or dict(module.named_parameters()), card)


NOT_OF_THE_MODEL = ("dataset", "augment", "inner", "stn")
"""Settings of tasks that a prediction does not need; they are not built."""


def explained(error: Exception) -> str:
    """Return the message of an error of a config in one line, with its class unless the message is meant for users."""
    text = one_line(error, 400)
    return text if isinstance(error, ConfigError | ExportError | UnreadableError) else f"{type(error).__name__}: {text}"


def built_from(cfg: Any, allow_targets: Sequence[str], *, download: bool = False) -> Built:
    """Build what the resolved config of a run describes, on the CPU, whatever the run was started for.

    Args:
        cfg: config of a run, which may come from elsewhere.
        allow_targets: packages that it may name; those that the config itself allows do not count.
        download: whether a missing dataset may be fetched; the setting in the config does not count.

    Raises:
        ConfigError: see ``build``.
    """
    register()
    here = {"ckpt_path": None, "mode": "train", "resume": "never", "device": "cpu", "compile": False, "threads": None}
    whole = OmegaConf.merge(cfg, here, {"allow_targets": list(allow_targets)})
    for key, value in {"dataset.download": download, "task.dataset.download": download, "task.workers": 0}.items():
        if OmegaConf.select(whole, key) is not None:
            OmegaConf.update(whole, key, value)
    assert isinstance(whole, DictConfig)
    return build(whole)
