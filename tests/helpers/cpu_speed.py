"""Slowness of this machine now. Bounds on time hold for an idle reference core; tests multiply them by the slowness."""

import threading
import time

REFERENCE = 0.035  # seconds of `_bare_loop` on that core, in the fastest third of the samples


def _bare_loop():
    start = time.thread_time()
    sum(i * i for i in range(1_000_000))
    return time.thread_time() - start


def slowness() -> float:
    """Return the time of the loop over its time on the reference core, at least 1; the best of three."""
    return max(1.0, min(_bare_loop() for _ in range(3)) / REFERENCE)


class Watch(threading.Thread):
    """Mean slowness over a block that takes long, sampled twice a second."""

    def __enter__(self):
        self._samples, self._done = [_bare_loop()], threading.Event()
        self.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self.join()

    def run(self):
        while not self._done.wait(0.5):
            self._samples.append(_bare_loop())

    @property
    def slowness(self) -> float:
        return max(1.0, sum(self._samples) / len(self._samples) / REFERENCE)
