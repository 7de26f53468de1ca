"""A digest of the kernels' code, which identifies the kernels that a shipped table or a tuned config was made for.

    source -> syntax tree without docstrings and names of locals -> SHA-256 -> 12 hexadecimal digits

Comments, layout, docstrings and the names of parameters and local variables do not change it. Every operation,
constant and name of a function, field or module does.
"""

import ast
import functools
import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# the device code, and the arguments and options with which it is compiled
SOURCES = ("kernels/*.py", "runtime/launch.py")


@functools.cache
def kernel_hash() -> str:
    """Return the digest of this package's kernels: twelve hexadecimal digits."""
    paths = [path for pattern in SOURCES for path in sorted(PACKAGE.glob(pattern))]
    assert len(paths) > len(SOURCES), f"kernel_hash: expected files for {SOURCES}, got {paths}"
    return hash_sources({path.relative_to(PACKAGE).as_posix(): path.read_text() for path in paths})


def hash_sources(sources: dict[str, str]) -> str:
    """Return the digest of these files, {name: text}."""
    digest = hashlib.sha256()
    for name, text in sorted(sources.items()):
        digest.update(f"{name}\0{_dump(_Canonical().visit(ast.parse(text)))}\0".encode())
    return digest.hexdigest()[:12]


def _dump(node) -> str:
    """Return a tree as text without empty fields, which differ between versions of Python (as ast.dump does)."""
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, getattr(node, name, None)) for name in node._fields if name != "ctx")
    return f"{type(node).__name__}({','.join(f'{name}={_dump(value)}' for name, value in fields if value not in (None, []))})"


class _Canonical(ast.NodeTransformer):
    """Drop docstrings, and number the parameters and locals of each function in the order in which they appear."""

    def __init__(self, numbers=None, count=0):
        self._numbers, self._count = numbers or {}, count

    def _inside(self, prefix, names):
        """Return the transformer inside a function with these names of its own. A name of an outer function is shadowed."""
        own = {name: f"{prefix}{i}" for i, name in enumerate(dict.fromkeys(names), self._count)}
        return _Canonical(self._numbers | own, self._count + len(own))

    def visit_FunctionDef(self, node):
        inside = self._inside("v", _bound_names(node))
        node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
        node.args, node.returns = inside.visit(node.args), None
        node.body = [inside.visit(statement) for statement in _without_docstring(node.body)]
        return node

    def visit_Lambda(self, node):
        inside = self._inside("w", [argument.arg for argument in _arguments(node)])
        node.args, node.body = inside.visit(node.args), inside.visit(node.body)
        return node

    def visit_Module(self, node):
        node.body = [self.visit(statement) for statement in _without_docstring(node.body)]
        return node

    visit_ClassDef = visit_Module

    def visit_arg(self, node):
        node.arg = self._numbers.get(node.arg, node.arg)
        return self.generic_visit(node)

    def visit_Name(self, node):
        node.id = self._numbers.get(node.id, node.id)
        return node


def _arguments(node):
    arguments = node.args
    variadic = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *variadic]


def _bound_names(function):
    """Yield the parameters, and every name that the function assigns, in order of appearance."""
    yield from (argument.arg for argument in _arguments(function))
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _without_docstring(body):
    first = body[0] if body else None
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return (body[1:] if is_docstring else body) or [ast.Pass()]
