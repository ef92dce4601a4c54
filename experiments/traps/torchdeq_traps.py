"""torchdeq, put to the traps: ``get_deq(ift=True)``, its implicit differentiation, with its own solver names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from protocol import Answer, Wish, main, try_trap
from torch_library import TorchLibrary
from torchdeq import get_deq


class TorchDEQ(TorchLibrary):
    """``gradient`` names the backward: ``ift`` (an autograd Function) or ``hook_ift`` (a hook)."""

    name = "torchdeq"
    packages = ("torchdeq", "torch")
    tolerance = "f_tol"

    def __init__(self, backward: str = "ift") -> None:
        """The implicit differentiation by an autograd Function, as its documentation recommends."""
        super().__init__()
        self.backward = backward

    def solve(self, phi: Callable[..., Any], w0: Any, params: tuple[Any, ...], wish: Wish) -> Answer:
        """Relative stopping; rows are its batch. A state of several tensors is given as a tuple."""
        if wish.defaults:
            options: dict[str, Any] = {}
        else:
            name = {"anderson": "anderson", "newton": "broyden"}.get(wish.method, "fixed_point_iter")
            options = {
                self.backward: True,
                "f_solver": name,
                "f_tol": wish.tol,
                "f_max_iter": wish.max_steps,
                "f_stop_mode": "rel",
            }
            if wish.adjoint_tol is not None:
                options |= {"b_tol": wish.adjoint_tol, "b_max_iter": wish.adjoint_steps, "b_stop_mode": "rel"}
        deq = get_deq(**options)
        backward: list[Any] = []

        def call(*w: Any) -> Any:
            return phi(w[0] if isinstance(w0, torch.Tensor) else w, *params)

        kwargs = {} if wish.damping == 1.0 else {"solver_kwargs": {"tau": wish.damping}}
        out, info = deq(call, w0, backward_writer=backward.append, **kwargs)

        def said() -> str:
            parts = [("info", info, options.get("f_tol", 1e-3)), *(("backward_writer", x, wish.adjoint_tol) for x in backward)]
            mode = "rel_lowest" if options else "abs_lowest"
            return "; ".join(
                f"{where} shows a residual of {float(x[mode].max()):.1e}"
                for where, x, tol in parts
                if tol is not None and not float(x[mode].max()) <= tol
            )

        return Answer(out[-1], said)

    def contraction(self, phi: Callable[..., Any], w0: Any) -> float:
        """``sradius_mode``."""
        torch.manual_seed(0)
        deq = get_deq(f_solver="fixed_point_iter", f_tol=1e-9, f_max_iter=400)
        deq.eval()
        return float(deq(phi, w0, sradius_mode=True)[1]["sradius"])

    def entry(self, **options: Any) -> None:
        """Of ``get_deq``."""
        get_deq(ift=True, **options)(lambda z: 0.5 * z + 1.0, torch.zeros(2, 3))

    def config_changed(self) -> bool:
        """A dictionary of settings with one keyword beside it."""
        config = {"f_tol": 1e-3}
        get_deq(config, f_max_iter=7)
        return config != {"f_tol": 1e-3}

    def remark(self, number: int) -> str:
        """Where another documented setting gives something else."""
        if number == 2:
            return "the default says nothing: only a caller who passes backward_writer sees the residual"
        if number == 10:
            found = f"with ift=True the gradient's error is {self._implicit_error():.1e}"
            return f"the default is documented (grad=1: a one-step gradient); {found}"
        if number == 4 and self.backward == "ift":
            from cases import CASES
            from traps import TRAPS

            found = try_trap(TorchDEQ("hook_ift"), TRAPS[3], CASES[4])
            return f"with hook_ift=True, documented as less stable: {found.verdict}, {found.numbers or found.reason or found.did}"
        return ""

    def _implicit_error(self) -> float:
        """Trap 10's gradient with ``ift=True``, the rest at the defaults."""
        import problems as p
        from maps import cubic

        t = self.array(p.T).requires_grad_()
        out, _ = get_deq(ift=True)(lambda w: cubic(self)(w, t), self.array(p.ones(2, 3)))
        (out[-1] ** 3 / 3).sum().backward()
        return p.error(t.grad, p.CUBIC_GRADIENT)


if __name__ == "__main__":
    main(TorchDEQ())
