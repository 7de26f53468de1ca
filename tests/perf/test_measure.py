"""A job: who is wrong is not timed, who fails says how, what is recorded is what happened."""

import contextlib
import types
import weakref

import pytest
import torch

from perf import baselines, measure
from perf.baselines import Refused, Rival
from perf.cases import CAUSAL, Case, problem
from tests.helpers.fake_gpu import FakeGpu, steady
from tritonattn import reference
from tritonattn.measure import device_timer, timing

CPU = torch.device("cpu")
CASE = Case("small", problem(2, (4, 2), 16, 8, CAUSAL, dtype=torch.float32), ("forward", "backward", "both"))
EFFORT = timing.TimingBudget(seconds=0.01, settle=(0, 0))


def correct(q, k, v):
    return reference.attention(q, k, v, causal=True)


class Counted:
    """A contender whose calls are counted; each pass takes `seconds` on the fake GPU."""

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


def rival(name, function):
    return Rival(name, lambda posed, device: function)


def outcome(gpu, contenders, direction="forward", case=CASE, **options):
    return measure.job(measure.Bench(CPU, gpu, EFFORT), case, direction, contenders, **options)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_a_right_contender_is_timed(direction):
    gpu = FakeGpu(states=steady)
    found = outcome(gpu, [rival("a", Counted(gpu)), rival("b", Counted(gpu, seconds=2e-3))], direction)
    for name, seconds in (("a", 1e-3), ("b", 2e-3)):
        result = found["results"][name]
        assert result["status"] == "ok" and result["seconds"] == pytest.approx(2 * seconds if direction == "both" else seconds)
        assert set(result["details"]["errors"]) == set(measure.TENSORS[direction]) and result["details"]["repeatable"]
        assert all(error <= allowed for error, allowed in result["details"]["errors"].values())
        # no profiler has been near it
        assert result["details"]["peak_bytes"] == 4096 and "kernels" not in result["details"]
    assert found["state"]["clock"] == 1980.0 and found["state"]["rounds"] > 0


@pytest.mark.parametrize(("name", "plant"), [
    ("o", lambda q, k, v: correct(q, k, v) * 1.001),
    ("o", lambda q, k, v: reference.attention(q, k, v)),
    ("o", lambda q, k, v: correct(q, k, v) * torch.nan),
    ("dv", lambda q, k, v: correct(q, k, v.detach()) + 0 * v.sum()),
    ("dq", lambda q, k, v: correct(q.detach(), k, v) + 0 * q.sum()),
])
def test_a_wrong_contender_is_not_timed(name, plant):
    gpu = FakeGpu()
    wrong, right = Counted(gpu, plant), Counted(gpu)
    found = outcome(gpu, [rival("wrong", wrong), rival("right", right)], "both")["results"]
    assert found["wrong"]["status"] == "wrong" and f"{name} is off by" in found["wrong"]["reason"]
    assert "seconds" not in found["wrong"] and wrong.count == 2 < right.count and found["right"]["status"] == "ok"


def test_what_cannot_be_repeated_is_said():
    gpu, seen = FakeGpu(), []

    def noisy(q, k, v):
        seen.append(1)
        return correct(q, k, v) + 1e-8 * len(seen)

    assert not outcome(gpu, [rival("noisy", noisy)])["results"]["noisy"]["details"]["repeatable"]


def raising(error):
    def build(posed, device):
        raise error

    return build


@pytest.mark.parametrize(("error", "status", "reason"), [
    (Refused("no windows"), "refused", "no windows"),
    (RuntimeError("No available kernel. Aborting."), "refused", "RuntimeError: No available kernel. Aborting."),
    (torch.OutOfMemoryError("want\n  more"), "failed", "OutOfMemoryError: want more"),
    (TypeError("x" * 1000), "failed", "TypeError: " + "x" * 300),
])
def test_who_does_not_run_says_why(error, status, reason):
    gpu = FakeGpu()
    found = outcome(gpu, [Rival("odd", raising(error)), rival("right", Counted(gpu))])["results"]
    assert found["odd"] == {"status": status, "reason": reason} and found["right"]["status"] == "ok"


