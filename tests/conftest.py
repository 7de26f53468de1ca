"""Interpreted, every test runs under the memory guard; and memory that was never written holds nan."""

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
# the same examples in every run, and no bound on their time, which a busy machine would break
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")
# what the user has tuned is not what the tests are about; nor is it theirs to change
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
    """With deterministic algorithms on, torch.empty is filled with nan: what a kernel forgets to write cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def off_and_uncounted():
    """The swap is off before and after, with nothing counted yet."""
    torch._dynamo.reset()
    dispatch_log.fallback_report(clear=True)
    # a warning is enough: on a GPU torch's own gradients of float32 are not deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    tritonattn.disable()
