"""``Functional``: an ``nn.Module`` as a function of its parameters, without a copy of any.

Batch normalisation keeps running statistics, which every forward in training mode would move: dozens of times in one training and
one adjoint solve. Here a call leaves them as they are, and ``refresh`` moves them by one forward, where the problem asks for it:
once an outer step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from hyperopt.core.purity import lazy_names


class Functional:
    """Calls a module at other values of its parameters: ``functional(w, x)``.

    Args:
        module: its parameters that require grad are the ``w``; others, and its buffers, stay what they are. Train or evaluation
            mode is the module's own. Move it to its device and dtype first.

    Attributes:
        w: ``{name: parameter}``, detached tensors that share the parameters' memory: what is written into them, the module has.

    Raises:
        ValueError: no parameter requires grad, or a lazy module has not been called yet.

    Example:
        >>> import torch, hyperopt
        >>> model = hyperopt.Functional(torch.nn.Linear(2, 1))
        >>> def inner_loss(w, lam, batch):
        ...     x, y = batch
        ...     return ((model(w, x) - y) ** 2).mean() + lam * sum((p**2).sum() for p in w.values())
    """

    def __init__(self, module: nn.Module) -> None:
        """Take the parameters."""
        if lazy := lazy_names(module):
            raise ValueError(
                f"{', '.join(lazy)} of {type(module).__name__} have no size yet: call the module once on a batch first"
            )
        self.module = module
        self.w: dict[str, Tensor] = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        if not self.w:
            raise ValueError(f"no parameter of {type(module).__name__} requires grad: there is nothing to train")

    def __call__(self, w: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """``module(*args, **kwargs)`` at parameters ``w``; leaves running statistics as they are."""
        return functional_call(self.module, {**w, **self._buffers()}, args, kwargs)

    def _buffers(self) -> dict[str, Tensor]:
        """Copies of the running statistics that this call would change; they are small, and no copy is made elsewhere."""
        moved: dict[str, Tensor] = {}
        for prefix, module in self.module.named_modules():
            if isinstance(module, _NormBase) and module.training and module.track_running_stats:
                for name, buffer in module.named_buffers(prefix=prefix, recurse=False):
                    moved[name] = buffer.clone()
        return moved

    @torch.no_grad()
    def refresh(self, w: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        """One forward at ``w`` that moves the module's running statistics, as training does once a step."""
        functional_call(self.module, w, args, kwargs)
