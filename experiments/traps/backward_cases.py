"""The traps of derivatives and their linear solves. Limits are in traps.py, verdicts in protocol.py."""

from __future__ import annotations

import warnings

import problems as p
from maps import cubic, cubic_loss, linear
from protocol import Library, Measured, NotOfferedError, Wish, brief, refusal


def double_backward(library: Library) -> Measured:
    """Trap 1."""
    loss = cubic_loss(library, Wish())
    got, said = refusal(lambda: library.hvp(loss, library.array(p.T), library.array(p.U)))
    numbers = {} if said else {"relative error of the Hessian-vector product": p.error(got, p.CUBIC_SECOND)}
    return Measured(numbers, "cubic map, E = sum(w^3)/3, tolerances 1e-11, along a fixed direction", said)


def failed_backward(library: Library) -> Measured:
    """Trap 2."""
    m, b, g = p.rotations(0.99), p.rows(1, 12), p.rows(1, 12, 0.3)
    matrix, weights, w0 = library.array(m), library.array(g), library.array(p.zeros(1, 12))
    answers = []

    def loss(x):
        answers.append(library.solve(linear, w0, (matrix, x), Wish(adjoint_steps=3, adjoint_tol=1e-8)))
        return (weights * answers[-1].value).sum()

    got, said = refusal(lambda: library.gradient(loss, library.array(b)))
    if said:
        return Measured({}, "backward solve of 3 steps", said)
    numbers = {"relative error of the gradient": p.error(got, p.linear_gradient(m, g))}
    return Measured(numbers, "rotations of radius 0.99 in 12 dimensions, 3 backward steps", answers[-1].said())


