"""The traps of solves, shapes and settings. Limits are in traps.py, verdicts in protocol.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import problems as p
from maps import cubic, linear, scalar
from protocol import Library, Measured, NotOfferedError, Wish, refusal


def one_bad_row(library: Library) -> Measured:
    """Trap 5."""
    m, clean, g = p.rotations(0.5), p.rows(4, 12), p.rows(4, 12, 0.3)
    spoilt = [list(row) for row in clean]
    spoilt[1][2] = float("nan")
    matrix, weights, w0 = library.array(m), library.array(g), library.array(p.zeros(4, 12))
    keep, put = (0, 2, 3), []
    names = ("relative error of the other states", "relative error of the other gradients")
    worst: dict[str, float] = {}
    want, want_gradient = p.linear_state(m, clean), p.linear_gradient(m, g)

    def call(wish: Wish):
        b = library.array(spoilt)

        def loss(x):
            return (weights * library.solve(linear, w0, (matrix, x), wish).value).sum()

        state = library.numbers(library.solve(linear, w0, (matrix, b), wish).value)
        return state, library.numbers(library.gradient(loss, b))

    missing = None
    for method in ("best", "anderson", "newton"):
        wish = Wish(method, tol=1e-9, adjoint_tol=1e-9, max_steps=300, adjoint_steps=300, batch=True, row_params=(1,))
        try:
            got, said = refusal(lambda wish=wish: call(wish))
        except NotOfferedError as found:
            missing = found
            continue
        put.append(f"{method} {said}".strip())
        if got is None:
            continue
        for key, found, exact in zip(names, got, (want, want_gradient), strict=True):
            size = p.error([found[i] for i in keep], [exact[i] for i in keep])
            worst[key] = max(worst.get(key, 0.0), size)
        put[-1] = f"{method} ({max(worst.values()):.0e} at most)"
    if not put:
        raise missing or NotOfferedError("no batches")
    return Measured(worst, f"linear map of radius 0.5, four rows, a NaN in the data of one; methods: {', '.join(put)}")


def damped(library: Library) -> Measured:
    """Trap 6."""
    m, b = p.rotations(0.9), p.rows(1, 12)
    matrix, shift = library.array(m), library.array(b)
    tol = 1e-4
    wish = Wish(method="picard", tol=tol, max_steps=20000, damping=0.01)
    answer = library.solve(linear, library.array(p.zeros(1, 12)), (matrix, shift), wish)
    w = library.numbers(answer.value)
    image = library.numbers(linear(answer.value, matrix, shift))
    absolute, relative = p.error([x - y for x, y in zip(image[0], w[0], strict=True)], [0.0] * 12), p.error(w, image)
    did = f"radius 0.9, damping 0.01: residual {absolute:.1e} absolute, {relative:.1e} relative at tolerance {tol:.0e}"
    return Measured({"true residual / tolerance": min(absolute, relative) / tol}, did, answer.said())


def anderson_scale(library: Library) -> Measured:
    """Trap 7."""
    counts = []
    for scale in (1e-3, 1.0, 1e3):
        phi, count = library.counted(cubic(library, scale))
        start = library.array(p.elementwise(lambda x, s=scale: s * x, p.ones(2, 3)))
        answer = library.solve(phi, start, (library.array(p.T),), Wish(method="anderson", tol=1e-8, scale=scale, max_steps=200))
        library.numbers(answer.value)
        counts.append(count())
    start = p.elementwise(lambda x: x + 0.3, p.CUBIC_STATE)
    answer, said = refusal(
        lambda: library.solve(
            cubic(library), library.array(start), (library.array(p.T),), Wish(method="anderson", tol=1e-8, max_steps=2)
        )
    )
    numbers = {"most / least evaluations": max(counts) / min(counts)}
    did = f"evaluations at scales 1e-3, 1, 1e3: {counts}"
    if answer is None:
        return Measured(numbers, f"{did}; max_steps=2 {said}")
    moved = p.error(library.numbers(answer.value), p.CUBIC_STATE) / p.error(start, p.CUBIC_STATE)
    return Measured(numbers | {"distance after 2 steps / at the start": moved}, did)


def whole_batch(library: Library) -> Measured:
    """Trap 9."""
    rate = [[0.99]] + [[0.1]] * 7
    data = p.rows(8, 4)

    def phi(w, r, b):
        return r * w + b

    def evaluations(chosen: list[int]) -> int:
        counted, count = library.counted(phi)
        params = library.array([rate[i] for i in chosen]), library.array([data[i] for i in chosen])
        wish = Wish(method="picard", tol=1e-6, max_steps=3000, batch=True, row_params=(0, 1))
        library.numbers(library.solve(counted, library.array(p.zeros(len(chosen), 4)), params, wish).value)
        return count()

    together, apart = evaluations(list(range(8))), sum(evaluations([i]) for i in range(8))
    did = f"{together} in one batch, {apart} one by one, tolerance 1e-6"
    return Measured({"row evaluations / one by one": together / apart}, did)


def batch_statistics(library: Library) -> Measured:
    """Trap 11."""
    layer, updates = library.batch_norm(12)
    m, w0 = library.array(p.rotations(0.5)), library.array(p.zeros(4, 12))

    def phi(w, b):
        return 0.3 * layer(w @ m + b) + b

    def loss(b):
        return library.solve(phi, w0, (b,), Wish(tol=1e-6, adjoint_tol=1e-6, max_steps=100, adjoint_steps=100)).value.sum()

    _, said = refusal(lambda: library.gradient(loss, library.array(p.rows(4, 12))))
    return Measured({"updates": updates()}, "one forward and one backward through 0.3 BatchNorm(w M + b) + b", said)


def no_contraction(library: Library) -> Measured:
    """Trap 12."""
    one = library.array([[1.0]])

    def phi(z, b):
        return 3.0 * z + b

    numbers: dict[str, float] = {}
    notes, said = [], ""

    def call():
        answer = library.solve(phi, one, (one,), Wish(method="picard", tol=1e-6, max_steps=40))
        z = p.flat(library.numbers(answer.value))[0]
        return abs(2 * z + 1) / abs(3 * z + 1), answer.said()

    try:
        found, said = refusal(call)
        if found is not None:
            numbers["relative residual"], said = found
        notes.append("3z + 1 from 1, 40 steps")
    except NotOfferedError as missing:
        notes.append(f"3z + 1: {missing}")
    turn = library.array(p.rotations(0.9, 1, math.pi / 2))
    try:
        estimate = library.contraction(lambda w: w @ turn, library.array([[1.0, 0.5]]))
        numbers["error of the contraction estimate"] = abs(estimate - 0.9)
        notes.append(f"a quarter turn scaled by 0.9 is estimated at {estimate:.3f}")
    except NotOfferedError as missing:
        notes.append(str(missing))
        if not numbers and not said:
            raise NotOfferedError("; ".join(notes)) from missing
    return Measured(numbers, "; ".join(notes), said)


def offered(call: Callable):
    """``refusal``, in which a thing that is not offered is refused."""
    try:
        return refusal(call)
    except NotOfferedError as missing:
        return None, str(missing)


def odd_shapes(library: Library) -> Measured:
    """Trap 15."""
    m = p.rotations(0.5, 1)
    matrix = library.array(m)
    wrong, refused, notes = 0, 0, []

    def check(label: str, w0, phi, value_of, want_value, want_gradient, x):
        nonlocal wrong, refused

        def call():
            value = value_of(library.solve(phi, w0, (library.array(x),), Wish()).value)
            gradient = library.gradient(
                lambda b: sum(v.sum() for v in value_of(library.solve(phi, w0, (b,), Wish()).value)), library.array(x)
            )
            return [library.numbers(v) for v in value], library.numbers(gradient)

        found, said = offered(call)
        if found is None:
            refused += 1
            notes.append(f"{label} refused ({said})")
            return
        worst = max(p.error(found[0], want_value), p.error(found[1], want_gradient))
        if not worst <= 1e-6:
            wrong += 1
            notes.append(f"{label} wrong ({worst:.1e})")

    b = [0.4, -0.3]
    state, slope = p.linear_state(m, [b])[0], p.linear_gradient(m, [[1.0, 1.0]])[0]
    two, three = library.array([0.0, 0.0]), library.array([0.0, 0.0, 0.0])
    # x = x M + b, y = y/2 + 1 + sum(x)/4 in three numbers: y = 2 + sum(x)/2.
    y = [2.0 + sum(state) / 2] * 3
    pair_slope = [2.5 * s for s in slope]

    def coupled(s, x):
        return (s[0] @ matrix + x, 0.5 * s[1] + 1.0 + 0.25 * s[0].sum())

    check("leaves of 2 and 3", (two, three), coupled, lambda s: [s[0], s[1]], [state, y], pair_slope, b)
    check(
        "a dict",
        {"x": two, "y": three},
        lambda s, x: dict(zip(("x", "y"), coupled((s["x"], s["y"]), x), strict=True)),
        lambda s: [s["x"], s["y"]],
        [state, y],
        pair_slope,
        b,
    )
    # A single number is not linear: some quasi-Newton methods stumble over exact steps, which is no matter of shape.
    check("a 0-d state", library.array(1.0), scalar, lambda s: [s], [0.49], [1.4], 0.7)
    wide = library.array(p.zeros(2, 3)).T
    data = p.rows(3, 2)
    grown = p.linear_state(m, data), p.linear_gradient(m, p.ones(3, 2))
    check("a start that is not contiguous", wide, lambda w, x: w @ matrix + x, lambda s: [s], [grown[0]], grown[1], data)
    first = [data[0], p.zeros(1, 2)[0], data[2]]

    def unused():
        """The gradient in a parameter that the map takes and does not use is 0."""
        w0 = library.array(p.zeros(3, 2))

        def loss(both):
            return library.solve(lambda w, x, idle: w @ matrix + x, w0, (both[0], both[1]), Wish()).value.sum()

        return library.gradient(loss, library.array([first, first]))

    got, said = offered(unused)
    if got is None:
        refused += 1
        notes.append(f"an unused parameter refused ({said})")
    elif not p.error(library.numbers(got), [grown[1], p.zeros(3, 2)]) <= 1e-6:
        wrong += 1
        notes.append("an unused parameter wrong")
    empty = library.array(p.rows(3, 2))[:0]

    def no_rows():
        """A batch of no rows gives no rows back."""
        wish = Wish(batch=True, row_params=(0,))

        def solve(x):
            return library.solve(lambda w, x: w @ matrix + x, empty, (x,), wish).value

        return tuple(solve(empty).shape), tuple(library.gradient(lambda x: solve(x).sum(), empty).shape)

    got, said = offered(no_rows)
    if got is None:
        refused += 1
        notes.append(f"an empty batch refused ({said})")
    elif got != ((0, 2), (0, 2)):
        wrong += 1
        notes.append(f"an empty batch gives shapes {got}")
    if refused == 6:
        raise NotOfferedError(notes[0])
    did = f"{6 - wrong - refused} of 6 right, {refused} refused" + "".join(f"; {note}" for note in notes)
    return Measured({"silently wrong, of 6": wrong}, did)


def misspelt_options(library: Library) -> Measured:
    """Trap 16."""
    library.entry(**{library.tolerance: 1e-3})  # rightly spelt, it must be taken
    _, said = refusal(lambda: library.entry(**{MISSPELT[library.tolerance]: 1e-3}))
    numbers = {"misspelt options taken": float(not said)}
    changed = library.config_changed()
    if changed is not None:
        numbers["configurations changed"] = float(changed)
    return Measured(numbers, f"a misspelt tolerance {said or 'was taken'}; configuration: {CHANGED[changed]}")


MISSPELT = {"rtol": "r_tol", "f_tol": "f_tolerence", "tol": "tolerence", "cg_alpha": "cg_alhpa"}
CHANGED = {None: "none that can be changed", True: "changed", False: "left as it was"}


def distributed(library: Library) -> Measured:
    """Trap 17."""
    return Measured({"relative difference of the gradient": library.distributed()}, "one and two ranks")
