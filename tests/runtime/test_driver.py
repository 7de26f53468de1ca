"""Launches by Triton's own driver and C launcher over a CUDA library that does nothing (perf/null_driver)."""

import re

import pytest

from tests.helpers.compile_server import compiled
from tests.helpers.tiers import slow

START = """
import json, sys, torch
from perf import null_driver
null = null_driver.install()
from tritonattn import Config, Problem, attention, block_mask, config, gpu
from tritonattn.analysis import compile_report
from tritonattn.configs import lookup
from tritonattn.runtime import launch
on = gpu.KNOWN["sm_90"]
sys.path.append("tests")  # the package `tests` would set TRITON_INTERPRET
"""
INSPECTED = START + """
results = {}
for name, options in dict(causal=dict(window=(None, 0)), bias=dict(bias=torch.float32)).items():
    for kernel in ("forward", "delta", "dq", "dkdv", "dbias"):
        if kernel == "dbias" and name != "bias":
            continue
        problem = Problem((2,), 4, 2, 1000, 1000, 64, 64, torch.bfloat16, **options)
        chosen = lookup.get_config(kernel, problem, on)
        call = launch.example_launch(kernel, problem, chosen)
        before = null.launches
        binary = launch.run(call, torch.device("cpu"))
        report = compile_report.compile_kernel(kernel, problem, chosen, on)
        expected = {"grid": call.programs, "threads": 32 * chosen.num_warps, "shared_memory": report.metadata.shared}
        results[f"{kernel} {name}"] = [null.launches - before, null.last_launch == expected,
                                       binary.asm["cubin"] == report.asm["cubin"]]
print(json.dumps(results))
"""
TOO_LARGE = START + """
from triton.runtime.errors import OutOfResources
q = torch.zeros(2, 4, 1024, 128, dtype=torch.bfloat16)
try:
    with config.pinned(Config(128, 128, 8, 6)):
        torch.ops.tritonattn.forward(q, q, q, *[None] * 13, 1.0, None, None, False, 0.0, *[None] * 3, *[False] * 3,
                                     "softmax", *[None] * 3, False)
    print(json.dumps("nothing was raised"))
except RuntimeError as error:
    print(json.dumps([str(error), type(error.__cause__) is OutOfResources, null.launches]))
"""
REPEATED = START + """
from triton.backends.nvidia.driver import CudaLauncher
from triton import knobs
import tritonattn
from tritonattn.kernels import backward, diagonals, forward, mass
KERNELS = {name: kernel for module in (forward, backward, diagonals, mass) for name, kernel in vars(module).items()
           if name.endswith("_kernel")}

calls, through_triton, original, run = [], [], CudaLauncher.__call__, launch.run


def leaves(x):
    if isinstance(x, tuple):
        return [leaf for part in x for leaf in leaves(part)]
    value = x.data_ptr() if isinstance(x, torch.Tensor) else x
    return [value] if type(value) in (int, float) else []


def record(self, grid_x, grid_y, grid_z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
    calls.append([[grid_x, grid_y, grid_z, stream], metadata, leaves(arguments)])
    return original(self, grid_x, grid_y, grid_z, stream, function, metadata, launch_metadata, enter, leave, *arguments)


def seen(call, device):
    through_triton.append(call.kernel.__name__)
    return run(call, device)


CudaLauncher.__call__, launch.run = record, seen
torch.manual_seed(0)
n, options, learned = 128, {}, []
q, k, v = (torch.zeros(2, heads, n, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
do = torch.zeros_like(q)
kind = KIND
if "bias" in kind:
    options["bias"] = torch.zeros(4, n, n, requires_grad=True)
if "mask" in kind:
    options["mask"] = block_mask(torch.ones(n, n, dtype=torch.bool))
if "dropout" in kind:
    options |= dict(dropout_p=0.5, dropout_seed=torch.zeros(1, dtype=torch.int64))
if "lengths" in kind:
    options["key_lengths"] = torch.full((2,), n)
if "causal" in kind:
    options |= dict(causal=True, align="bottom_right")

if "passes" in kind:
    pin = config.pinned(dkdv=Config(32, 64, two_passes=True))
    pin.__enter__()  # until the process ends
if "sink" in kind:
    options |= dict(softcap=20.0, sink=torch.zeros(4, requires_grad=True))
if "relative" in kind:
    learned = [torch.zeros(4, requires_grad=True), torch.zeros(4, 9, requires_grad=True)]
    options |= dict(zip(("alibi", "relative"), learned)) | dict(align="top_left")
if "statistics" in kind:
    options["return_stats"] = "max", "entropy", "key_mass"
if "sigmoid" in kind:
    options |= dict(normalizer="sigmoid", sigmoid_bias=-2.0)
if "function" in kind:
    from helpers import score_functions
    options["score_function"] = score_functions.Both("penalty").of(attention)
if "masks" in kind:
    from helpers import score_functions
    options["mask"] = score_functions.mask_of_documents(n)
if "packed" in kind:
    attention = tritonattn.attention_varlen
    q, k, v, do = (torch.zeros(2 * n, x.shape[1], 64, dtype=torch.bfloat16, requires_grad=True) for x in (q, k, v, do))
    starts = torch.tensor([0, n, n + 5], dtype=torch.int32)
    options |= dict(cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=n, max_seqlen_k=n, key_lengths=starts[1:] // 2)
inputs = [q, k, v, *([options["bias"]] if "bias" in kind else [])]
tritonattn.warm(q, k, v, **options)
compiled = {name: sum(len(cache[0]) for cache in kernel.device_caches.values()) for name, kernel in KERNELS.items()}
launched = null.launches
rounds, kept, written = [], [], []  # kept: so that no address is used twice
for i in range(4):
    calls.clear()
    through_triton.clear()
    if i == 3:  # a hook of a profiler
        knobs.runtime.launch_enter_hook.add(lambda metadata: None)
    results = attention(q, k, v, **options)
    results = [results] if isinstance(results, torch.Tensor) else [results[0], *results[1].values()]
    outputs = [x for x in results if x.requires_grad]
    gradients = torch.autograd.grad(outputs, [*inputs, *learned], [do, *map(torch.zeros_like, outputs[1:])])
    kept += [*results, *gradients[:len(inputs)]]
    pointers = {x for each in calls for x in each[2]}
    written.append(all(x.data_ptr() in pointers for x in kept[-len(inputs) - len(results):]))
    rounds.append([[each[:2] + [[x for x in each[2] if not isinstance(x, int) or x < 2**32]] for each in calls],
                   [[x for x in each[2] if isinstance(x, int) and x >= 2**32] for each in calls], list(through_triton)])
own = {x.data_ptr() for x in (*inputs, do)}
first, second, third, hooked = rounds
again = {name: sum(len(cache[0]) for cache in kernel.device_caches.values()) for name, kernel in KERNELS.items()}
print(json.dumps(dict(
    compiled_by_warm=again == compiled, direct=[each[2] for each in (first, second, third)], hooked=hooked[2],
    same=[repr(each[0]) == repr(first[0]) for each in (second, third, hooked)],
    passes=[[each[0][1] for each in of_round[0]] for of_round in rounds],
    pointers=[[[x in own for x in launch] for launch in each[1]] for each in (first, second, third, hooked)],
    written=written,
    launches=null.launches - launched)))
"""

