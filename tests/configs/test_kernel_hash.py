"""The kernel hash ignores comments, docstrings and names of locals, and depends on everything else."""

import pytest

from tritonattn.configs.kernel_hash import PACKAGE, SOURCES, hash_sources, kernel_hash

SOURCE = '''
"""A module."""
import triton.language as tl
SCALE = 2.0


def kernel(ptr, n, BLOCK: tl.constexpr):
    """A kernel."""
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(0, n):
        total += tl.exp2(tl.load(ptr + i) * SCALE)  # base 2
    return total
'''


def digest(text):
    return hash_sources({"a.py": text})


@pytest.mark.parametrize("old, new", [
    ('"""A kernel."""', '"""Another text."""'), ('    """A kernel."""\n', ""), ("  # base 2", "  # something else"),
    ('"""A module."""', ""),
    ("total", "acc"), ("ptr", "pointer"), ("tl.range(0, n)", "tl.range(\n        0, n)"), ("for i in", "for step in"),
], ids=str)
def test_comments_docstrings_layout_and_local_names_do_not_change_the_hash(old, new):
    edited = SOURCE.replace(old, new).replace("ptr + i" if "step" in new else "", "ptr + step" if "step" in new else "")
    assert edited != SOURCE and digest(edited) == digest(SOURCE)


@pytest.mark.parametrize("old, new", [
    ("exp2", "exp"), ("SCALE = 2.0", "SCALE = 2.5"), ("total +=", "total -="), ("ptr + i", "ptr + n"), ("(0, n)", "(1, n)"),
    ("BLOCK: tl.constexpr", "BLOCK"), ("def kernel", "def other"), ("* SCALE", ""), ("SCALE", "FACTOR"),
], ids=str)
def test_operations_constants_and_global_names_change_the_hash(old, new):
    edited = SOURCE.replace(old, new)
    assert edited != SOURCE and digest(edited) != digest(SOURCE)


def test_exchanged_locals_change_the_hash():
    assert digest("def f(a, b):\n return a - b") == digest("def f(x, y):\n return x - y")
    assert digest("def f(a, b):\n return a - b") != digest("def f(a, b):\n return b - a")
    assert digest("def f(a):\n return a") != digest("def f(a):\n return b")


@pytest.mark.parametrize("code", [
    "def f(a, b):\n def g(a):\n  def h(c):\n   return a - c\n  return h\n return g, b",
    "def f(a, b):\n return lambda a: lambda c: a - c, b",
], ids=["functions", "lambdas"])
def test_a_shadowed_name_hides_no_exchange(code):
    assert digest(code) != digest(code.replace("a - c", "c - a"))


def test_every_pattern_matches_files_and_the_hash_covers_all_of_them():
    paths = [path for pattern in SOURCES for path in PACKAGE.glob(pattern)]
    names = {path.relative_to(PACKAGE).as_posix() for path in paths}
    assert {"kernels/forward.py", "kernels/backward.py", "kernels/tile.py", "runtime/launch.py"} < names
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in paths}
    assert kernel_hash() == hash_sources(sources)
    for name in names - {"kernels/__init__.py"}:
        assert hash_sources(sources | {name: sources[name] + "\nx = 1\n"}) != kernel_hash(), name