SYSTEMS: list[tuple[str, p.Matrix, list[float], list[float]]] = [
    ("2x = 6", [[2.0]], [6.0], [3.0]),
    ("x/2 = 2", [[0.5]], [2.0], [4.0]),
    ("3x/2 = 3", [[1.5]], [3.0], [2.0]),
    ("three, right-hand side 0", [[1.2, 0.3, 0.0], [0.3, 0.9, 0.1], [0.0, 0.1, 0.8]], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
    ("three", [[1.2, 0.3, 0.0], [0.3, 0.9, 0.1], [0.0, 0.1, 0.8]], [1.5, 1.3, 0.9], [1.0, 1.0, 1.0]),
]


def linear_solvers(library: Library) -> Measured:
    """Trap 3.

    The Neumann series of 2x = 6 does not converge (``I - A`` has radius 1), so it is not put to it.
    """
    worst, said, notes = 0.0, [], []
    for name, solver in library.linear_solvers().items():
        for label, a, b, want in SYSTEMS:
            if "neumann" in name.lower() and label == "2x = 6":
                continue
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                answer, refused = refusal(lambda solver=solver, a=a, b=b: solver(a, b))
            if refused or answer is None:
                said.append(f"{name} on {label} {refused}")
                continue
            error = p.error(answer.value, want)
            if not error <= 1e-6:
                heard = answer.said() or "".join(f"warned: {brief(str(warning.message), 80)}" for warning in caught[:1])
                if heard:
                    said.append(f"{name} on {label} gives {p.flat(answer.value)} for {want}, {heard}")
                    continue
                notes.append(f"{name} on {label} gives {p.flat(answer.value)} for {want}")
            worst = max(worst, error)
    names = ", ".join(library.linear_solvers())
    did = f"{names}; " + ("; ".join(notes) or "all right") + (f"; said to fail: {'; '.join(said)}" if said else "")
    return Measured({"largest error": worst}, did)


def several_backwards(library: Library) -> Measured:
    """Trap 4."""
    m, b = p.rotations(0.5), p.rows(2, 12)
    matrix, w0 = library.array(m), library.array(p.zeros(2, 12))

    def solve(x):
        return library.solve(linear, w0, (matrix, x), Wish()).value

    def one(x):
        w = solve(x)
        return (w * w).sum() / 2

    def two(x):
        return one(x) + one(x + 1.0)

    first = p.linear_state(m, b)
    shifted = p.linear_state(m, p.elementwise(lambda v: v + 1.0, b))
    want = p.linear_gradient(m, p.elementwise(lambda u, v: u + v, first, shifted))
    numbers = {
        "relative error, two solves": p.error(library.gradient(two, library.array(b)), want),
        "relative error, second backward": p.error(library.second_backward(one, library.array(b)), p.linear_gradient(m, first)),
    }
    alive = library.alive(lambda phi: library.solve(phi, w0, (matrix, library.array(b)), Wish()).value, linear)
    if alive is not None:
        numbers["evaluations still alive"] = alive
    did = "two solves and one backward; two backwards of one solve; dropping a result, then collecting garbage"
    return Measured(numbers, did)


def adjoint_tolerance(library: Library) -> Measured:
    """Trap 8."""
    m, b = p.rotations(0.9), p.rows(1, 12)
    matrix, w0 = library.array(m), library.array(p.zeros(1, 12))

    def scaled(factor: float):
        def loss(x):
            w = library.solve(linear, w0, (matrix, x), Wish(adjoint_tol=None, adjoint_steps=None)).value
            return factor * (w * w).sum()

        return [g / factor for g in p.flat(library.numbers(library.gradient(loss, library.array(b))))]

    change = p.error(scaled(1e-6), scaled(1.0))
    return Measured({"relative change of the gradient": change}, "radius 0.9, E = sum(w^2), default adjoint, loss times 1e-6")


def one_step(library: Library) -> Measured:
    """Trap 10."""
    wish, a = Wish(defaults=True), library.array(p.T)
    answer = library.solve(cubic(library), library.array(p.ones(2, 3)), (a,), wish)
    numbers = {
        "relative error of the state": p.error(library.numbers(answer.value), p.CUBIC_STATE),
        "relative error of the gradient": p.error(
            library.numbers(library.gradient(cubic_loss(library, wish), a)), p.CUBIC_GRADIENT
        ),
    }
    return Measured(numbers, "cubic map, every setting at its default", answer.said())


def stale_jacobian(library: Library) -> Measured:
    """Trap 13."""
    wish = Wish(method="newton", tol=1e-2, max_steps=50)
    a = library.array(p.T)
    answer = library.solve(cubic(library), library.array(p.ones(2, 3)), (a,), wish)
    state = p.error(library.numbers(answer.value), p.CUBIC_STATE)
    gradient = p.error(library.numbers(library.gradient(cubic_loss(library, wish), a)), p.CUBIC_GRADIENT)
    did = f"cubic map at tolerance 1e-2: state off by {state:.1e}, gradient by {gradient:.1e}"
    return Measured({"error of the gradient / of the state": gradient / max(state, 1e-9)}, did)


def autocast(library: Library) -> Measured:
    """Trap 14."""
    region = library.autocast()
    m, b, g = p.rotations(0.5), p.rows(2, 12), p.rows(2, 12, 0.3)
    matrix, weights = library.array(m, "float32"), library.array(g, "float32")
    w0 = library.array(p.zeros(2, 12), "float32")
    wish = Wish(method="anderson", tol=1e-2, adjoint_tol=1e-2, max_steps=50, adjoint_steps=50)

    def loss(x):
        try:
            return (weights * library.solve(linear, w0, (matrix, x), wish).value).sum()
        except NotOfferedError:
            return (weights * library.solve(linear, w0, (matrix, x), Wish(tol=1e-2, adjoint_tol=1e-2)).value).sum()

    def call():
        with region:
            return library.gradient(loss, library.array(b, "float32"))

    got, said = refusal(call)
    if got is None:
        return Measured({}, "float32 parameters under bfloat16 autocast", said)
    numbers = {
        "relative error of the gradient": p.error(library.numbers(got), p.linear_gradient(m, g)),
        "bits lost by the gradient": 32 - 8 * got.dtype.itemsize,
    }
    return Measured(numbers, f"Anderson where offered, tolerance 1e-2; the gradient is {got.dtype}")
