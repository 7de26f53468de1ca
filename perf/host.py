"""Host time of a call. No GPU is needed: Triton's own launcher runs with a CUDA driver that does nothing (null_driver).

    python -m perf.host [--profile CASE] [--out FILE]

Thread time, the best of many short rounds, each of which runs all cases. The unit is a plain Triton kernel with 21 arguments,
launched in the same rounds: other work on the machine slows both alike.
"""

import argparse
import cProfile
import itertools
import json
import pstats
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from perf import null_driver

UNIT = "plain Triton kernel"
TORCH = "torch's SDPA, tiny CPU tensors"


@triton.jit
def plain_kernel(a, b, c, d, e, n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, x0, x1, x2, x3, x4, x5):
    tl.store(a, tl.load(b) + n0 + x0)


def cases() -> dict[str, Callable[[], object]]:
    """Return the calls to measure, by name. Requires the null driver."""
    import tritonattn
    from tritonattn.integrations.torch_private import TORCH_SDPA

    small = [torch.zeros(1, 2, 4, 16, requires_grad=i > 2) for i in range(5)]
    q, k, v = (torch.zeros(1, 4, 128, 64, dtype=torch.bfloat16) for _ in range(3))  # small: allocated without mmap
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    one_query, numbers = q[:, :, :1], torch.zeros(16)
    mask = tritonattn.block_mask(torch.ones(128, 128, dtype=torch.bool))
    many_keys, lengths = torch.empty(1, 4, 2**19, 64, dtype=torch.bfloat16), itertools.count(1)

    def no_grad(function, *arguments, **options):
        def call():
            with torch.no_grad():
                return function(*arguments, **options)
        return call

    def new_length():
        keys = many_keys[:, :, :128 * (next(lengths) % 4096 + 1)]
        with torch.no_grad():
            return tritonattn.attention(one_query, keys, keys)

    attention, sdpa = tritonattn.attention, tritonattn.scaled_dot_product_attention
    return {
        UNIT: lambda: plain_kernel[(16,)](numbers, numbers, numbers, numbers, numbers, *range(16, 32)),
        TORCH: no_grad(TORCH_SDPA, *small[:3], is_causal=True),
        "forward": no_grad(attention, q, k, v, causal=True),
        "forward, one query": no_grad(attention, one_query, k, v),
        "forward, one query, a new length": new_length,
        "forward, dropout": no_grad(attention, q, k, v, dropout_p=0.1),
        "forward, block mask": no_grad(attention, q, k, v, mask=mask),
        "forward with gradient": lambda: attention(*leaves, causal=True),
        "forward and backward": lambda: torch.autograd.grad(attention(*leaves, causal=True), leaves, q),
        "scaled_dot_product_attention": no_grad(sdpa, q, k, v, is_causal=True),
        "patched F.scaled_dot_product_attention": no_grad(F.scaled_dot_product_attention, q, k, v, is_causal=True),
        "autograd alone, forward and backward": lambda: torch.autograd.grad(small[3] * small[4], small[3:], small[0]),
    }


def measure(rounds: int = 150, calls: int = 8) -> dict[str, float]:
    """Return the host time of one call of each case, in seconds: the best round's mean."""
    import tritonattn

    best = {}
    torch.set_num_threads(1)
    with tritonattn.swapped():
        functions = cases()
        for _ in range(rounds):
            for name, function in functions.items():
                start = time.thread_time()
                for _ in range(calls):
                    function()
                best[name] = min(best.get(name, float("inf")), (time.thread_time() - start) / calls)
    return best


def profile(name: str, calls: int = 2000) -> None:
    """Print the functions in which a case spends its time. Profiling makes Python functions slower than they are."""
    import tritonattn

    with tritonattn.swapped():
        function = cases()[name]
        function()
        with cProfile.Profile() as profiler:
            for _ in range(calls):
                function()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(20)


def main():
    """Print the host time of each public function, or profile one."""
    parser = argparse.ArgumentParser(prog="python -m perf.host", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", metavar="CASE", help='print where the time of a case goes, such as "forward"')
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the times and the versions as JSON")
    options = parser.parse_args()
    null_driver.install()
    if options.profile:
        if options.profile not in cases():
            parser.error(f"--profile: expected one of {', '.join(cases())}, got {options.profile!r}")
        profile(options.profile)
        return
    seconds = measure()
    print(f"{'':40}      us   plain kernels   torch's SDPA")
    for name, value in seconds.items():
        print(f"{name:40} {value * 1e6:7.1f} {value / seconds[UNIT]:15.2f} {value / seconds[TORCH]:14.2f}")
    if options.out:
        from tritonattn.measure.environment import environment_of

        options.out.write_text(json.dumps({"environment": environment_of(torch.device("cpu")), "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
