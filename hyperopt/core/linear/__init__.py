"""Linear solvers: how the adjoint system ``(I - J^T) v = g`` is solved."""
