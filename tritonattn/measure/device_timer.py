"""Device timers: CUDA events, or the host clock; and the GPU's sensors of clock, temperature and power."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class State:
    """The sensors of a GPU: MHz, degrees Celsius, watts, and the reasons that limit its clock."""

    clock: float
    temperature: float
    power: float
    reasons: tuple[str, ...] = ()

    @property
    def throttled(self) -> bool:
        """True if heat or the power supply limits the clock. The power cap does not count: large products normally reach it."""
        return any(reason != "power cap" for reason in self.reasons)


class Host:
    """The host clock, for kernels in the interpreter on the CPU. Only the ranking of such times is meaningful."""

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

    def mean(self, call: Call, times: int) -> tuple[float, State | None]:
        return sum(self.sample(call, 0.0) for _ in range(times)) / times, None

    def capture(self, call: Call) -> Call:
        raise NotImplementedError("graphs need a GPU")

    def state(self) -> State | None:
        return None

    def peak_bytes(self, call: Call) -> int | None:
        return None


class Cuda:
    """A GPU, timed by CUDA events on a separate stream."""

    method = "events"

    def __init__(self, device: torch.device):
        self.device = torch.device(device)
        self.cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        self._filler = torch.zeros(self.cache_bytes // 2, dtype=torch.float32, device=self.device)  # twice the cache's size
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        self._stream = torch.cuda.Stream(self.device)
        self.state = Sensors(self.device).state

    def now(self) -> float:
        return time.perf_counter()

    @contextlib.contextmanager
    def context(self):
        """Use one stream for everything: a backward pass runs, and is captured, on the stream of its forward pass."""
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                yield
            torch.cuda.current_stream().wait_stream(self._stream)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def sample(self, call: Call, wait: float) -> float:
        """Return the seconds between events around a call that starts with a cold cache.

        Only the start is cold: a call that repeats a kernel finds the data of its first repetition in the cache. The device
        first waits `wait` seconds, so that the host can issue the whole call.
        """
        start, _, end = self._events
        self._flush()
        torch.cuda._sleep(int(max(wait, 20e-6) * 2e9))  # in cycles at 2 GHz; longer at a lower clock
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def _flush(self) -> None:
        # a read, since data that a write leaves in the cache would be written back during the sample
        self._filler.sum()

    def host_seconds(self, call: Call, times: int) -> float:
        """Return the seconds that the host needs to issue a call; `times` must not fill the launch queue."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            call()
        spent = time.perf_counter() - start
        self.synchronize()
        return spent / times

    def mean(self, call: Call, times: int) -> tuple[float, State | None]:
        """Return the mean seconds of so many calls without pauses between them, and the sensors when half of them have run."""
        start, middle, end = self._events
        half = math.ceil(times / 2)
        start.record()
        for number in range(times):
            call()
            if number + 1 == half:
                middle.record()
        end.record()
        # the host is far ahead of the device: it has issued all calls, often before the first has run
        middle.synchronize()
        state = self.state()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / times, state

    def capture(self, call: Call) -> Call:
        """Capture the call in a CUDA graph and return its replay."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            call()
        return graph.replay

    def peak_bytes(self, call: Call) -> int:
        """Return the peak of torch's allocated memory during a call, above what was allocated before."""
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before


class Sensors:
    """NVIDIA's sensors of a GPU, read with nvidia-ml-py; `missing` is the reason if they cannot be read."""

    # NVML's reasons for a limited clock, without an idle GPU and the user's own settings
    REASONS = {0x04: "power cap", 0x08: "hardware slowdown", 0x20: "software thermal slowdown",
               0x40: "hardware thermal slowdown", 0x80: "power brake"}

    def __init__(self, device: torch.device):
        self.missing: str | None = None
        try:
            import pynvml
        except ImportError:
            self.missing = "nvidia-ml-py is not installed"
            return
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            self._read()
        except pynvml.NVMLError as error:
            # a MIG slice has no sensors, and a container may lack the driver's library
            self.missing = f"NVML: {error}"

    def state(self) -> State | None:
        """Read the sensors; None if they fail, which must not end a measurement."""
        try:
            return None if self.missing else self._read()
        except self._nvml.NVMLError:
            return None

    def _read(self) -> State:
        nvml, handle = self._nvml, self._handle
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return State(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                     nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
                     nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
                     tuple(reason for bit, reason in self.REASONS.items() if bits & bit))


def timer_of(device: torch.device) -> "Cuda | Host":
    """Return the timer for tensors of this device."""
    return Cuda(device) if torch.device(device).type == "cuda" else Host()
