"""Would the suite notice? python -m tests.mutation [--only FILE] [--sample N --seed S] [--list]

A mutant is the package with one small change in a kernel: `<` for `<=`, `-` for `+`, a number plus one, a condition
negated, a cast dropped. In a process of its own each meets the checks of CHECKS, mostly float64 cases of `cases` under
the memory guard, until one fails; what survives is printed, to be judged. Exit code 1 under a score of 95 %.
"""

import argparse
import ast
import collections
import copy
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton defines its own device functions

import pytest  # noqa: F401  imported once, here; what is mutated is imported in the children alone
import torch
import torch.utils.flop_counter
import triton.runtime.interpreter  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 30  # seconds that a mutant has
SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd,
}


def changes(node):
    """(node, its replacement) for every small change made here."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            yield node, _with(node, ops=[SWAPS[type(op)]()])
        case ast.BinOp(op=ast.BitAnd()):
            yield from ((node, side) for side in (node.left, node.right))
        case ast.BinOp() | ast.AugAssign() if type(node.op) in SWAPS:
            yield node, _with(node, op=SWAPS[type(node.op)]())
        case ast.BoolOp(values=[left, right]):
            yield from ((node, side) for side in (left, right))
        case ast.UnaryOp(op=ast.USub()):
            yield node, node.operand
        case ast.Constant(value=bool()):
            yield node, ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield node, ast.Constant(node.value + 1)
        case ast.Call(func=ast.Name("float"), args=[ast.Constant(value=text)]):
            yield node, ast.parse("float('inf')" if text == "-inf" else "float('-inf')", mode="eval").body
        case ast.Call(func=ast.Attribute(attr="maximum" | "minimum" as name)):
            other = {"maximum": "minimum", "minimum": "maximum"}[name]
            yield node, _with(node, func=_with(node.func, attr=other))
        case ast.Call(func=ast.Attribute(attr="where"), args=[_, *sides]):
            yield from ((node, side) for side in sides)
        case ast.Call(func=ast.Attribute(attr="cast"), args=[x, _]) | ast.Call(func=ast.Attribute(attr="to", value=x)):
            yield node, x
        case (ast.If(test=test) | ast.IfExp(test=test)) if not isinstance(test, ast.Compare):
            yield test, ast.UnaryOp(ast.Not(), test)


def _with(node, **fields):
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


class Mutant(NamedTuple):
    file: str
    function: str
    line: int
    before: str  # the lines of the change
    after: str
    source: str  # of the whole file

    def __str__(self):
        return f"{self.file}:{self.line} {self.function}: `{self.before}` -> `{self.after}`"


def mutants(path):
    """Every mutant of the device functions of a file."""
    source = path.read_text()
    for function in ast.parse(source).body:
        if any("triton" in ast.unparse(decorator) for decorator in getattr(function, "decorator_list", ())):
            for node in (node for statement in function.body for node in ast.walk(statement)):
                for old, new in changes(node):
                    yield _mutant(path.name, function.name, source, old, new)


def _mutant(file, function, source, old, new):
    lines = source.encode().splitlines(keepends=True)  # ast counts columns in bytes
    first, last = old.lineno - 1, old.end_lineno - 1
    text = ast.unparse(new)
    if not isinstance(new, ast.Constant | ast.Name | ast.Call | ast.Compare | ast.AugAssign):
        text = f"({text})"
    changed = lines[first][:old.col_offset] + text.encode() + lines[last][old.end_col_offset:]
    before, after = (x.decode().strip() for x in (b"".join(lines[first:last + 1]), changed))
    whole = b"".join([*lines[:first], changed, *lines[last + 1:]]).decode()
    return Mutant(file, function, old.lineno, before, after, whole)


def in_float64(tiles, **case):
    from tests.helpers import cases

    cases.check(cases.Case(**case), torch.float64, torch.device("cpu"), tiles=cases.Config(*tiles))


def same(tensors, tolerance=1e-9, **options):
    """Assert that o, lse and the gradients are the reference's."""
    from tests.helpers import cases

    ours, expected = (cases.results(function, *tensors, **options) for function in (cases.attention, cases.reference.attention))
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=1e-9)


