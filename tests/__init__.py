"""Without a GPU, or with TRITON_INTERPRET=1, the kernels run in Triton's interpreter; else they are compiled."""

import os

import torch

COMPILED = torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ
DEVICE = torch.device("cuda" if COMPILED else "cpu")
if not COMPILED:
    # read when a kernel is defined, so before tritonattn is imported
    os.environ["TRITON_INTERPRET"] = "1"
