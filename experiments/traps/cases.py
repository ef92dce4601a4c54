"""The traps, each written once and put to every library through the same interface, by number."""

from __future__ import annotations

from collections.abc import Callable

import backward_cases
import forward_cases
from protocol import Library, Measured

CASES: dict[int, Callable[[Library], Measured]] = {
    1: backward_cases.double_backward,
    2: backward_cases.failed_backward,
    3: backward_cases.linear_solvers,
    4: backward_cases.several_backwards,
    5: forward_cases.one_bad_row,
    6: forward_cases.damped,
    7: forward_cases.anderson_scale,
    8: backward_cases.adjoint_tolerance,
    9: forward_cases.whole_batch,
    10: backward_cases.one_step,
    11: forward_cases.batch_statistics,
    12: forward_cases.no_contraction,
    13: backward_cases.stale_jacobian,
    14: backward_cases.autocast,
    15: forward_cases.odd_shapes,
    16: forward_cases.misspelt_options,
    17: forward_cases.distributed,
}