def row_by_row(q, k, v, *, window, align, return_lse):
    """The definition from the keys that each row sees and no others: a nan among the rest cannot take part."""
    from tests.helpers import cases

    seen, group = cases.reference.visible(q.shape[2], k.shape[2], window=window, align=align), q.shape[1] // k.shape[1]
    o, lse = [], []
    for head, i in itertools.product(range(q.shape[1]), range(q.shape[2])):
        s = k[0, head // group, seen[i]] @ q[0, head, i] * q.shape[-1] ** -0.5
        o.append(s.softmax(0) @ v[0, head // group, seen[i]])
        lse.append(s.logsumexp(0))
    return torch.stack(o).view(*q.shape[:3], -1), torch.stack(lse).view(q.shape[:3])


def spoiled(where, dtype=torch.float64, **case):
    """Tensors of a case with a nan or infinities in those named, from the row `where` has; each in another head."""
    from tests.helpers import cases

    q, k, v, do, _ = tensors = cases.Case(**case).tensors(dtype, "cpu")
    v.abs_()  # so that an infinity in do makes dP one infinity, and dP - delta a nan however delta is summed
    for i, (name, x) in enumerate({"k": k, "v": v, "q": q, "do": do}.items()):
        if name in where:
            rows = x[0, i % x.shape[1], where[name]:]
            rows[0, -1] = torch.nan if name in "kq" else torch.inf
            if name == "v":
                rows[1, 0], rows[0, 1], rows[1, 1] = -torch.inf, torch.inf, -torch.inf
    return tensors


def not_finite(tiles, window, where, align="top_left", dtype=torch.float64, **case):
    """A nan or infinity reaches exactly what sees it."""
    from tests.helpers import cases

    tensors, options = spoiled(where, dtype, **case), {"window": window, "align": align}
    with cases.config.pinned(cases.Config(*tiles)):
        ours = cases.results(cases.attention, *tensors, **options)
    expected = cases.results(row_by_row, *(x.double() for x in tensors), **options)
    tolerance = 1e-9 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance, equal_nan=True, check_dtype=False)


def one_gradient():
    """One gradient alone, where a nan is looked for and found: in dk or dv, not in both."""
    from tests.helpers import cases

    *inputs, do, dlse = spoiled({"q": 8, "do": 8}, n_q=24, n_k=24, heads=2, kv_heads=2, d=40)
    options = {"window": (None, 0), "align": "top_left"}
    exact = cases.results(row_by_row, *inputs, do, dlse, **options)[2:]
    for x, expected in zip(inputs, exact):
        x.requires_grad_()
        with cases.config.pinned(cases.Config(32, 16)):
            alone, = torch.autograd.grad(cases.attention(*inputs, **options, return_lse=True), x, (do, dlse))
        x.requires_grad_(False)
        torch.testing.assert_close(alone, expected, atol=1e-9, rtol=1e-9, equal_nan=True)


def shifted():
    """Scores around -1e4: a key past the end, whose score would be 0, drowns all others."""
    from tests.helpers import cases

    q, k, v, do, dlse = cases.Case(n_q=37, n_k=37).tensors(torch.float64, "cpu")
    q[..., 0], k[..., 0] = 1, -1e4 * 4
    with cases.config.pinned(cases.TILES):
        same((q, k, v, do, dlse), tolerance=1e-6)


def batches():
    """Three batch dimensions, none of which continues another in every tensor."""
    from tests.helpers import cases

    q, k, v, do, dlse = cases.Case(batch=(2, 2, 2), n_q=5, n_k=5).tensors(torch.float64, "cpu")
    q = q.permute(2, 1, 0, 3, 4, 5).contiguous().permute(2, 1, 0, 3, 4, 5)
    same((q, k[:, :1].expand(k.shape), v, do, dlse))


def precise(**case):
    """Uniform data: dS is a small difference, and what rounding takes from o must be given back."""
    from tests.helpers import cases

    q, k, v, do, dlse = cases.Case(n_q=64, n_k=64, d=64, **case).tensors(torch.bfloat16, "cpu", family="uniform")
    ours = cases.results(cases.attention, q, k, v, do, 0 * dlse)[2].double()
    exact = cases.results(cases.reference.attention, *(x.double() for x in (q, k, v, do, 0 * dlse)))[2]
    assert (ours - exact).norm() < 0.01 * exact.norm()


def far(shape, strides):
    from tests.runtime import test_launch

    test_launch.test_strides_beyond_32_bits(shape, strides, torch.device("cpu"))


def far_cotangent():
    """The statistics of the rows are our own and dense, but for the gradient of lse, which is the caller's."""
    from tests.helpers import cases
    from tests.runtime import test_launch

    q, k, v = (x.requires_grad_() for x in cases.Case().tensors(torch.float32, "cpu")[:3])
    dlse = test_launch.huge((1, 1, 40), (8, 8, 2**26), torch.float32)
    with cases.config.pinned(cases.Config(16, 16)):
        ours = torch.autograd.grad(cases.attention(q, k, v, return_lse=True)[1], (q, k), dlse)
    torch.testing.assert_close(ours, torch.autograd.grad(cases.reference.attention(q, k, v, return_lse=True)[1], (q, k), dlse))


def all_scores_minus_infinity():
    from tests import test_attention

    test_attention.test_a_row_whose_every_score_is_minus_infinity_gives_nothing(torch.device("cpu"))


def widths():
    """The parts of a tile hold it, and no choice of powers of two that a product takes would be narrower."""
    from tritonattn.kernels import tile

    for size in range(1, 513):
        parts = [tile.main_width(size)] + [tile.tail_width(size)] * tile.has_two_parts(size)
        powers = [2**i for i in range(4, 10)]
        assert sum(parts) == min(x for x in (*powers, *map(sum, itertools.combinations(powers, 2))) if x >= size), size
        assert set(parts) <= set(powers) and parts == sorted(parts, reverse=True), size


# the cheap and deadly first: most mutants should meet no more than two
CHECKS = {
    "widths": widths,
    "window": lambda: in_float64((32, 16), n_q=70, n_k=70, window=(7, 4), d=24),
    "gqa, ragged, split": lambda: in_float64((16, 32), n_q=37, n_k=37, heads=2, d=40, dv=72),
    "causal, more keys": lambda: in_float64((16, 16), n_q=37, n_k=70, causal=True, align="bottom_right"),
    "rows that see nothing": lambda: in_float64((16, 32), n_q=70, n_k=37, causal=True, align="bottom_right", scale=-0.7),
    "causal, more queries": lambda: in_float64((16, 16), n_q=70, n_k=33, causal=True, dv=96, scale=0.0),
    "causal, whole tiles": lambda: in_float64((32, 16), n_q=32, n_k=64, causal=True),
    "left": lambda: in_float64((16, 32), n_q=70, n_k=64, window=(9, None), layout="strided"),
    "wide window": lambda: in_float64((16, 16), n_q=80, n_k=80, window=(40, 33), layout="columns"),
    "expanded": lambda: in_float64((16, 64), n_q=20, n_k=20, heads=2, kv_heads=2, layout="expanded"),
    "batches": batches,
    "one gradient": one_gradient,
    "shifted scores": shifted,
    "not finite, causal": lambda: not_finite((32, 16), (None, 0), {"k": 30, "v": 30, "q": 8, "do": 8}, n_q=32, n_k=32,
                                             heads=4, kv_heads=2),
    "not finite, left": lambda: not_finite((32, 16), (12, None), {"k": 3, "v": 3, "q": 28, "do": 28}, n_q=32, n_k=32,
                                           heads=4, kv_heads=4),
    "not finite, window": lambda: not_finite((16, 32), (7, 4), {"k": 6, "v": 6, "q": 29, "do": 29}, n_q=37, n_k=37,
                                             heads=2, kv_heads=2, d=40, dv=72),
    "not finite, bottom right": lambda: not_finite((32, 16), (None, 0), {"k": 36, "v": 36, "q": 6, "do": 6}, "bottom_right",
                                                   n_q=24, n_k=47, heads=4, kv_heads=4),
    "precise": lambda: precise(dv=64),
    "precise, split": lambda: precise(dv=72, causal=True),
    "not finite, bfloat16": lambda: not_finite((32, 16), (None, 0), {"k": 30, "v": 30}, dtype=torch.bfloat16, n_q=32, n_k=32,
                                               heads=2, kv_heads=2, dv=40),
    "scores of minus infinity": all_scores_minus_infinity,
    "far apart, batch": lambda: far((3, 1, 5, 8), (2**30, 8, 8, 1)),
    "far apart, head": lambda: far((1, 3, 5, 8), (8, 2**30, 8, 1)),
    "far apart, tile": lambda: far((1, 1, 40, 8), (8, 8, 2**26, 1)),
    "far apart, row": lambda: far((1, 1, 24, 8), (8, 8, 2**28 + 8, 1)),
    "far apart, column": lambda: far((1, 1, 5, 16), (8, 8, 1, 2**28 + 64)),
    "far apart, cotangent": far_cotangent,
}


# (file, function, the changed line): why nobody could notice
EQUIVALENT = {}


def verdict(folder, quiet=True):
    """In a child: 0 if every check passes, else 1 + the index of the check that failed."""
    signal.alarm(LIMIT)
    if quiet:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    sys.modules.pop("tests")  # from here on that of the folder, as is tritonattn
    sys.path.insert(0, str(folder))
    for i, check in enumerate(CHECKS.values()):
        try:
            from tests import conftest  # noqa: F401  installs the memory guard
            torch.use_deterministic_algorithms(True)
            check()
        except Exception:
            traceback.print_exc()
            return i + 1
    return 0


def killer(mutant, folder):
    """What killed it: a check, "time", "crash"; None if it survived."""
    path = folder / "tritonattn/kernels" / mutant.file
    original = path.read_text()
    path.write_text(mutant.source)
    child = os.fork()
    if child == 0:
        os._exit(verdict(folder))
    status = os.waitpid(child, 0)[1]
    path.write_text(original)
    if os.WIFSIGNALED(status):
        return "time" if os.WTERMSIG(status) == signal.SIGALRM else "crash"
    return [None, *CHECKS][os.WEXITSTATUS(status)]


def equivalent(mutant):
    return EQUIVALENT.get((mutant.file, mutant.function, mutant.after))


def judge(chosen):
    """{mutant: killer} of those chosen, on a copy of the tree: whoever edits it meanwhile changes nothing here."""
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # two mutants written within a second would look the same to Python's cache
    found, start = {}, time.time()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tritonattn", "tests"):
            shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
        if os.fork() == 0:
            os._exit(verdict(folder, quiet=False))
        if os.wait()[1]:
            sys.exit("the checks fail without a mutation, see above")
        for i, mutant in enumerate(chosen, 1):
            found[mutant] = killer(mutant, Path(folder))
            left = (time.time() - start) / i * (len(chosen) - i)
            print(f"\r{i}/{len(chosen)}  survived {list(found.values()).count(None)}  {left / 60:.0f} min left ", end="",
                  file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def report(found):
    """Print the outcome; the score over the mutants that are not known to be equivalent."""
    counted = {mutant: by for mutant, by in found.items() if not equivalent(mutant)}
    for by, count in collections.Counter(by for by in counted.values() if by).most_common():
        print(f"{count:5} killed by {by}")
    for mutant, by in found.items():
        if equivalent(mutant) and by:
            print(f"listed as equivalent, yet killed by {by}: {mutant}")
    survivors = [mutant for mutant, by in counted.items() if not by]
    print(*(f"survived: {mutant}" for mutant in survivors), sep="\n")
    score = 1 - len(survivors) / max(1, len(counted))
    print(f"{len(counted) - len(survivors)} killed ({list(counted.values()).count('time')} of them by the limit of {LIMIT} s), "
          f"{len(survivors)} survived, {len(found) - len(counted)} equivalent: {score:.1%}")
    return score


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="FILE", help="of tritonattn/kernels, such as window.py")
    parser.add_argument("--sample", type=int, metavar="N", help="that many, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    options = parser.parse_args()
    chosen = [mutant for path in sorted((ROOT / "tritonattn/kernels").glob(options.only or "*.py")) for mutant in mutants(path)]
    if options.sample:
        chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))
    if options.list:
        print(*chosen, sep="\n")
        return
    sys.exit(report(judge(chosen)) < 0.95)


if __name__ == "__main__":
    main()
