"""Benchmark cases: suites of named problems.

    paper    the grid of the FlashAttention papers: 16k tokens, hidden size 2048
    models   shapes of published models          decode   one query, many keys
    odd      sizes that no tile divides          small    short calls, dominated by launch cost
    short    a selection for a few minutes       tiny     seconds in Triton's interpreter
    cudnn    the shapes of cudnn-frontend's benchmark of training: grouped heads, wide heads, windows, few queries
    variants softcap, sinks, ALiBi, tables of relative positions, statistics, sigmoid and ReLU attention
    packed   sequences of one length, packed
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from tritonattn import Problem

CAUSAL = (None, 0)
FULL = (None, None)
MASKS = {"full": FULL, "causal": CAUSAL}
FORWARD, TRAINING = ("forward",), ("forward", "backward")
DIRECTIONS = ("forward", "backward", "both")
PAPER_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


class Case(NamedTuple):
    """A problem, its name in the suite, and the directions to measure."""

    name: str
    problem: Problem
    directions: tuple[str, ...]


def problem(batch, heads, lengths, d, window=FULL, *, dtype=torch.bfloat16, bottom_right=False) -> Problem:
    """Return the Problem of these sizes. `heads` and `lengths` are one number, or a pair (query, key); so is d, (QK, V)."""
    (heads, kv_heads), (n_q, n_k), (d, dv) = ((x, x) if isinstance(x, int) else x for x in (heads, lengths, d))
    shapes = ((batch, heads, n_q, d), (batch, kv_heads, n_k, d), (batch, kv_heads, n_k, dv))
    return Problem.of(*(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes), window, bottom_right)


def packed(problem: Problem) -> Problem:
    """Return the problem of the same sequences, packed."""
    return replace(problem, packed=(problem.batch[0] * problem.n_q, problem.batch[0] * problem.n_k))


def of_paper(d: int, mask: str, n: int, directions=TRAINING) -> Case:
    """Return a case of the grid of arXiv 2307.08691 and 2407.08608: batch x length = 16,384, heads x head size = 2048."""
    return Case(f"d{d} {mask} {n}", problem(16384 // n, 2048 // d, n, d, MASKS[mask]), directions)


def in_paper_grid(problem: Problem) -> bool:
    """Return whether a problem has the sizes and the mask of a case of `of_paper`, in any dtype, and no variant."""
    square = problem.n_q == problem.n_k and problem.d == problem.dv and problem.heads == problem.kv_heads
    sizes = math.prod(problem.batch) * problem.n_q, problem.heads * problem.d
    variants = "softcap", "sink", "alibi", "relative", "packed", "entropy", "key_mass"
    plain = problem.normalizer == "softmax" and not any(getattr(problem, name) for name in variants)
    return square and sizes == (16384, 2048) and problem.mask in MASKS and plain


PAPER = tuple(of_paper(d, mask, n) for d in (64, 128, 256) for mask in MASKS for n in PAPER_LENGTHS)

# sizes of the published model configurations
MODELS = (
    Case("llama-3-8b prefill 8k", problem(1, (32, 8), 8192, 128, CAUSAL), FORWARD),
    Case("llama-3-8b training 8k", problem(2, (32, 8), 8192, 128, CAUSAL), DIRECTIONS),
    Case("llama-3-70b prefill 8k", problem(1, (64, 8), 8192, 128, CAUSAL), FORWARD),
    Case("llama-3-70b training 8k", problem(1, (64, 8), 8192, 128, CAUSAL), DIRECTIONS),
    Case("llama-3-8b chunk of 1k after 15k", problem(1, (32, 8), (1024, 16384), 128, CAUSAL, bottom_right=True), FORWARD),
    Case("gpt-2 training 1k", problem(16, 12, 1024, 64, CAUSAL), DIRECTIONS),
    Case("bert-base training 512", problem(32, 12, 512, 64), DIRECTIONS),
    Case("vit-l/16 training 197", problem(64, 16, 197, 64), DIRECTIONS),
    Case("whisper-large encoder 1500", problem(8, 20, 1500, 64), FORWARD),
    Case("dit-xl/2 training 4k", problem(8, 16, 4096, 72), DIRECTIONS),
    Case("sdxl self 4k", problem(2, 10, 4096, 64), FORWARD),
    Case("sdxl cross 4k on 77", problem(2, 10, (4096, 77), 64), FORWARD),
    Case("gemma-7b training 8k", problem(1, 16, 8192, 256, CAUSAL), DIRECTIONS),
    Case("gemma-2b training 8k", problem(1, (8, 1), 8192, 256, CAUSAL), DIRECTIONS),
    Case("mistral-7b window 4k of 16k", problem(1, (32, 8), 16384, 128, (4095, 0)), DIRECTIONS),
    Case("qwen2.5-7b training 8k", problem(1, (28, 4), 8192, 128, CAUSAL), DIRECTIONS),
)

DECODE = tuple(
    Case(f"group {group} batch {batch} keys {n // 1024}k", problem(batch, (32, 32 // group), (1, n), 128), FORWARD)
    for group in (1, 4, 8) for batch in (1, 8, 32, 128) for n in (1024, 8192, 32768, 131072))

ODD = (
    Case("length 4097", problem(2, 16, 4097, 128, CAUSAL), TRAINING),
    Case("length 1000", problem(8, 16, 1000, 64), TRAINING),
    Case("length 127", problem(64, 16, 127, 64, CAUSAL), TRAINING),
    Case("size 40", problem(4, 16, 4096, 40), TRAINING),
    Case("size 80", problem(4, 16, 4096, 80, CAUSAL), TRAINING),
    Case("size 96", problem(4, 16, 4096, 96), TRAINING),
    Case("size 112", problem(4, 16, 4096, 112, CAUSAL), TRAINING),
    Case("size 160", problem(2, 8, 4096, 160), TRAINING),
    Case("size 192", problem(2, 8, 4096, 192, CAUSAL), TRAINING),
    Case("3001 queries on 5003 keys, bottom right", problem(2, 16, (3001, 5003), 128, CAUSAL, bottom_right=True), TRAINING),
    Case("heads 14 on 2, size 100", problem(2, (14, 2), 2000, 100, CAUSAL), TRAINING),
)

SMALL = tuple(
    Case(f"batch {batch} {mask} {n}", problem(batch, 8, n, 64, MASKS[mask]), DIRECTIONS)
    for mask in MASKS for batch, n in ((1, 64), (1, 256), (1, 1024), (4, 128), (4, 512)))

SHORT = (
    *(of_paper(d, mask, n) for n in (4096, 16384, 1024) for d in (128, 64, 256) for mask in MASKS),
    Case("decode group 8 batch 16 keys 8k", problem(16, (32, 4), (1, 8192), 128), FORWARD),
    Case("decode group 4 batch 1 keys 8k", problem(1, (32, 8), (1, 8192), 128), FORWARD),
    Case("dit-xl/2 4k", problem(8, 16, 4096, 72), TRAINING),
    Case("mistral-7b window 4k of 16k", problem(1, (32, 8), 16384, 128, (4095, 0)), TRAINING),
    Case("llama-3-8b 8k", problem(1, (32, 8), 8192, 128, CAUSAL), DIRECTIONS),
    Case("small batch 1 causal 256", problem(1, 8, 256, 64, CAUSAL), DIRECTIONS),
)

TINY = (
    Case("full 64", problem(1, 1, 64, 16, dtype=torch.float32), DIRECTIONS),
    Case("causal, grouped heads 48 on 80", problem(1, (2, 1), (48, 80), 16, CAUSAL, dtype=torch.float32, bottom_right=True),
         TRAINING),
)

# the configurations of cudnn-frontend's benchmark/attention_training, up to lengths of 16k; "window" attends to 128 keys
CUDNN = (
    *(Case(f"{name} {mask} {n // 1024}k", problem(batch, heads, n, d, window), directions)
      for name, batch, heads, d, mask, window, directions, lengths in (
          ("llama-3.1", 2, (64, 8), 128, "full", FULL, TRAINING, PAPER_LENGTHS[2:]),
          ("llama-3.1", 2, (64, 8), 128, "causal", CAUSAL, TRAINING, PAPER_LENGTHS[2:]),
          ("qwen-3.5", 1, (32, 2), 256, "causal", CAUSAL, TRAINING, PAPER_LENGTHS[2:]),
          ("deepseek-v3", 2, 128, (192, 128), "full", FULL, TRAINING, PAPER_LENGTHS[2:5]),
          ("deepseek-v3", 2, 128, (192, 128), "causal", CAUSAL, TRAINING, PAPER_LENGTHS[2:5]),
          ("gpt-oss", 2, 128, 64, "window", (127, 0), TRAINING, PAPER_LENGTHS[2:]),
          ("deepseek-v4", 2, (64, 1), 512, "window", (127, 0), TRAINING, PAPER_LENGTHS[2:]))
      for n in lengths),
    *(Case(f"video transformer {n} on 62208", problem(1, 9, (n, 62208), 128), FORWARD) for n in (985, 1024, 2048, 4096, 8192)),
)

# the attention layers of Gemma 2, gpt-oss, Bloom and T5; statistics; sigmoid and ReLU attention
VARIANTS = (
    *(Case(f"gemma-2-9b {name} 8k", replace(problem(1, (16, 8), 8192, 256, window), softcap=True), TRAINING)
      for name, window in (("global", CAUSAL), ("window 4k", (4095, 0)))),
    *(Case(f"gpt-oss-20b {name} 8k", replace(problem(1, (64, 8), 8192, 64, window), sink=True), TRAINING)
      for name, window in (("global", CAUSAL), ("window 128", (127, 0)))),
    *(Case(f"softcap d{d} causal 4k", replace(of_paper(d, "causal", 4096).problem, softcap=True), TRAINING) for d in (64, 128)),
    Case("bloom-7b 2k", replace(problem(4, 32, 2048, 128, CAUSAL), alibi=True), TRAINING),
    Case("t5-large encoder 512", replace(problem(32, 16, 512, 64), relative=True), TRAINING),
    *(Case(f"{name} d{d} causal 4k", replace(of_paper(d, "causal", 4096).problem, **{name: True}), TRAINING)
      for name in ("alibi", "relative") for d in (64, 128)),
    *(Case(f"{name} d{d} causal 4k", replace(of_paper(d, "causal", 4096).problem, **{name: True}), FORWARD)
      for name in ("entropy", "key_mass") for d in (64, 128)),
    *(Case(f"{name} d{d} {mask} 4k", replace(of_paper(d, mask, 4096).problem, normalizer=name), TRAINING)
      for name in ("sigmoid", "relu") for d in (64, 128) for mask in ("full", "causal")),
)

# of one length, so that the numbers of operations are exact and a padded batch would do the same work
PACKED = (
    *(Case(f"d{d} {mask} {16384 // n} of {n}", packed(of_paper(d, mask, n).problem), TRAINING)
      for d in (64, 128) for mask in MASKS for n in (512, 2048)),
    Case("llama-3-8b causal 8 of 4k", packed(problem(8, (32, 8), 4096, 128, CAUSAL)), TRAINING),
)

SUITES: dict[str, tuple[Case, ...]] = {
    "paper": PAPER, "models": MODELS, "decode": DECODE, "odd": ODD, "small": SMALL, "short": SHORT, "tiny": TINY,
    "cudnn": CUDNN, "variants": VARIANTS, "packed": PACKED,
}


def suite(name: str, dtype: torch.dtype | None = None) -> tuple[Case, ...]:
    """Return the cases of a suite, in `dtype` instead of their own if it is given."""
    cases = SUITES[name]
    return cases if dtype is None else tuple(case._replace(problem=replace(case.problem, dtype=dtype)) for case in cases)
