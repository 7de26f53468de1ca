"""Score functions for the kernels, and the same in torch for the definition."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonattn import BlockMask, ScoreFunction, create_block_mask, reference


@triton.jit
def one(score, batch, head, query, key, payload):
    return 1.0


@triton.jit
def penalty(score, batch, head, query, key, payload):
    """A distance, not from position to position but from index to index, with a slope of each head."""
    return score - tl.load(payload + head) * tl.abs(query - key)


@triton.jit
def squares(score, batch, head, query, key, payload):
    """A function that is not linear, differs from batch to batch and masks some keys."""
    return tl.where((key + batch) % 7 == 3, float("-inf"), score + 0.125 * score * score)


@triton.jit
def squares_slope(score, batch, head, query, key, payload):
    return 1.0 + 0.25 * score


@triton.jit
def same_document(score, batch, head, query, key, payload):
    """Pairs in one document attend to each other; the payload has a document for each index."""
    return tl.where(tl.load(payload + query) == tl.load(payload + key), score, float("-inf"))


@triton.jit
def documents(batch, head, query, key, payload):
    """The same as a mask function."""
    return tl.load(payload + query) == tl.load(payload + key)


@triton.jit
def stripes(batch, head, query, key, payload):
    """A mask function that depends on all indices."""
    return (key + 2 * batch + head) % 5 != query % 3


def mask_of_documents(n: int, device="cpu") -> BlockMask:
    """Return the block mask of documents of 100 keys."""
    return create_block_mask(documents, (1, 1, n, n), payload=torch.arange(n, dtype=torch.int32, device=device) // 100)


class Change(NamedTuple):
    """What a score function does: for the kernels, and in torch. `payload` makes it, with one number for each head or index."""

    function: object
    derivative: object
    in_torch: object  # (score, batch, head, query, key, payload) -> score
    payload: Tensor | None = None


CHANGES = {
    "penalty": Change(penalty, one,
                      lambda s, b, h, q, k, payload: s - payload.to(s)[h] * (q - k).abs(), torch.arange(1, 9) / 8),
    "squares": Change(squares, squares_slope,
                      lambda s, b, h, q, k, payload: torch.where((k + b) % 7 == 3, -torch.inf, s + 0.125 * s * s)),
    "documents": Change(same_document, one, lambda s, b, h, q, k, payload: torch.where(payload[q] == payload[k], s, -torch.inf),
                        torch.arange(512, dtype=torch.int32) // 11),
}


@dataclass(frozen=True)
class Both:
    """A score function for `attention` and for the definition."""

    name: str
    device: str = "cpu"

    def of(self, function):
        """Return what this function, or a partial call of it, takes as score_function."""
        function = function.args[0] if isinstance(function, functools.partial) else function
        change = CHANGES[self.name]
        payload = None if change.payload is None else change.payload.to(self.device)
        if function in (reference.attention, reference.attention_varlen):
            return lambda *place: change.in_torch(*place, payload)
        return ScoreFunction(change.function, change.derivative, payload)
