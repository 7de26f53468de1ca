"""Which values of a parametrized test run by default."""

import pytest


def slow(*values):
    """Return parameters for tests that only run with -m slow or -m ""."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def slow_rows(*rows):
    """Return the same for tests with several parameters, a tuple of values in each row."""
    return [pytest.param(*row, marks=pytest.mark.slow) for row in rows]
