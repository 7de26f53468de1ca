"""A bench in a process of its own: a config that hangs, faults or poisons the device ends that process, and nothing else."""

import time

from ..problem import Problem
from .bench import Bench
from .search import Check
from .worker_pool import Failure, ask, serve, start, stop

OPENING, CHECKING, FIRST = 300.0, 180.0, 300.0  # seconds, compiling included
TIMING, SAMPLE = 60.0, 0.5    # for what comes before the first sample; for each sample, beside what it takes
LONGEST = 60.0                # that a sample is believed to take
NO_ROOM = "OutOfMemoryError"


class Isolated:
    """Has the methods of bench.Bench. A context manager: at its end the process is gone."""

    def __init__(self, kernel: str, problem: Problem, device: str, effort=None, seed: int = 0, command=None):
        """effort: timing.Effort, or the bench's own. command: how the process is started, in tests."""
        self._opening = (kernel, problem, str(device), effort, seed)
        self._command, self._child, self._sample = command, None, None

    def now(self) -> float:
        return time.monotonic()

    def check(self, config: str) -> Check:
        found = self._ask(("check", config), CHECKING)
        return Check({}, found.code, found.message) if isinstance(found, Failure) else found

    def times(self, configs: list[str], rounds: int) -> dict[str, tuple[float, ...] | Failure]:
        """As Bench.times. Where the process ends, each config is tried alone; the others are timed together once more."""
        out = self._first(configs)
        left = [config for config in configs if config not in out]
        while left:
            found = self._ask(("times", left, rounds), self._patience(rounds * len(left)))
            if not isinstance(found, Failure):
                return out | found
            if len(left) == 1:
                return out | {left[0]: found}
            alone = {config: self._alone(config) for config in left}
            culprits = {config: each for config, each in alone.items() if isinstance(each, Failure)}
            if not culprits:
                # together they take too long, or too much
                half = len(left) // 2
                return out | self.times(left[:half], rounds) | self.times(left[half:], rounds)
            out |= culprits
            left = [config for config in left if config not in culprits]
        return out

    def _first(self, configs) -> dict[str, Failure]:
        """Learn how long a sample takes, from the first config that gives one: those that gave none, and why."""
        failed = {}
        for config in configs if self._sample is None else ():
            if self._child is None:
                # which takes long, and is no part of a sample
                self._open()
            began = self.now()
            found = self._alone(config, FIRST)
            if not isinstance(found, Failure):
                self._sample = min(self.now() - began, LONGEST)
                break
            failed[config] = found
        return failed

    def _alone(self, config, patience=None):
        found = self._ask(("times", [config], 1), patience or self._patience(1))
        return found if isinstance(found, Failure) else found[config]

    def _patience(self, samples) -> float:
        """Seconds for so many samples, by what the first one of this problem took."""
        return TIMING + (SAMPLE + self._sample) * samples

    def _ask(self, job, timeout):
        """The answer, or why there is none; then the next question begins a new process. RuntimeError: no bench to ask."""
        if self._child is None:
            self._open()
        try:
            found = ask(self._child, job, timeout)
        except TimeoutError:
            found = Failure("hang", f"no answer in {timeout:.0f} s", lasting=False)
        except EOFError:
            self.__exit__()
            return Failure("device lost", "its process ended", lasting=False)
        except BaseException:
            self.__exit__()
            raise
        if isinstance(found, Failure):
            self.__exit__()
            if NO_ROOM in found.message:
                raise RuntimeError(f"bench: expected room for the tensors of {self._opening[1]}, got {found.message}")
        return found

    def _open(self):
        self._child = start(self._command or __name__, visible=True)
        try:
            found = ask(self._child, ("open", *self._opening), OPENING)
        except (TimeoutError, EOFError) as error:
            found = Failure("device lost", f"{type(error).__name__} while it began")
        except BaseException:
            self.__exit__()
            raise
        if isinstance(found, Failure):
            # nobody's config is to blame
            self.__exit__()
            raise RuntimeError(f"bench: expected a process that can use {self._opening[2]}, got {found.message}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        child, self._child = self._child, None
        if child is not None:
            stop(child)


def attend_jobs() -> None:
    """What the process does: jobs are ("open", ...), ("check", config) and ("times", configs, rounds)."""
    benches = []

    def answer(kind, *rest):
        if kind == "open":
            kernel, problem, device, effort, seed = rest
            benches[:] = [Bench(kernel, problem, device, **({"effort": effort} if effort else {}), seed=seed)]
            return None
        return getattr(benches[0], kind)(*rest)

    serve(answer, "device lost")


if __name__ == "__main__":
    # under its real name, so that the parent knows the classes of the answers
    from .isolation import attend_jobs as attend_by_name

    attend_by_name()
