"""Functions that a user writes, of scores and of masks, and their registry: torch's ops and tuned configs hold names alone.

    ScoreFunction(function, derivative, payload)  ->  name "module:function,module:derivative#digest"  ->  functions_named(name)
"""

import ast
import hashlib
import importlib
import inspect
import operator
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType

from torch import Tensor

from .gpu import INTERPRETED

OF_MASKS = ("batch", "head", "query", "key", "payload")  # parameters
OF_SCORES = ("score", *OF_MASKS)
_functions: dict[str, tuple] = {}  # of every name: the function, and its derivative or None


@dataclass(frozen=True, eq=False, repr=False)
class ScoreFunction:
    """Changes each score by a function that you write. `attention` takes it as `score_function`.

    `function` is a `triton.jit` function (score, batch, head, query, key, payload) -> score, `derivative` one with the same
    parameters that returns the derivative of the result by the score; a number if it is the same for all. Example:

        @triton.jit
        def distance_penalty(score, batch, head, query, key, payload):
            return score - tl.load(payload + head) * tl.abs(query - key)

        @triton.jit
        def one(score, batch, head, query, key, payload):
            return 1.0

        penalty = tritonattn.ScoreFunction(distance_penalty, one, payload=torch.rand(8, device="cuda"))

    The functions get tiles, and compute each element by itself, with broadcasting. `score` has two dimensions, in float32;
    `query` and `key` hold indices along one of them each, in either order; `batch` and `head` are numbers. Several batch
    dimensions count as one; of packed sequences, `batch` is the sequence, and `query` and `key` count from its start. `payload`
    is the address of the tensor's first element, or None. Indices lie within the problem: a function may read the payload at
    them.

    To mask a pair, return tl.where(..., float("-inf"), ...); adding -inf would let a NaN pass. Whether a pair is masked must
    not depend on its score. No block is skipped for it: use a `window` or `create_block_mask` for that. In float16, keep
    derivatives near 1, and put constant factors into `scale`: gradients of scores may overflow otherwise.

    Args:
        derivative: needed for gradients of queries and keys.
        payload: a contiguous tensor on the device of the queries. It gets no gradient, and does not move with a module: keep it
            as a buffer there, and call `with_payload`.

    Raises:
        TypeError: a function is not one of `triton.jit` with six parameters, or the payload not a tensor.
        ValueError: a function captures local variables, which Triton does not see.

    Source: the score_mod of FlexAttention (Dong et al., 2024, arXiv 2412.05496).
    """

    function: object
    derivative: object = None
    payload: Tensor | None = None
    name: str = field(init=False)

    def __post_init__(self):
        check_function("function", self.function, OF_SCORES)
        if self.derivative is not None:
            check_function("derivative", self.derivative, OF_SCORES)
        check_payload(self.payload)
        object.__setattr__(self, "name", register(self.function, self.derivative))

    def with_payload(self, payload: Tensor | None) -> "ScoreFunction":
        """Return the same functions with another payload, for instance one of each step. Works in compiled code."""
        check_payload(payload)
        other = object.__new__(ScoreFunction)
        for key, value in {**vars(self), "payload": payload}.items():
            object.__setattr__(other, key, value)
        return other

    @staticmethod
    def named(name: str, payload: Tensor | None = None) -> "ScoreFunction":
        """Return the score function with this name. Raises RuntimeError as `functions_named` does."""
        return ScoreFunction(*functions_named(name), payload)

    def __reduce__(self):
        return ScoreFunction.named, (self.name, self.payload)

    def __repr__(self):
        payload = "" if self.payload is None else f" with a payload of shape {tuple(self.payload.shape)}"
        return f"ScoreFunction {self.name}{payload}"


def functions_named(name: str) -> tuple:
    """Return the function and its derivative, or None, of a name. In a process that has not made them, import their modules.

    Raises RuntimeError if they cannot be imported, or have changed.
    """
    if name not in _functions:
        try:
            register(*map(_import_function, name.rpartition("#")[0].split(",")))
        except Exception as error:  # importing a module may raise anything
            raise RuntimeError(f"functions: expected those at the top level of a module that can be imported, got {name}, for "
                               f"which this process has {type(error).__name__}: {error}") from error
    if name not in _functions:
        raise RuntimeError(f"functions: expected the code of {name}, got another: it has changed since; make the ScoreFunction "
                           "or the block mask again")
    return _functions[name]


