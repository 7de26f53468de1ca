"""Whether a figure's text can be read: where each text stands once matplotlib has laid the figure out."""

import itertools

from matplotlib.text import Text


def texts(figure):
    """All text in a figure that can be seen."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def boxes(figure):
    """Where each text that is drawn stands, after the layout."""
    figure.draw_without_rendering()
    drawn = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        ticks = [(axes.get_xlim(), label, label.get_position()[0]) for label in axes.get_xticklabels()]
        ticks += [(axes.get_ylim(), label, label.get_position()[1]) for label in axes.get_yticklabels()]
        # a locator has ticks beyond the ends too, which nobody sees
        drawn += [label for ends, label, at in ticks if min(ends) <= at <= max(ends)]
        drawn += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
    return {text: text.get_window_extent() for text in drawn if text.get_text() and text.get_visible()}


def assert_legible(figure, turned=False):
    """No text leaves the figure; none covers another.

    turned: labels that are turned may cover others, since their boxes are larger than they are.
    """
    found = boxes(figure)
    for text, box in found.items():
        inside = 0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0 and box.y1 <= figure.bbox.y1
        assert inside, f"{text.get_text()!r} leaves the figure"
    looked = [(text, box) for text, box in found.items() if not turned or text.get_rotation() in (0, 90)]
    for (one, box), (other, beside) in itertools.combinations(looked, 2):
        assert not box.overlaps(beside), f"{one.get_text()!r} covers {other.get_text()!r}"
