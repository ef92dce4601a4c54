"""A figure of matplotlib as PNG, and as text in the page: drawn once for each width of a screen, so that its texts stay readable.

Matplotlib draws, although it cannot zoom, since it is a dependency already and its pages are 0.1 MB. In the page, plotly 7.1 took
4.8 MB, made links of hostile names and showed no parallel coordinates without WebGL; altair and bokeh took 0.9 and 1.3 MB and
compile text into code, which the page's policy forbids (measured on 2026-11-30). Matplotlib is imported only to draw.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.text import Text

SVG = "http://www.w3.org/2000/svg"
LINK = "http://www.w3.org/1999/xlink"
SPAN = 30.0
"""Positive numbers that differ by more than this factor have a logarithmic axis."""


@dataclass(frozen=True)
class Layout:
    """How a figure is laid out for a width of the screen; its size is in pixels of the page, and so is that of its texts.

    Attributes:
        name: its class in the page.
        width: width of the figure.
        height: height of the figure without its legend.
        font: size of its texts.
        characters: of a line of the legend.
    """

    name: str
    width: float
    height: float
    font: float
    characters: int

    @property
    def wide(self) -> bool:
        """Whether a legend has room beside the axes."""
        return self.name == "wide"

    @property
    def narrow(self) -> bool:
        """Whether the screen is that of a phone."""
        return self.name == "narrow"


LAYOUTS = (Layout("wide", 1340, 500, 14, 38), Layout("middle", 760, 420, 13, 80), Layout("narrow", 358, 320, 12, 40))


@dataclass
class Drawing:
    """What ``draw`` draws on.

    Attributes:
        figure: the empty figure.
        layout: its layout.
        titles: what the page says of a part under the pointer, by the part's ``gid``.
    """

    figure: Figure
    layout: Layout
    titles: dict[str, str] = field(default_factory=dict)

    def grow(self, pixels: float) -> None:
        """Make the figure higher."""
        self.figure.set_figheight(self.figure.get_figheight() + pixels / 72)

    def name(self, part: Any, title: str) -> None:
        """Show ``title`` where the pointer is over a part."""
        self.titles[f"part-{len(self.titles)}"] = title
        part.set_gid(f"part-{len(self.titles) - 1}")


Draw = Callable[[Drawing], None]


def _drawn(draw: Draw, layout: Layout) -> Drawing:
    from matplotlib.figure import Figure

    drawing = Drawing(Figure(figsize=(layout.width / 72, layout.height / 72), dpi=72, layout="constrained"), layout)
    draw(drawing)
    return drawing


def _style(layout: Layout, salt: str) -> Any:
    import matplotlib as mpl

    given: Any = {
        "text.parse_math": False,  # a $ in a name starts no formula
        "font.size": layout.font,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
    }
    return mpl.rc_context(given)


def png(draw: Draw) -> bytes:
    """Return a figure as PNG, in the layout of a page of text."""
    layout = LAYOUTS[1]
    with _style(layout, ""):
        file = io.BytesIO()
        _drawn(draw, layout).figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def svgs(draw: Draw, name: str, label: str) -> str:
    """Return a figure as elements of a page, of which it shows the one for its width.

    No other figure of the page has the same ``name``. ``label`` says what the figure shows, for readers that do not see it.
    """
    return "\n".join(svg(draw, layout, f"{name}-{layout.name}", label) for layout in LAYOUTS)


def svg(draw: Draw, layout: Layout, salt: str, label: str) -> str:
    """Return a figure as one element of a page; see ``svgs``."""
    with _style(layout, salt):
        drawing = _drawn(draw, layout)
        file = io.BytesIO()
        drawing.figure.savefig(file, format="svg", metadata={"Date": None})
    return _inline(file.getvalue(), layout.name, label, drawing.titles)


def _inline(image: bytes, kind: str, label: str, titles: Mapping[str, str]) -> str:
    """Return matplotlib's SVG as an element of a page: without sizes, metadata and names that nothing refers to."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", LINK)
    root = ElementTree.fromstring(image)
    text = image.decode()
    used = {*re.findall(r"url\(#([\w-]+)\)", text), *re.findall(r'xlink:href="#([\w-]+)"', text)}
    for part in root.iter():
        name = part.get("id")
        if name is not None and name in titles:
            title = ElementTree.Element(f"{{{SVG}}}title")
            title.text = titles[name]
            part.insert(0, title)
        if name is not None and name not in used:
            del part.attrib["id"]
    for child in [each for each in root if each.tag == f"{{{SVG}}}metadata"]:
        root.remove(child)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"class": kind, "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def mark(axis: Axis, logarithmic: bool, count: int, whole: bool = False) -> None:
    """Give an axis at most about ``count`` ticks at round numbers, with plain labels; ``whole``: at whole numbers only."""
    from matplotlib import ticker

    if logarithmic:
        low, high = axis.get_view_interval()
        many = high / low < 1e3
        axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if many else (1.0,), numticks=count))
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axis.set_major_locator(ticker.MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=1 if whole else 3))


def round_numbers(low: float, high: float, logarithmic: bool, count: int = 8) -> list[float]:
    """Return about ``count`` round numbers from ``low`` to ``high``, both included, for the labels of an axis."""
    from matplotlib import ticker

    if logarithmic:
        subs = (1.0, 2.0, 5.0) if high / low < 1e2 else (1.0, 3.0) if high / low < 1e4 else (1.0,)
        found = ticker.LogLocator(subs=subs, numticks=count).tick_values(low, high)
    else:
        found = ticker.MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    slack = 1e-9 * (high - low)
    return [float(each) for each in found if low - slack <= each <= high + slack]


def drop_overlapping(drawing: Drawing, texts: Iterable[Text]) -> None:
    """Hide each text of a finished drawing that would lie over an earlier one; the most important ones come first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, space = drawing.figure, 2.0  # pixels between two texts
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    kept = []
    for text in texts:
        box = text.get_window_extent(renderer)
        if any(
            box.x0 < other.x1 + space and other.x0 < box.x1 + space and box.y0 < other.y1 + space and other.y0 < box.y1 + space
            for other in kept
        ):
            text.set_visible(False)
        else:
            kept.append(box)