CLEARED = START + """
import gc, weakref
from tritonattn.kernels.forward import forward_kernel
q = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16)
for _ in range(3):
    attention(q, q, q)
binaries = [weakref.ref(binary) for cache in forward_kernel.device_caches.values() for binary in cache[0].values()]
forward_kernel.device_caches.clear()
gc.collect()
attention(q, q, q)
print(json.dumps([[binary() is not None for binary in binaries], len(forward_kernel.device_caches), null.launches]))
"""

COUNTED = START + """
import itertools, random
from tritonattn import attention_varlen
from tritonattn.kernels import backward, diagonals, forward, mass
KERNELS = [kernel for module in (forward, backward, diagonals, mass) for name, kernel in vars(module).items()
           if name.endswith("_kernel")]
random.seed(0)
radii = random.Random(1)  # of its own, so that the lengths are those of the plain calls


def more_options():
    # slopes and a table of any radius from 1, a sigmoid with any bias, or others, if asked for
    if VARIANT == "relative":
        return dict(alibi=torch.zeros(2), relative=torch.zeros(2, 2 * radii.randint(1, 40) + 1, requires_grad=True))
    if VARIANT == "sigmoid":
        return dict(normalizer="sigmoid", sigmoid_bias=radii.choice((1, 16, 1.5)))
    if VARIANT == "relu":
        return dict(normalizer="relu")
    if VARIANT == "function":
        from helpers import score_functions
        return dict(score_function=score_functions.Both("penalty").of(attention))
    return dict(return_stats=("max", "entropy", "key_mass")) if VARIANT == "statistics" else {}


def differentiate(o, inputs, options):
    outputs = [o] if isinstance(o, torch.Tensor) else [o[0], o[1]["entropy"], o[1]["key_mass"]]
    inputs += [x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    torch.autograd.grad(outputs, inputs, [torch.zeros_like(x) for x in outputs])
"""

LENGTHS = COUNTED + """
with config.pinned(Config(32, 32)):
    for _ in range(100):
        n_q, n_k = (random.choice((random.randint(1, 200), 32 * random.randint(1, 6))) for _ in range(2))
        q, k, v = (torch.zeros(2, 2, n, 32, dtype=torch.bfloat16, requires_grad=True) for n in (n_q, n_k, n_k))
        options = more_options()
        o = attention(q, k, v, causal=True, align="bottom_right", **options)
        differentiate(o, [q, k, v], options)
print(json.dumps({kernel.__name__: sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in KERNELS}))
"""

