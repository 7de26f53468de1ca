"""What keeps the time: a GPU by its own events, or the host; and what a GPU says of its clocks, heat and power."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class State:
    """What the device says of itself: MHz, degrees Celsius, watts, and why its clocks are not higher."""

    clock: float
    temperature: float
    power: float
    reasons: tuple[str, ...] = ()

    @property
    def throttled(self) -> bool:
        """Held back by heat or by its supply. The ordinary limit of power is not counted: it is how large products run."""
        return any(reason != "power cap" for reason in self.reasons)


class Host:
    """A device without events: kernels in the interpreter on the CPU. Only the order of its times means anything."""

    method, cache_bytes = "host", 0

    def now(self) -> float:
        return time.perf_counter()

    def context(self):
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        pass

    def sample(self, call: Call, wait: float) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def host_seconds(self, call: Call, times: int) -> float:
        return self.sample(call, 0.0)

    def capture(self, call: Call) -> Call:
        raise NotImplementedError("graphs need a GPU")

    def state(self) -> State | None:
        return None

    def peak_bytes(self, call: Call) -> int | None:
        return None


class Cuda:
    """A GPU, timed by its own events on a stream of its own."""

    method = "events"

    def __init__(self, device: torch.device):
        self.device = torch.device(device)
        properties = torch.cuda.get_device_properties(self.device)
        self.cache_bytes = properties.L2_cache_size
        self._filler = torch.zeros(self.cache_bytes // 2, dtype=torch.float32, device=self.device)  # twice the cache
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._stream = torch.cuda.Stream(self.device)
        self._sensors, _ = _Nvml.of(properties)

    def now(self) -> float:
        return time.perf_counter()

    @contextlib.contextmanager
    def context(self):
        """One stream for everything, forward passes too: a backward pass runs on its forward's, and is captured there."""
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                yield
            torch.cuda.current_stream().wait_stream(self._stream)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def sample(self, call: Call, wait: float) -> float:
        """Seconds between the events around a call, which begins on a cache that holds nothing of its inputs.

        A call that runs a kernel many times begins so too, but what its first runs leave in the cache its later ones find.
        The device waits `wait` seconds first, so that the host can issue the call meanwhile.
        """
        start, end = self._events
        self._flush()
        torch.cuda._sleep(int(max(wait, 20e-6) * 2e9))  # in cycles; at a lower clock it only lasts longer
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def _flush(self) -> None:
        # read, not written: what a write leaves in the cache goes back to memory during the sample
        self._filler.sum()

    def host_seconds(self, call: Call, times: int) -> float:
        """Seconds the host needs to issue a call; few enough that it need not wait for a place in the queue."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            call()
        spent = time.perf_counter() - start
        self.synchronize()
        return spent / times

    def capture(self, call: Call) -> Call:
        """The call as a graph, to be replayed."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            call()
        return graph.replay

    def state(self) -> State | None:
        return self._sensors.state() if self._sensors else None

    def peak_bytes(self, call: Call) -> int:
        """The most memory that torch's allocator held during a call, above what it held before."""
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before


class _Nvml:
    """NVIDIA's own sensors, where nvidia-ml-py is installed."""

    # of NVML's reasons those that mean the clocks are held back; an idle GPU and a user's setting are none
    REASONS = {0x04: "power cap", 0x08: "hardware slowdown", 0x20: "software thermal slowdown",
               0x40: "hardware thermal slowdown", 0x80: "power brake"}

    def __init__(self, nvml, handle):
        self._nvml, self._handle = nvml, handle

    @staticmethod
    def of(properties) -> "tuple[_Nvml | None, str | None]":
        """The sensors of a GPU, or the reason why there are none."""
        try:
            import pynvml
        except ImportError:
            return None, "nvidia-ml-py is not installed"
        try:
            pynvml.nvmlInit()
            sensors = _Nvml(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}"))
            sensors._read()
        except pynvml.NVMLError as error:
            # a slice of a GPU has no sensors of its own, and a container may not reach the driver's library
            return None, f"NVML: {error}"
        return sensors, None

    def state(self) -> State | None:
        """What the sensors say; None where they fail this time, which is no reason to lose a measurement."""
        try:
            return self._read()
        except self._nvml.NVMLError:
            return None

    def _read(self) -> State:
        nvml, handle = self._nvml, self._handle
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return State(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                     nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
                     nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
                     tuple(reason for bit, reason in self.REASONS.items() if bits & bit))


def missing_sensors(device: torch.device) -> str | None:
    """Why a GPU says nothing of its clocks, heat and power; None if it does."""
    return _Nvml.of(torch.cuda.get_device_properties(device))[1]


def timer_of(device: torch.device) -> "Cuda | Host":
    """The stopwatch that goes with tensors of this device."""
    return Cuda(device) if torch.device(device).type == "cuda" else Host()
