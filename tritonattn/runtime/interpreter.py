"""Fixes for Triton's interpreter, so that it computes the numbers that a GPU computes.

                     unpatched                              patched
    bfloat16         arithmetic on its bits as integers     arithmetic in float32
    casts to it      truncate                               round to nearest, ties to even
    TF32 products    exact                                  round the inputs, ties away from zero (cvt.rna.tf32.f32)
    products         NumPy's order of summation             sum in float64, then round

NumPy's order depends on the processor and on a row's position; on a GPU it is the same for all rows. The float64 sum is more
exact than a GPU's, and its order changes about one result in 2^29. Only operations that this package's kernels use are
fixed: `tl.sum` of bfloat16 is not.

Steps that cost two thirds of the interpreter's time are left out: the check for integer overflow, whose result Triton discards
outside debug mode; patching Triton's language at every launch and call; and building tables of dtypes and types at every use.
"""

import contextlib
import functools
import threading

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
one_at_a_time = threading.RLock()  # the interpreter's state is global to the process


def to_float32(bits):
    """Convert bfloat16, as the interpreter stores it, to float32."""
    return (np.asarray(bits, np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x):
    """Convert float32 to the bits of the nearest bfloat16; NaN stays NaN."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    with np.errstate(over="ignore"):
        rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def to_tf32(x):
    """Round float32 to 10 mantissa bits."""
    x = np.ascontiguousarray(x, np.float32)
    with np.errstate(over="ignore"):
        rounded = ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def problem() -> str | None:
    """Return why the interpreter does not work with the installed versions, and the fix; None if it does."""
    if _version(triton) < (3, 7) and _version(np) >= (2, 4):
        return (f"Triton {triton.__version__}'s interpreter needs NumPy below 2.4, found {np.__version__}: "
                "pip install 'numpy<2.4', or a newer Triton")
    return None


def _version(module):
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@contextlib.contextmanager
def patched():
    """Run the block with the patched interpreter, one thread at a time, without NumPy's warnings about overflow and NaN."""
    patch()
    with one_at_a_time, np.errstate(all="ignore"):
        yield


class Builder(interpreter.InterpreterBuilder):
    """The interpreter's operations, with the bfloat16 and TF32 arithmetic of a GPU."""

    def cast_impl(self, src, dst_type):
        have, want = src.dtype.scalar, dst_type.scalar
        if have == want or tl.bfloat16 not in (have, want):
            return super().cast_impl(src, dst_type)
        if have == tl.bfloat16:
            return Handle(to_float32(src.data).astype(interpreter._get_np_dtype(want)), want)
        return Handle(to_bfloat16(src.data), want)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs, rhs, op):
        if lhs.dtype.scalar != tl.bfloat16 or op in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
            return super().binary_op(lhs, rhs, op)
        out = op(to_float32(lhs.data), to_float32(rhs.data))
        return Handle(out, tl.int1) if out.dtype == bool else Handle(to_bfloat16(out), tl.bfloat16)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if d.dtype.scalar != tl.float32 or a.dtype.scalar not in (tl.float16, tl.bfloat16, tl.float32):
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        x, y = (to_float32(t.data) if t.dtype.scalar == tl.bfloat16 else t.data for t in (a, b))
        if a.dtype.scalar == tl.float32 and str(input_precision).endswith("TF32"):
            x, y = to_tf32(x), to_tf32(y)
        return Handle(np.matmul(x, y, dtype=np.float64).astype(np.float32) + d.data, d.dtype.scalar)

    def get_bf16(self, value):
        return Handle(to_bfloat16([value]), tl.bfloat16)


scalar_dtype = functools.cache(interpreter._get_np_dtype)


def numpy_dtype(dtype):
    """Return the dtype of the array that holds elements of a Triton dtype, bfloat16 as uint16 and pointers as uint64."""
    return np.dtype(np.uint64) if dtype.scalar.is_ptr() else scalar_dtype(dtype.scalar)


def construct_once(construct):
    """Return a version of block_type's constructor that computes the attributes once for each dtype and shape."""
    attributes = {}

    def construct_from_attributes(self, element_ty, shape):
        sizes = (getattr(size, "value", size) for size in shape)
        key = (str(element_ty), type(element_ty), getattr(element_ty, "address_space", None), *sizes)
        if key not in attributes:
            construct(self, element_ty, shape)
            attributes[key] = dict(vars(self))
        vars(self).update(attributes[key])

    return construct_from_attributes


def patch_language_once(patch_language):
    """Return a version of Triton's `_patch_lang` that patches for the functions of each module once, and restores nothing."""
    patched_modules = set()

    def patch_once(function):
        if function.__module__ not in patched_modules:
            patch_language(function)
            patched_modules.add(function.__module__)
        return interpreter._LangPatchScope()  # empty: nothing to restore

    return patch_once


@functools.cache
def patch() -> None:
    """Patch the interpreter of this process, once. Raises RuntimeError where it cannot work."""
    if problem():
        raise RuntimeError(problem())
    if isinstance(tl.max, triton.runtime.JITFunction):
        raise RuntimeError("Triton was imported before TRITON_INTERPRET was set: set it before Python starts")
    interpreter.InterpreterBuilder = interpreter.interpreter_builder.__class__ = Builder
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter._patch_lang = patch_language_once(interpreter._patch_lang)
    interpreter._get_np_dtype = numpy_dtype
    tl.block_type.__init__ = construct_once(tl.block_type.__init__)
