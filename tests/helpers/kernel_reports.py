"""Made-up compile reports of forward kernels."""

import torch

from tritonattn import Config, Problem, gpu
from tritonattn.analysis.compile_report import KernelReport
from tritonattn.analysis.sass import Loop

H200, MI300X, B200, A100 = (gpu.KNOWN[arch] for arch in ("sm_90", "gfx942", "sm_100", "sm_80"))
PLAIN = Problem((2,), 8, 8, 1024, 1024, 128, 128, torch.bfloat16)
SQUARE = Config(128, 128, 8, 2)
# one iteration of 128 queries and 128 keys by eight warps: 16 products for each of two warp groups, 64 scores a thread
LOOP = Loop(("HGMMA.64x128x16",) * 16 + ("MUFU.EX2", "FFMA", "FMNMX") * 64 + ("LDS.128",) * 2 + ("SHFL",) * 4)


def report(on=H200, config=SQUARE, loops=(), **fields):
    """Return a report of PLAIN; `fields` are those of KernelReport."""
    defaults = {"problem": PLAIN, "registers": 168, "stack": 0, "shared_memory": 40 << 10, "tensor_memory": 0}
    return KernelReport("forward", gpu=on, config=config, loops=loops, **(defaults | fields))