def check_importable(name: str) -> None:
    """Raise ValueError unless another process can import the functions of a name."""
    functions = name.rpartition("#")[0]
    if "<locals>" in functions or any(each.startswith("__main__:") for each in functions.split(",")):
        raise ValueError("functions: expected those at the top level of a module that the processes which compile and time can "
                         f"import, got {functions}")


def arguments_of(score_function) -> tuple:
    """Return what names a score function in the key of a call, and its payload. Only the checks see a wrong type."""
    if type(score_function) is not ScoreFunction:
        # a tuple has no place in a key: the call is checked
        return None if score_function is None else (score_function,), None
    payload = score_function.payload
    return (score_function.name,) if payload is not None and payload.requires_grad else score_function.name, payload


def check_payload(payload) -> None:
    """Raise TypeError unless this is a tensor or None."""
    if payload is not None and not isinstance(payload, Tensor):
        raise TypeError(f"payload: expected a tensor or None, got {type(payload).__name__}")


def check_function(role: str, function, parameters: tuple[str, ...]) -> None:
    """Raise TypeError or ValueError unless this is a `triton.jit` function with so many parameters that captures nothing."""
    if not _is_jit(function):
        raise TypeError(f"{role}: expected a function decorated with triton.jit, got {function!r}")
    names = tuple(inspect.signature(function.fn).parameters)
    if len(names) != len(parameters):
        raise TypeError(f"{role}: expected the parameters ({', '.join(parameters)}), got ({', '.join(names)})")
    if function.fn.__code__.co_freevars:
        raise ValueError(f"{role}: expected a function that uses its parameters, tl.constexpr globals and other functions of "
                         f"its module, got one that captures {', '.join(function.fn.__code__.co_freevars)}; pass values in the "
                         "payload")


def register(function, derivative=None) -> str:
    """Return the name of the functions, which `functions_named` then finds: modules and names, and a digest of their code."""
    functions = [each for each in (function, derivative) if each is not None]
    # a process that multiprocessing starts imports the user's program under another name
    modules = [each.fn.__module__.replace("__mp_main__", "__main__") for each in functions]
    names = [f"{module}:{each.fn.__qualname__}" for module, each in zip(modules, functions)]
    code = "\n".join(text for each in functions for text in _code(each, set()))
    name = f"{','.join(names)}#{hashlib.sha256(code.encode()).hexdigest()[:8]}"
    _functions[name] = function, derivative
    return name


def _code(function, seen: set) -> Iterator[str]:
    """Yield the source of a function, and of what it uses of its module: other functions, and global constants.

    Unlike Triton's key it has no line numbers, exists in the interpreter, and is read anew each time.
    """
    seen.add(id(function))
    source = textwrap.dedent(inspect.getsource(function.fn))
    yield source
    for node in ast.walk(ast.parse(source)):
        value = None
        if isinstance(node, ast.Name):
            value = function.fn.__globals__.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = function.fn.__globals__.get(node.value.id)
            value = getattr(module, node.attr, None) if isinstance(module, ModuleType) else None
        if _is_jit(value) and id(value) not in seen and not value.fn.__module__.startswith("triton."):
            yield from _code(value, seen)
        elif type(value).__name__ == "constexpr":
            yield f"{ast.unparse(node)} = {value.value!r}"


def _is_jit(function) -> bool:
    # not at the top of the file: the package is imported without Triton too
    if INTERPRETED:
        from triton.runtime.interpreter import InterpretedFunction as Jit
    else:
        from triton.runtime.jit import JITFunction as Jit
    return isinstance(function, Jit)


def _import_function(name):
    module, _, path = name.partition(":")
    function = operator.attrgetter(path)(importlib.import_module(module))
    if not _is_jit(function):
        raise TypeError(f"{name} is not decorated with triton.jit")
    return function
