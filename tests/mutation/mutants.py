"""Mutants of a kernels file: copies of its source with one small change in a device function each."""

import ast
import collections
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd,
}


class Mutant(NamedTuple):
    """One change. `key` names it by function and text, so that it does not depend on line numbers."""

    file: str
    key: str
    source: str  # of the whole changed file


def mutants(path: Path) -> Iterator[Mutant]:
    """Yield every mutant of the device functions of a file."""
    source, seen = path.read_text(), collections.Counter()
    for function in ast.parse(source).body:
        if any("triton" in ast.unparse(decorator) for decorator in getattr(function, "decorator_list", ())):
            for node in (node for statement in function.body for node in ast.walk(statement)):
                for old, new in changes(node):
                    before, after, changed = _replace(source, old, new)
                    key = f"{path.name} {function.name}: {before} -> {after}"
                    seen[key] += 1
                    yield Mutant(path.name, key if seen[key] == 1 else f"{key} ({seen[key]})", changed)


def changes(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yield (old node, new node) for every small change at this node."""
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


def _replace(source: str, old: ast.AST, new: ast.AST) -> tuple[str, str, str]:
    """Return (changed lines before, after, the whole changed source)."""
    lines = source.encode().splitlines(keepends=True)  # ast counts columns in bytes
    first, last = old.lineno - 1, old.end_lineno - 1
    text = ast.unparse(new)
    if not isinstance(new, ast.Constant | ast.Name | ast.Call | ast.Compare | ast.AugAssign):
        text = f"({text})"
    changed = lines[first][:old.col_offset] + text.encode() + lines[last][old.end_col_offset:]
    before, after = (" ".join(x.decode().split()) for x in (b"".join(lines[first:last + 1]), changed))
    return before, after, b"".join([*lines[:first], changed, *lines[last + 1:]]).decode()
