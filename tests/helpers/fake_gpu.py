"""A fake GPU for tests of timing: a virtual clock that calls advance, with drift, sensors and graphs that can fail."""

import contextlib

from tritonattn.measure.device_timer import State


class FakeGpu:
    """A stand-in for measure.device_timer.Cuda. `seconds(true, gpu)` is the duration of a call now."""

    method, cache_bytes = "events", 1000

    def __init__(self, seconds=lambda true, gpu: true, states=None, graphs=True):
        self.time, self.seconds, self.states, self.graphs = 0.0, seconds, states, graphs
        self.log, self.waits, self.flushes, self.reads, self.dead = [], [], 0, 0, False

    def kernel(self, name, true=1e-3):
        """Return a call that takes `true` seconds on this GPU without drift."""
        def call():
            self.log.append(name)
            self.time += self.seconds(true, self)

        return call

    def now(self):
        return self.time

    def context(self):
        return contextlib.nullcontext()

    def synchronize(self):
        if self.dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def sample(self, call, wait):
        self.flushes += 1
        self.waits.append(wait)
        start = self.time
        call()
        return self.time - start

    def host_seconds(self, call, times):
        for _ in range(times):
            call()
        return 1e-5

    def mean(self, call, times):
        start = self.time
        for _ in range(times):
            call()
        return (self.time - start) / times, self.state()

    def capture(self, call):
        if self.graphs:
            call()
            return call
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        finally:
            # torch raises a second error too, because a failed capture cannot be ended
            raise RuntimeError("operation failed due to a previous error during capture")

    def state(self):
        if self.states is None:
            return None
        self.reads += 1
        return self.states(self.reads)

    def peak_bytes(self, call):
        call()
        return 4096


def steady(reads):
    return State(clock=1980.0, temperature=50.0, power=400.0)
