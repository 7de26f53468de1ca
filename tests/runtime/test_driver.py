"""Triton's launch path up to the driver, without a GPU: a fake driver loads nothing and records its arguments.

Triton specializes, compiles and checks each launch itself; only the transfer to a device is missing.
"""

import re

from tests.helpers.compile_server import compiled

FAKE = """
import json, torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

launched = []


class Utils:
    def get_device_properties(self, device):
        return dict(max_shared_mem=227 << 10, multiprocessor_count=132, sm_clock_rate=1, mem_clock_rate=1, mem_bus_width=1,
                    max_num_regs=65536, warpSize=32)

    def load_binary(self, name, binary, shared, device, *_):
        return 1, 2, 128, 0, 1024  # module, function, registers, spills, threads at the most


class Driver(DriverBase):
    utils = Utils()
    launcher_cls = staticmethod(lambda source, metadata: lambda *arguments, **_: launched.append(arguments[:3]))

    def __init__(self):
        pass

    is_active = classmethod(lambda cls: True)
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_active_torch_device = lambda self: torch.device("cpu")
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device=None: 0
    get_device_interface = lambda self: None
    get_benchmarker = lambda self: None
    get_empty_cache_for_benchmark = lambda self: None
    clear_cache = lambda self, cache: None
    map_python_to_cpp_type = lambda self, ty: ty
    assemble_tensormap_to_arg = lambda self, *_: None


driver.set_active(Driver())
from tritonattn import Config, Problem, config, gpu
from tritonattn.analysis import compile_report
from tritonattn.runtime import launch
on = gpu.KNOWN["sm_90"]
"""
LAUNCHES = FAKE + """
from tritonattn.configs import lookup
found = {}
for name, options in dict(plain={}, causal=dict(window=(None, 0)), bias=dict(bias=torch.float32)).items():
    for kernel in ("forward", "delta", "dq", "dkdv", "dbias"):
        if kernel == "dbias" and name != "bias":
            continue
        problem = Problem((2,), 4, 2, 1000, 1000, 64, 64, torch.bfloat16, **options)
        chosen = lookup.get_config(kernel, problem, on)
        call = launch.example_launch(kernel, problem, chosen)
        launched.clear()
        launch.run(call, torch.device("cpu"))
        (cache, *_), = call.kernel.device_caches.values()
        binaries = {each.asm["cubin"] for each in cache.values()}
        seen = compile_report.compile_kernel(kernel, problem, chosen, on).asm["cubin"]
        found[f"{kernel} {name}"] = [list(map(list, launched)), call.programs, seen in binaries, len(binaries)]
print(json.dumps(found))
"""
TOO_LARGE = FAKE + """
from tritonattn.runtime import custom_op
custom_op.gpu_of = lambda device: on
q = torch.zeros(2, 4, 1024, 128, dtype=torch.bfloat16)
try:
    with config.pinned(Config(128, 128, 8, 6)):
        torch.ops.tritonattn.forward(q, q, q, *[None] * 6, 1.0, None, None, False, 0.0, False)
    print(json.dumps("nothing was raised"))
except RuntimeError as error:
    print(json.dumps([str(error), type(error.__cause__) is OutOfResources, launched]))
"""


def test_launched_binaries_are_the_inspected_ones():
    """Triton's launch path accepts records as arguments, and compiles the binary that inspect reads."""
    found = compiled(LAUNCHES, fresh=True)
    assert len(found) == 13
    for name, (launched, programs, same, binaries) in found.items():
        assert launched == [[programs, 1, 1]] and programs > 0, name
        assert same, f"{name}: {binaries} binaries were launched, none is the inspected one"


def test_oversized_config_raises_before_the_launch():
    message, caused, launched = compiled(TOO_LARGE, fresh=True)
    assert re.fullmatch(r"forward: config 128x128w8s6 needs \d+ of shared memory, .+ allows 232448, for .+x1024x128.*; "
                        r"pin a smaller config \(tritonattn\.pinned\)", message), message
    assert caused and not launched
