"""Checks that the text of a matplotlib figure is legible: inside the figure and not overlapping, after the layout."""

import itertools

from matplotlib.text import Text


def texts(figure):
    """Return all visible text of a figure."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def boxes(figure):
    """Return {text: bounding box} of the drawn texts, after the layout."""
    figure.draw_without_rendering()
    drawn = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        ticks = [(axes.get_xlim(), label, label.get_position()[0]) for label in axes.get_xticklabels()]
        ticks += [(axes.get_ylim(), label, label.get_position()[1]) for label in axes.get_yticklabels()]
        # a locator also has ticks beyond the ends, which are not drawn
        drawn += [label for ends, label, position in ticks if min(ends) <= position <= max(ends)]
        drawn += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
    return {text: text.get_window_extent() for text in drawn if text.get_text() and text.get_visible()}


def assert_legible(figure, rotated=False):
    """Assert that no text leaves the figure or overlaps another.

    rotated: exempt rotated labels from the overlap check, because their bounding boxes are larger than the labels.
    """
    drawn = boxes(figure)
    for text, box in drawn.items():
        inside = 0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0 and box.y1 <= figure.bbox.y1
        assert inside, f"{text.get_text()!r} leaves the figure"
    checked = [(text, box) for text, box in drawn.items() if not rotated or text.get_rotation() in (0, 90)]
    for (text, box), (other, other_box) in itertools.combinations(checked, 2):
        assert not box.overlaps(other_box), f"{text.get_text()!r} overlaps {other.get_text()!r}"
