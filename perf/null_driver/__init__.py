"""Triton's own CUDA driver and launcher with a libcuda that does nothing, for programs without TRITON_INTERPRET.

Arguments are bound and specialized, kernels compiled, loaded, and launched with tensors on the CPU. Everything except the
device is real. Call `install` before the first launch of a process, and in a process of its own: it replaces parts of modules.
"""

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("null_cuda.c")


def build() -> Path:
    """Compile the library with the C compiler that Triton needs too; return its path."""
    import triton

    include = Path(triton.__file__).parent / "backends/nvidia/include"
    folder = Path(tempfile.mkdtemp(prefix="null-cuda-"))
    # Triton links launchers to the library until the end
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = folder / "libcuda.so.1"
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", f"-Wl,-soname,{library.name}", f"-I{include}",
                    "-o", library, SOURCE], check=True)
    return library


class NullDriver:
    """The library, and what the last launch passed to it."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    def _value(self, name: str) -> int:
        return ctypes.c_int.in_dll(self._library, f"null_{name}").value

    @property
    def launches(self) -> int:
        """The number of launches so far."""
        return self._value("launches")

    @property
    def last_launch(self) -> dict[str, int]:
        """The programs, the threads of each, and its bytes of shared memory."""
        return {name: self._value(name) for name in ("grid", "threads", "shared_memory")}


def install() -> NullDriver:
    """Make Triton use the null driver, and make tritonattn treat CPU tensors as tensors on an H200."""
    library = build()
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
    null_driver = NullDriver(library)

    import torch
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    class Driver(CudaDriver):
        def __init__(self):
            super().__init__()
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device=None: 0
            self.get_device_capability = lambda device=None: (9, 0)

        def get_active_torch_device(self):
            return torch.device("cpu")

    driver.set_active(Driver())

    from tritonattn import gpu
    from tritonattn.integrations import support
    from tritonattn.runtime import arguments, plan

    assert not gpu.INTERPRETED, "the null driver needs a process without TRITON_INTERPRET"
    arguments.check_kernels_run_on = lambda **tensors: None
    plan.gpu_of = lambda device: gpu.KNOWN["sm_90"]
    support.SUPPORTED_DEVICES = ("cpu",)
    torch.cuda.is_available = lambda: True
    return null_driver
