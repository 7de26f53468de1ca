"""`import tritonattn`: the public names, what it loads, and what it costs."""

import pytest

import tritonattn
from tests.helpers.compile_server import compiled

PROGRAM = """
import json, sys, time, torch, triton
import torch._dynamo  # our import needs it too, for torch.compiler.allow_in_graph; it takes ten times as long as ours
sys.path.append("tests")  # the package `tests` would set TRITON_INTERPRET
from helpers.cpu_speed import slowness
before, busy = set(sys.modules), slowness()
began = time.thread_time()
import tritonattn
seconds = time.thread_time() - began
after_import = sorted(set(sys.modules) - before)
tritonattn.tune, tritonattn.explain, tritonattn.record_problems
print(json.dumps([after_import, seconds, max(busy, slowness()), dir(tritonattn), sorted(set(sys.modules) - before)]))
"""
UNUSED = ("pynvml", "torch.utils.collect_env", "transformers", "matplotlib", "numpy", "tritonattn.autotune",
          "tritonattn.analysis", "tritonattn.measure", "tritonattn.cli", "tritonattn.integrations.transformers")


def test_import_loads_no_tuning_no_inspection_and_is_fast():
    loaded, seconds, slowness, names, later = compiled(PROGRAM, fresh=True)
    assert not [name for name in loaded if name in UNUSED or name.startswith(tuple(f"{unused}." for unused in UNUSED))]
    assert {"tritonattn.autotune.record_problems", "tritonattn.analysis.explain"} <= set(later)
    assert set(tritonattn.__all__) <= set(names)
    # 0.23 s on a busy machine, where a bare loop takes about 1.5 times as long as on an idle core
    assert seconds < 0.16 * slowness, f"import takes {seconds:.2f} s of the processor, slowness {slowness:.2f}"


def test_every_public_name_resolves():
    assert all(getattr(tritonattn, name) is not None for name in tritonattn.__all__)
    with pytest.raises(AttributeError, match="module 'tritonattn' has no attribute 'tile_map'"):
        _ = tritonattn.tile_map


AUTOTUNE = """
import json, sys, warnings
import os
os.environ["TRITONATTN_AUTOTUNE"] = "fast"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import tritonattn
print(json.dumps(["tritonattn.autotune.first_call" in sys.modules, [str(each.message) for each in caught]]))
"""


def test_the_environment_variable_installs_tuning_at_the_first_call():
    loaded, messages = compiled(AUTOTUNE, fresh=True)
    assert loaded and any(message.startswith("TRITONATTN_AUTOTUNE: expected quick or off, got 'fast'") for message in messages)
