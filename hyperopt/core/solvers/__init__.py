"""Forward solvers: how the fixed point ``w = phi(w)`` is found."""
