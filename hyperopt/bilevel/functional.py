"""``Functional``: an ``nn.Module`` as a function of its parameters, without a copy of any of them.

A call in training mode updates running statistics, as calling the module does. The library calls a loss once for each training
step; if it evaluates a loss again, or only measures something, it restores the statistics (``hyperopt.core.replay``). A module
with batch normalisation therefore has the same statistics after training as in an ordinary training loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hyperopt.core.purity import lazy_names
from hyperopt.core.text import described


class Functional:
    """Calls a module at other values of its parameters: ``functional(w, x)``.

    Args:
        module: the module. Its parameters that require grad are the weights ``w``; the others are constants. It keeps its own
            train or evaluation mode. Move it to its device and dtype first.
        without: parameters that require grad but are not weights, such as hyperparameters inside the module.

    Attributes:
        w: ``{name: parameter}``, detached tensors that share the memory of the module's parameters.

    Raises:
        ValueError: no parameter requires grad, a lazy module has not been called yet, or a module was made by ``torch.jit`` or is
            wrapped in ``DataParallel``; or, at a call, a parameter has other memory than ``w`` since the module was changed.

    Example:
        >>> import torch, hyperopt
        >>> module = torch.nn.Linear(2, 1)
        >>> model = hyperopt.Functional(module)
        >>> zeros = {name: torch.zeros_like(p) for name, p in model.w.items()}
        >>> model(zeros, torch.ones(1, 2)), torch.equal(model(model.w, torch.ones(1, 2)), module(torch.ones(1, 2)))
        (tensor([[0.]]), True)
    """

    def __init__(self, module: nn.Module, without: Iterable[Tensor] = ()) -> None:
        if isinstance(module, torch.jit.ScriptModule) or any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
            raise ValueError(
                f"{type(module).__name__} was made by torch.jit, so it cannot be called at other parameters: give the "
                "module that it was made from"
            )
        if isinstance(module, nn.DataParallel):  # torch.func.functional_call refuses it at the first call
            raise ValueError("the module is wrapped in DataParallel, whose copies have parameters of their own: give its .module")
        if lazy := lazy_names(module):
            raise ValueError(
                f"{', '.join(lazy)} of {type(module).__name__} have no size yet: call the module once on a batch first"
            )
        self.module = module
        others = set(map(id, without))
        weights = {name: p for name, p in module.named_parameters() if p.requires_grad and id(p) not in others}
        self.w: dict[str, Tensor] = {name: p.detach() for name, p in weights.items()}
        if not self.w:
            raise ValueError(f"no parameter of {type(module).__name__} requires grad: there is nothing to train")

    def __repr__(self) -> str:
        return described(self, module=type(self.module), w=self.w)

    def __call__(self, w: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return ``module(*args, **kwargs)`` at the parameters ``w``."""
        self._refuse_moved()
        return functional_call(self.module, w, args, kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Let the weights of a copy share the memory of the copied module."""
        vars(self).update(state)
        own = dict(self.module.named_parameters())
        self.w = {name: own.get(name, leaf).detach() for name, leaf in self.w.items()}

    def _refuse_moved(self) -> None:
        """Refuse a module of which a parameter no longer shares the memory of ``w``: training would not reach it.

        Raises:
            ValueError: the message names the parameter.
        """
        if torch.compiler.is_compiling():  # a compiler cannot trace addresses
            return
        with torch._C.DisableTorchFunction():  # a mode around the loss may replace the parameters
            moved = next((name for name, leaf in self.w.items() if self._moved(name, leaf)), None)
        if moved is not None:
            raise ValueError(
                f"the parameter {moved} of {type(self.module).__name__} is no longer the one that this Functional trains: it was "
                "replaced or moved since (by load_state_dict(assign=True), .to(...), .data = ... or a new nn.Parameter). Make "
                "the Functional, and the Bilevel on its w, after such changes, or copy values in place: parameter.copy_(...)"
            )

    def _moved(self, name: str, leaf: Tensor) -> bool:
        """Whether the module's parameter does not have the memory of ``leaf``."""
        *path, last = name.split(".")
        owner: Any = self.module
        for key in path:
            owner = owner._modules.get(key) if isinstance(owner, nn.Module) else None
        own = owner._parameters.get(last) if isinstance(owner, nn.Module) else None
        # A plain tensor is there while functional_call calls the module.
        return own.data_ptr() != leaf.data_ptr() if isinstance(own, nn.Parameter) else own is None

    @torch.no_grad()
    def refresh(self, w: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        """Run one more forward pass at ``w``, which updates the module's running statistics."""
        self._refuse_moved()
        functional_call(self.module, w, args, kwargs)
