"""Packed sequences with the sizes and options of a Case."""

import dataclasses
import functools
import itertools

import torch

from tests.helpers.cases import in_dtype_of, results
from tritonattn import attention_varlen, reference

SPARE = 3  # rows after the last sequence


def starts_of(lengths, device="cpu", dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=device)


class Sequences:
    """Tensors of packed sequences of these lengths, with the sizes of a case, and both functions as `results` calls them."""

    def __init__(self, case, dtype, device, queries, keys, spare=SPARE):
        self.starts = starts_of(queries, device), starts_of(keys, device)
        self.longest = max(queries), max(keys)
        sizes = {"n_q": sum(queries) + spare, "n_k": sum(keys) + spare}
        *qkv, do, self.dlse = dataclasses.replace(case, batch=(1,), **sizes).tensors(dtype, device)
        self.qkv, self.do = [x[0].transpose(0, 1) for x in qkv], do[0].transpose(0, 1)
        self.dlse = self.dlse[0]
        sizes = {"n_q": self.longest[0], "n_k": self.longest[1]}
        self.given = dataclasses.replace(case, batch=(len(queries),), **sizes).given(dtype, device)

    def results(self, dtype=None, **options):
        """Return the results of the kernels; in this dtype those of the definition."""
        function = functools.partial(self._call, attention_varlen if dtype is None else reference.attention_varlen)
        tensors = [x.to(dtype or x.dtype) for x in (*self.qkv, self.do, self.dlse)]
        given = self.given if dtype is None else in_dtype_of(self.given, dtype)
        return results(function, *tensors, **options | given)

    def _call(self, function, q, k, v, **options):
        return function(q, k, v, *self.starts, *self.longest, **options)