def test_who_fails_while_timed_is_taken_out_and_the_others_are_timed_anew():
    gpu = FakeGpu()

    class Failing(Counted):
        def __call__(self, *inputs):
            if self.count > 30:
                raise ValueError("worn out")
            return super().__call__(*inputs)

    found = outcome(gpu, [rival("worn", Failing(gpu)), rival("right", Counted(gpu))])["results"]
    assert found["worn"] == {"status": "failed", "reason": "ValueError: worn out"}
    assert found["right"]["seconds"] == pytest.approx(1e-3)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_who_is_taken_out_leaves_its_memory_to_the_others(direction):
    gpu, held = FakeGpu(), []

    class Hoarding(Counted):
        """Fails once it is timed, and holds much memory."""

        def spend(self, _=None):
            super().spend()
            if len(self.gpu.waits) > 10:
                raise ValueError("worn out")

    def build(posed, device):
        hoarding = Hoarding(gpu)
        held.append(weakref.ref(hoarding))
        return hoarding

    class Watching(Counted):
        def spend(self, _=None):
            super().spend()
            freed.append(bool(held) and held[0]() is None)

    freed = []
    # the hoarder comes last, so that no name left over from another turn of a loop can hide it
    found = outcome(gpu, [rival("right", Watching(gpu)), Rival("hoarding", build)], direction)["results"]
    assert found["hoarding"]["reason"] == "ValueError: worn out" and found["right"]["status"] == "ok"
    assert not freed[0] and all(freed[-50:])


def test_surroundings_are_entered_for_checking_and_timing():
    depth, seen = [], []

    @contextlib.contextmanager
    def around():
        depth.append(1)
        yield
        depth.pop()

    def watched(q, k, v):
        seen.append(len(depth))
        return correct(q, k, v)

    outcome(FakeGpu(), [Rival("a", lambda posed, device: watched, around=around)])
    assert len(seen) > 10 and set(seen) == {1} and not depth


@pytest.mark.parametrize("spoil", [torch.inf, torch.nan])
def test_what_torch_cannot_compute_is_no_measure(spoil, monkeypatch):
    by_heads = reference.by_heads
    monkeypatch.setattr(reference, "by_heads", lambda *inputs, dtype, **options: tuple(
        x * spoil if dtype == torch.bfloat16 else x for x in by_heads(*inputs, dtype=dtype, **options)))
    case = Case("x", problem(1, 2, 16, 8), ("both",))
    with pytest.raises(ValueError, match=r"o, dq, dk, dv: expected finite numbers from the definition in torch.bfloat16"):
        measure.truth(case, measure.draw(case.problem, CPU, 1)[0])


class FakeProfile:
    """A profiler that loses the first kernels of a session."""

    def __init__(self, log, loses):
        self.log, self.loses = log, loses

    def __call__(self, activities):
        return self

    def __enter__(self):
        self.log.clear()
        return self

    def __exit__(self, *_):
        pass

    def events(self):
        cuda = torch.autograd.DeviceType.CUDA
        return [types.SimpleNamespace(name=name, device_type=cuda, self_device_time_total=time)
                for name, time in self.log[self.loses:]]


@pytest.mark.parametrize(("loses", "names"), [(0, ["long", "short"]), (measure.BURST, ["long", "short"]),
                                              (10**6, ["not seen"])])
def test_kernels_are_named_although_a_session_loses_its_first(loses, names, monkeypatch):
    log = []
    monkeypatch.setattr(torch.profiler, "profile", FakeProfile(log, loses))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(("at::cuda::spin_kernel(long)", 50)), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert measure.kernels(lambda: log.extend([("short", 3), ("long", 5)]), CPU) == names


def test_a_contender_that_cannot_be_named_says_why(monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "kernels", lambda call, device: [call()[0].shape, calls.append(1)][:1])
    bench = measure.Bench(CPU, FakeGpu(), EFFORT)
    found = measure.names(bench, CASE, "both", [rival("a", correct), Rival("b", raising(TypeError("no")))])
    assert found == {"a": [torch.Size([2, 4, 16, 8])], "b": ["not read: TypeError: no"]} and len(calls) == 1


