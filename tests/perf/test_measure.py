"""Jobs: wrong implementations are not timed, failures have a reason, and outcomes record what ran."""

import contextlib
import weakref
from types import MappingProxyType

import pytest
import torch

from perf import baselines, measure
from perf.baselines import Implementation, Unsupported
from perf.cases import CAUSAL, Case, problem
from tests.helpers.fake_gpu import FakeGpu, steady
from tritonattn import reference
from tritonattn.measure import device_timer, timing

CPU = torch.device("cpu")
CASE = Case("small", problem(2, (4, 2), 16, 8, CAUSAL, dtype=torch.float32), ("forward", "backward", "both"))
BUDGET = timing.TimingBudget(seconds=0.01, settle=(0, 0))


def correct(q, k, v):
    return reference.attention(q, k, v, causal=True)


class Counted:
    """An attention function that counts its calls; each pass takes `seconds` on the fake GPU."""

    def __init__(self, gpu, function=correct, seconds=1e-3):
        self.gpu, self.function, self.seconds, self.count = gpu, function, seconds, 0

    def __call__(self, q, k, v):
        self.count += 1
        self.spend()
        o = self.function(q, k, v)
        if o.requires_grad:
            o.register_hook(self.spend)
        return o

    def spend(self, _=None):
        self.gpu.time += self.seconds


def implementation(name, function):
    return Implementation(name, lambda problem, device: function)


def outcome(gpu, implementations, direction="forward", case=CASE, excluded=MappingProxyType({})):
    return measure.measure_job(measure.Setup(CPU, gpu, BUDGET), case, direction, implementations, excluded)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_correct_implementation_is_timed(direction):
    gpu = FakeGpu(states=steady)
    outcomes = outcome(gpu, [implementation("a", Counted(gpu)), implementation("b", Counted(gpu, seconds=2e-3))], direction)
    for name, seconds in (("a", 1e-3), ("b", 2e-3)):
        result = outcomes["results"][name]
        assert result["status"] == "ok" and result["seconds"] == pytest.approx(2 * seconds if direction == "both" else seconds)
        assert set(result["details"]["errors"]) == set(measure.TENSORS[direction]) and result["details"]["repeatable"]
        assert all(error <= allowed for error, allowed in result["details"]["errors"].values())
        assert result["details"]["peak_bytes"] == 4096
    assert outcomes["state"]["clock"] == 1980.0 and outcomes["state"]["rounds"] > 0


@pytest.mark.parametrize(("name", "function"), [
    ("o", lambda q, k, v: correct(q, k, v) * 1.001),
    ("o", lambda q, k, v: reference.attention(q, k, v)),
    ("o", lambda q, k, v: correct(q, k, v) * torch.nan),
    ("dv", lambda q, k, v: correct(q, k, v.detach()) + 0 * v.sum()),
    ("dq", lambda q, k, v: correct(q.detach(), k, v) + 0 * q.sum()),
])
def test_wrong_implementation_is_not_timed(name, function):
    gpu = FakeGpu()
    wrong, right = Counted(gpu, function), Counted(gpu)
    outcomes = outcome(gpu, [implementation("wrong", wrong), implementation("right", right)], "both")["results"]
    assert outcomes["wrong"]["status"] == "wrong" and f"{name}: error" in outcomes["wrong"]["reason"]
    assert "seconds" not in outcomes["wrong"] and wrong.count == 2 < right.count and outcomes["right"]["status"] == "ok"


def test_nondeterministic_results_are_recorded():
    gpu, calls = FakeGpu(), []

    def noisy(q, k, v):
        calls.append(1)
        return correct(q, k, v) + 1e-8 * len(calls)

    assert not outcome(gpu, [implementation("noisy", Counted(gpu, noisy))])["results"]["noisy"]["details"]["repeatable"]


def raising(error):
    def build(problem, device):
        raise error

    return build


@pytest.mark.parametrize(("error", "status", "reason"), [
    (Unsupported("no windows"), "refused", "no windows"),
    (RuntimeError("No available kernel. Aborting."), "refused", "RuntimeError: No available kernel. Aborting."),
    (torch.OutOfMemoryError("want\n  more"), "failed", "OutOfMemoryError: want more"),
    (TypeError("x" * 1000), "failed", "TypeError: " + "x" * 300),
])
def test_implementation_that_raises_has_a_reason(error, status, reason):
    gpu = FakeGpu()
    outcomes = outcome(gpu, [Implementation("odd", raising(error)), implementation("right", Counted(gpu))])["results"]
    assert outcomes["odd"] == {"status": status, "reason": reason} and outcomes["right"]["status"] == "ok"


def test_failure_during_timing_removes_one_and_times_the_others_again():
    gpu = FakeGpu()

    class Failing(Counted):
        def __call__(self, *inputs):
            if self.count > 30:
                raise ValueError("worn out")
            return super().__call__(*inputs)

    outcomes = outcome(gpu, [implementation("worn", Failing(gpu)), implementation("right", Counted(gpu))])["results"]
    assert outcomes["worn"] == {"status": "failed", "reason": "ValueError: worn out"}
    assert outcomes["right"]["seconds"] == pytest.approx(1e-3)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_removed_implementation_frees_its_memory(direction):
    gpu, held = FakeGpu(), []

    class Hoarding(Counted):
        """Fails during timing."""

        def spend(self, _=None):
            super().spend()
            if len(self.gpu.waits) > 10:
                raise ValueError("worn out")

    def build(problem, device):
        hoarding = Hoarding(gpu)
        held.append(weakref.ref(hoarding))
        return hoarding

    class Watching(Counted):
        def spend(self, _=None):
            super().spend()
            freed.append(bool(held) and held[0]() is None)

    freed = []
    # last in the list: a loop variable could keep an earlier one alive
    outcomes = outcome(gpu, [implementation("right", Watching(gpu)), Implementation("hoarding", build)], direction)["results"]
    assert outcomes["hoarding"]["reason"] == "ValueError: worn out" and outcomes["right"]["status"] == "ok"
    assert not freed[0] and all(freed[-50:])


