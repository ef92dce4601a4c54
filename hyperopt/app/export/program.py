"""An export as a graph by ``torch.export``, which runs where this package is not installed.

A solve to a tolerance reads numbers to know when to stop, which a graph cannot. A fixed number of Picard steps can be a graph.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch

from hyperopt.app.export.file import ExportError
from hyperopt.app.export.load import Exported
from hyperopt.app.files import write_bytes
from hyperopt.core.adjoints.implicit import Implicit
from hyperopt.core.linear.neumann import Neumann
from hyperopt.core.solvers.picard import Picard
from hyperopt.nn.deq import DEQ
from hyperopt.nn.equilibrium import EquilibriumModel


def write_program(exported: Exported, path: Path, steps: int | None = None) -> Path:
    """Write the model as a program from rows to outputs, for any number of rows; ``torch.export.load`` reads it.

    Args:
        exported: a model; for an equilibrium model, its solver is changed.
        path: a path that ends in ``.pt2``.
        steps: Picard steps of an equilibrium model (None: those of its own solver, which must be ``Picard(rtol=0, atol=0)``).

    Raises:
        ExportError: the model cannot be a graph; the message says what to change.
    """
    module = exported.module
    if isinstance(module, EquilibriumModel):
        _fix_steps(module, steps)
    elif steps is not None:
        raise ExportError(f"--steps={steps} is for an equilibrium model, and this is a {exported.card['task']}; drop --steps")
    layers = [name for name, part in module.named_modules() if isinstance(part, DEQ)]
    if layers:
        raise ExportError(
            f"no program.pt2: {layers[0] or 'the model'} is an implicit layer (DEQ), which solves to a tolerance, outside of any "
            "graph; load model.pt by hyperopt.load_exported instead"
        )
    like = next(module.parameters())
    example = torch.zeros(3, int(torch.Size(exported.card["input"]["shape"]).numel()), dtype=like.dtype)
    # Not strict: the checks of a solve cannot be traced, and running them once is enough.
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("rows")},), strict=False)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    write_bytes(path, buffer.getvalue())
    return path


def _fix_steps(model: EquilibriumModel, steps: int | None) -> None:
    """Make the model take a fixed number of Picard steps."""
    solver = model.solver
    if steps is None and not (isinstance(solver, Picard) and solver.fixed):
        raise ExportError(
            f"no program.pt2: the model solves by {solver!r}, which stops where the numbers say so, and a graph cannot; set "
            "--steps T for exactly T Picard steps (as many as inner/iterations of the run, or more)"
        )
    if steps is not None:
        try:
            model.solver = Picard(0.0, 0.0, max_steps=steps)
        except ValueError as error:
            raise ExportError(f"--steps={steps}: {error}") from error
    model.adjoint = Implicit(Neumann(0.0))  # not part of the graph, but others would refuse to be traced