PACKED = COUNTED + """
with config.pinned(Config(32, 32)):
    for i in range(40):
        lengths = [random.randint(0, 50) for _ in range(random.choice((1, 2, 15, 16, 17)))]
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        rows = random.choice((starts[-1].item(), 16 * (starts[-1].item() // 16 + 1)))
        q, k, v = (torch.zeros(rows, 2, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        options = more_options()
        o = attention_varlen(q, k, v, starts, starts, max(lengths), max(lengths), causal=True, align="bottom_right", **options)
        if rows:
            differentiate(o, [q, k, v], options)
print(json.dumps({kernel.__name__: sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in KERNELS}))
"""


@pytest.mark.slow  # compiles nine kernels twice
def test_launched_binaries_are_the_inspected_ones():
    """Triton's launch path accepts records as arguments, and compiles the binary that inspect reads."""
    results = compiled(INSPECTED, fresh=True)
    assert len(results) == 9
    for name, (launches, same_launch, same_binary) in results.items():
        assert launches == 1 and same_launch, name
        assert same_binary, f"{name}: the launched binary is not the inspected one"


def test_oversized_config_raises_before_the_launch():
    message, caused, launches = compiled(TOO_LARGE, fresh=True)
    assert re.fullmatch(r"forward: config 128x128w8s6 needs \d+ of shared memory, .+ allows 232448, for .+x1024x128.*; "
                        r"pin a smaller config \(tritonattn\.pinned\)", message), message
    assert caused and not launches


KINDS = "bias", "mask", "passes", "dropout causal", "lengths causal", "bias mask dropout", "sink softcap", "packed causal"
KINDS += "relative", "relative packed", "statistics", "statistics packed sink", "sigmoid bias", "sigmoid packed"
KINDS += "function", "function packed", "function masks"


@pytest.mark.parametrize("kind", ["causal", *slow(*KINDS)])
def test_repeated_calls_launch_directly_with_the_arguments_of_triton(kind):
    """After `warm`, numbers, grids and kinds of pointers are those that Triton gets when a profiler's hook sees the launch."""
    result = compiled(REPEATED.replace("KIND", repr(kind)), fresh=True)
    kernels = ["forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel"] + ["dbias_kernel"] * ("bias" in kind)
    kernels += ["diagonals_kernel"] * ("relative" in kind)
    if "sigmoid" in kind:
        kernels.remove("delta_kernel")
    if "statistics" in kind:
        kernels[1:2] = "key_mass_kernel", "delta_kernel", "mass_delta_kernel"
    assert result["direct"] == [[], [], []] and result["hooked"] == kernels and result["compiled_by_warm"]
    assert result["same"] == [True] * 3
    first, *others = result["pointers"]
    assert all(each == first for each in others) and len(first) == len(kernels)
    assert result["written"] == [True] * 4, "a result is in no launch"
    assert result["launches"] == 4 * len(kernels)
    # the second axis of the grid
    assert result["passes"] == [[2 if kernel == "dkdv_kernel" and kind == "passes" else 1 for kernel in kernels]] * 4


def test_plan_keeps_its_kernel_loaded():
    """Triton unloads a kernel that nothing refers to, and its own cache may be cleared."""
    assert compiled(CLEARED, fresh=True) == [[True], 0, 4]


VARIANTS = pytest.mark.parametrize("variant", ["plain", "relative", "statistics", "sigmoid", "relu", "function"])


@pytest.mark.slow  # compiles six to eleven kernels
@VARIANTS
def test_new_lengths_need_no_new_binary(variant):
    """Two binaries serve all lengths: one for a loop whose last tile is partial, one for a loop whose is not."""
    counts = compiled(LENGTHS.replace("VARIANT", repr(variant)), fresh=True)
    mass, delta = 2 * (variant == "statistics"), int(variant not in ("sigmoid", "relu"))
    assert counts == {"forward_kernel": 2, "delta_kernel": delta, "dq_kernel": 2, "dkdv_kernel": 2, "dbias_kernel": 0,
                      "diagonals_kernel": int(variant == "relative"), "key_mass_kernel": mass, "mass_delta_kernel": mass,
                      "map_kernel": 0}


@pytest.mark.slow  # compiles three to six kernels
@VARIANTS
def test_packed_sequences_need_one_binary(variant):
    """Whatever the numbers of rows and sequences are: 1, multiples of 16, or others."""
    counts = compiled(PACKED.replace("VARIANT", repr(variant)), fresh=True)
    mass, delta = int(variant == "statistics"), int(variant not in ("sigmoid", "relu"))
    assert counts == {"forward_kernel": 1, "delta_kernel": delta, "dq_kernel": 1, "dkdv_kernel": 1, "dbias_kernel": 0,
                      "diagonals_kernel": int(variant == "relative"), "key_mass_kernel": mass, "mass_delta_kernel": mass,
                      "map_kernel": 0}