def test_a_lost_device_is_no_ordinary_failure():
    gpu = FakeGpu()

    def fatal(q, k, v):
        gpu.dead = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(measure.DeviceLost, match="fatal: RuntimeError: CUDA error") as lost:
        outcome(gpu, [rival("right", Counted(gpu)), rival("fatal", fatal)])
    assert lost.value.name == "fatal"
    both = [rival("right", correct), rival("fatal", fatal)]
    found = outcome(FakeGpu(), both, without={"fatal": "lost the device"})["results"]
    assert found["fatal"] == {"status": "failed", "reason": "lost the device"} and found["right"]["status"] == "ok"


def test_tensors_that_do_not_fit_are_not_drawn():
    large = Case("large", problem(128, 32, (1, 131072), 128), ("forward",))
    found = outcome(FakeGpu(), [rival("a", correct)], case=large)
    assert found["results"]["a"]["status"] == "refused" and "its tensors are 256 GiB" in found["results"]["a"]["reason"]


def test_missing_rivals_are_listed_in_order():
    gpu = FakeGpu()
    found = outcome(gpu, [Rival("z", raising(AssertionError), "not installed"), rival("a", Counted(gpu))])["results"]
    assert list(found) == ["z", "a"] and found["z"] == {"status": "missing", "reason": "not installed"}


def test_inputs_are_random_and_small_ones_are_copied_beyond_the_cache():
    posed = problem(1, 2, 64, 16)
    assert measure._copies(posed, 0) == 1 and measure._copies(posed, posed.bytes() // 2) == 1
    assert measure._copies(posed, 4 * posed.bytes()) == 12 and measure._copies(posed, 10**9) == measure.COPIES
    copies = measure.draw(posed, CPU, 3)
    flat = torch.stack([x.flatten().float() for copy in copies for x in copy])
    assert flat.shape == (12, 2 * 64 * 16) and flat.unique(dim=0).shape == flat.shape
    assert 0.9 < flat.std() < 1.1 and flat.mean().abs() < 0.05


def test_large_problems_are_held_against_float32(monkeypatch):
    dtypes = []
    by_heads = reference.by_heads
    monkeypatch.setattr(reference, "by_heads", lambda *inputs, dtype, **options: (
        dtypes.append(dtype), by_heads(*inputs, dtype=dtype, **options))[1])
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        for limit, exact in ((0, wide), (2**31, torch.float64)):
            monkeypatch.setattr(measure, "LARGE", limit)
            case = Case("x", problem(1, 2, 16, 8, dtype=dtype), ("forward",))
            measure.truth(case, measure.draw(case.problem, CPU, 1)[0])
            assert dtypes[-2:] == [exact, dtype]


@pytest.mark.gpu
def test_the_kernels_that_ran_are_named(device):
    x = torch.randn(4096, 4096, device=device)
    names = measure.kernels(lambda: (x @ x).softmax(-1), device)
    assert any("gemm" in name.lower() or "cutlass" in name.lower() for name in names)
    assert any("softmax" in name.lower() for name in names)


@pytest.fixture
def as_users_run(unwritten_memory_is_nan):
    """Without the deterministic algorithms that tests ask for, which cuDNN has not."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_rivals_are_right_and_timed_in_every_direction(direction, device):
    here, stopwatch = baselines.everyone("cuda"), device_timer.timer_of(device)
    case = Case("causal 512", problem(2, 4, 512, 64, CAUSAL), ("forward", "backward", "both"))
    contenders = [here[name] for name in ("tritonattn", "torch", "cudnn", "flash", "efficient", "flex", "eager")]
    found = measure.job(measure.Bench(torch.device(device), stopwatch, EFFORT), case, direction, contenders)["results"]
    assert {name: result["status"] for name, result in found.items()} == {rival.name: "ok" for rival in contenders}, found
