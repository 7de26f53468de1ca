"""The common style of all pictures: colors, settings that override the user's, and a headline."""

import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

INK, GREY, PALE = "#14213d", "#6b6b6b", "#e3e3e3"


def rc_params(settings: Mapping[str, object]) -> list:
    """Return a style for matplotlib.style.context: matplotlib's defaults, our common ones, and `settings`."""
    return ["default", {"axes.linewidth": 0.8, "hatch.linewidth": 0.6, **settings}]


def headline(figure: Figure, title: str, below: Sequence[str], large: float = 14, small: float = 10) -> None:
    """Add a title and smaller paragraphs, left-aligned and wrapped to the figure's width; the figure grows by their height.

    large, small: font sizes in points. The figure must have the layout "constrained".
    """
    width, height = figure.get_size_inches()
    # the width of a character and the height of a line, in inches per point: bold title, plain text
    title = textwrap.wrap(title, int(width / (0.0089 * large)))
    lines = [line for paragraph in below for line in textwrap.wrap(paragraph, int(width / (0.0078 * small)))]
    start = 0.14 + 0.0178 * large * len(title)
    taken = start + 0.1 + 0.0195 * small * len(lines)
    figure.set_size_inches(width, height + taken)
    for y, text, style in ((0.1, title, {"fontsize": large, "weight": "bold", "color": INK}),
                           (start, lines, {"fontsize": small, "color": "#333333", "linespacing": 1.3})):
        figure.text(0.1 / width, 1 - y / (height + taken), "\n".join(text), va="top", **style)
    figure.get_layout_engine().set(rect=(0, 0, 1, height / (height + taken)))
