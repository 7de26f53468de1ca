"""How slow this machine is just now. Bounds on time are for a core that nobody else uses: elsewhere, and beside others, they
are that much wider."""

import threading
import time

QUIET = 0.035  # seconds that `_stroll` takes on such a core, in the fastest third of what was seen


def _stroll():
    began = time.thread_time()
    sum(i * i for i in range(1_000_000))
    return time.thread_time() - began


def slowness() -> float:
    """Times QUIET, at least 1; the best of three, as what it is compared with is the best of several."""
    return max(1.0, min(_stroll() for _ in range(3)) / QUIET)


class Watch(threading.Thread):
    """The mean slowness from entering to leaving a block, looked at twice a second: for what takes long."""

    def __enter__(self):
        self._seen, self._over = [_stroll()], threading.Event()
        self.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self.join()

    def run(self):
        while not self._over.wait(0.5):
            self._seen.append(_stroll())

    @property
    def slowness(self) -> float:
        return max(1.0, sum(self._seen) / len(self._seen) / QUIET)
