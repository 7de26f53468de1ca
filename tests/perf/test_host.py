"""Host time of a call as a multiple of a plain Triton launch, measured in the same rounds. The limits leave room for noise."""

import os
import subprocess
import sys

import pytest

from perf import host
from tests.helpers.compile_server import compiled

MEASURE = """
import json
from perf import host, null_driver
null_driver.install()
print(json.dumps(host.measure(rounds=30)))
"""


def test_repeated_calls_are_cheap():
    seconds = compiled(MEASURE, fresh=True)
    launches = {name: value / seconds[host.UNIT] for name, value in seconds.items()}
    assert launches["forward"] < 3, launches                # goal: 2
    assert launches["forward, one query"] < 3, launches
    assert launches["forward and backward"] < 14, launches  # goal: 8, of which torch's autograd takes 3
    own, patched = (seconds[name] for name in ("scaled_dot_product_attention", "patched F.scaled_dot_product_attention"))
    assert patched < 1.5 * own, launches                    # goal: 1.2


@pytest.mark.slow  # starts a process
def test_unknown_case_is_an_error():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-m", "perf.host", "--profile", "sideways"], capture_output=True, text=True,
                         env=environment)
    assert run.returncode == 2 and "expected one of plain Triton kernel" in run.stderr