def test_context_is_entered_for_checking_and_timing():
    gpu, depth, depths = FakeGpu(), [], []

    @contextlib.contextmanager
    def context():
        depth.append(1)
        yield
        depth.pop()

    def watched(q, k, v):
        depths.append(len(depth))
        return correct(q, k, v)

    outcome(gpu, [Implementation("a", lambda problem, device: Counted(gpu, watched), context=context)])
    assert len(depths) > 10 and set(depths) == {1} and not depth


@pytest.mark.parametrize("spoil", [torch.inf, torch.nan])
def test_definition_that_is_not_finite_is_an_error(spoil, monkeypatch):
    by_heads = reference.by_heads
    monkeypatch.setattr(reference, "by_heads", lambda *inputs, dtype, **options: tuple(
        x * spoil if dtype == torch.bfloat16 else x for x in by_heads(*inputs, dtype=dtype, **options)))
    case = Case("x", problem(1, 2, 16, 8), ("both",))
    with pytest.raises(ValueError, match=r"o, dq, dk, dv: the definition in torch.bfloat16 is not finite"):
        measure.expected_tensors(case, measure.draw_inputs(case.problem, CPU, 1)[0])


def test_lost_device_raises():
    gpu = FakeGpu()

    def fatal(q, k, v):
        gpu.dead = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(measure.DeviceLost, match="fatal: RuntimeError: CUDA error") as lost:
        outcome(gpu, [implementation("right", Counted(gpu)), implementation("fatal", fatal)])
    assert lost.value.name == "fatal"
    gpu.dead = False
    both = [implementation("right", Counted(gpu)), implementation("fatal", fatal)]
    outcomes = outcome(gpu, both, excluded={"fatal": "lost the device"})["results"]
    assert outcomes["fatal"] == {"status": "failed", "reason": "lost the device"} and outcomes["right"]["status"] == "ok"


def test_inputs_that_exceed_memory_are_not_allocated():
    large = Case("large", problem(128, 32, (1, 131072), 128), ("forward",))
    outcomes = outcome(FakeGpu(), [implementation("a", correct)], case=large)
    assert outcomes["results"]["a"]["status"] == "refused" and "the tensors need 256 GiB" in outcomes["results"]["a"]["reason"]


def test_missing_implementations_are_listed_in_order():
    gpu = FakeGpu()
    both = [Implementation("z", raising(AssertionError), "not installed"), implementation("a", Counted(gpu))]
    outcomes = outcome(gpu, both)["results"]
    assert list(outcomes) == ["z", "a"] and outcomes["z"] == {"status": "missing", "reason": "not installed"}


def test_inputs_are_random_and_copies_exceed_the_cache():
    small = problem(1, 2, 64, 16)
    assert measure.copies_needed(small, 0) == 1 and measure.copies_needed(small, small.bytes() // 2) == 1
    assert measure.copies_needed(small, 4 * small.bytes()) == 12 and measure.copies_needed(small, 10**9) == measure.MAX_COPIES
    copies = measure.draw_inputs(small, CPU, 3)
    flat = torch.stack([x.flatten().float() for copy in copies for x in copy])
    assert flat.shape == (12, 2 * 64 * 16) and flat.unique(dim=0).shape == flat.shape
    assert 0.9 < flat.std() < 1.1 and flat.mean().abs() < 0.05


def test_large_problems_are_checked_against_float32(monkeypatch):
    dtypes = []
    by_heads = reference.by_heads
    monkeypatch.setattr(reference, "by_heads", lambda *inputs, dtype, **options: (
        dtypes.append(dtype), by_heads(*inputs, dtype=dtype, **options))[1])
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        for limit, exact in ((0, wide), (2**31, torch.float64)):
            monkeypatch.setattr(measure, "FLOAT32_PAIRS", limit)
            case = Case("x", problem(1, 2, 16, 8, dtype=dtype), ("forward",))
            measure.expected_tensors(case, measure.draw_inputs(case.problem, CPU, 1)[0])
            assert dtypes[-2:] == [exact, dtype]


@pytest.fixture
def nondeterministic(unwritten_memory_is_nan):
    """Turn off deterministic algorithms, which cuDNN does not have."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("nondeterministic")
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_baselines_are_correct_and_timed_in_every_direction(direction, device):
    known, timer = baselines.implementations("cuda"), device_timer.timer_of(device)
    case = Case("causal 512", problem(2, 4, 512, 64, CAUSAL), ("forward", "backward", "both"))
    selected = [known[name] for name in ("tritonattn", "torch", "cudnn", "flash", "efficient", "flex", "eager")]
    outcomes = measure.measure_job(measure.Setup(torch.device(device), timer, BUDGET), case, direction, selected, {})["results"]
    assert {name: result["status"] for name, result in outcomes.items()} == {each.name: "ok" for each in selected}, outcomes
