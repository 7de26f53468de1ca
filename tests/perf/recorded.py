"""Recorded results for tests of what is made of them."""

from perf import cases, results
from tritonattn.measure.journal import Journal

ENVIRONMENT = {"gpu": "NVIDIA H200", "arch": "sm_90", "driver": "570.124", "torch": "2.11.0+cu130", "triton": "3.6.0",
               "commit": "0123456789ab-dirty", "date": "2026-11-21T15:04:05Z"}


def ok(seconds, throttled=False):
    """A result with quantiles 10% below and above the median."""
    return {"status": "ok", "seconds": seconds, "q20": 0.9 * seconds, "q80": 1.1 * seconds, "throttled": throttled}


def bad(status):
    return {"status": status, "reason": "error 3.25 | of 1"}


def entry(case, direction="forward", *, suite="paper", **outcomes):
    """A journal entry; an underscore in a name stands for a dash."""
    outcomes = {name.replace("_", "-"): outcome for name, outcome in outcomes.items()}
    return {"job": f"{suite}/{case.name}/{direction}", "suite": suite, "case": case.name, "direction": direction,
            "problem": case.problem.as_json(), "results": outcomes}


def grid_entry(d, mask, n, direction="forward", **outcomes):
    return entry(cases.of_paper(d, mask, n), direction, **outcomes)


def seconds(empty, tflops):
    """The time at which the job of an entry reaches this rate."""
    return results.job_of(empty).tflops(1.0) / tflops


def rates(ours, cudnn, d=64, mask="full", n=1024, direction="forward", throttled=False):
    """An entry of the papers' grid with ours and cudnn at these TFLOP/s."""
    empty = grid_entry(d, mask, n, direction)
    outcomes = {"tritonattn": ok(seconds(empty, ours), throttled), "cudnn": ok(seconds(empty, cudnn))}
    return grid_entry(d, mask, n, direction, **outcomes)


def write(folder, *entries, name="paper-0", **environment):
    """Write a file of results, as perf.run leaves it."""
    path = folder / "nvidia-h200" / f"{name}.jsonl"
    with Journal(path, {"environment": ENVIRONMENT | environment, "name": name}) as book:
        for each in entries:
            book.append(each)
    return path
