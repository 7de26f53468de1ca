"""Set up every test: the interpreter with its memory guard, a cache of its own, NaN in memory that was never written."""

import os
import tempfile

import hypothesis
import pytest
import torch

import tritonattn
from tests import COMPILED, DEVICE
from tritonattn.integrations import dispatch_log

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
torch.set_num_threads(1)
# the same examples in every run, without a time limit, which a busy machine would exceed
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")
# neither read nor change the user's tuned configs
_cache = tempfile.TemporaryDirectory(prefix="tritonattn-tests-")
os.environ["TRITONATTN_CACHE_DIR"] = _cache.name

if not COMPILED:
    from tests.helpers import memory_guard
    from tritonattn.runtime import interpreter

    interpreter.patch()
    memory_guard.install()


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not COMPILED:
            reason = "kernels are interpreted (TRITON_INTERPRET)" if torch.cuda.is_available() else "torch sees no GPU"
            item.add_marker(pytest.mark.skip(reason=f"needs compiled kernels on a GPU: {reason}"))
        if "interpreted" in item.keywords and COMPILED:
            item.add_marker(pytest.mark.skip(reason="needs Triton's interpreter: run with TRITON_INTERPRET=1"))


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """Fill torch.empty with NaN, so that a test fails where a kernel forgets to write: torch does so in deterministic mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def patch_off():
    """Start with the patch off and no call counted; end with it off."""
    torch._dynamo.reset()
    dispatch_log.fallback_report(clear=True)
    # warn only: torch's own float32 gradients on a GPU are not deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    tritonattn.disable()
