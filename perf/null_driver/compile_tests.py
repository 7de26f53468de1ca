"""A plugin for pytest: tests that compare attention with the definition only compile, without a GPU, what they launch.

    python -m pytest -p perf.null_driver.compile_tests -m "not alone" tests/gpu/test_gpu.py -k accuracy
"""

from perf import null_driver

null_driver.install()

import torch  # noqa: E402

import tests  # noqa: E402
import tritonattn  # noqa: E402

# the tests were imported as on a GPU; their tensors have the layouts they have there
tests.DEVICE = torch.device("cpu")
tritonattn.gpu.gpu_of = lambda device: tritonattn.gpu.KNOWN["sm_90"]

from tests.helpers import cases  # noqa: E402

cases.check = cases.launch
