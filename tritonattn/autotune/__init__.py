"""From a problem and a GPU to the config worth running: candidates, what the compiler makes of them, a race, a record."""


def tune(q, k, v, *, backward: bool = True, strategy: str = "halving", trials: int | None = None,
         seconds: float = float("inf"), again: bool = False, **options) -> list:
    """Find the best configs for `attention(q, k, v, **options)` on the tensors' GPU, and keep them for all calls like it.

    Takes the same options as `attention`, and raises the same errors. The values do not matter: inputs are drawn. Each
    kernel takes minutes, most of it to compile, less with strategy="table", and prints a line. Every config is checked
    against the definition before it is timed, in a process of its own, which may hang or lose the GPU without harm. What
    wins goes to the user's cache (`python -m tritonattn cache path`); calls look there first, in this process from now on.

    Args:
        backward: tune the kernels of the backward pass too.
        strategy: "halving", "static", "table", "random" or "exhaustive" (tuning/race.py).
        trials, seconds: at most so many configs, and so long on the bench, for each kernel.
        again: try what was tried before too. Otherwise only new candidates are timed, against the one that won then.

    Under torch.distributed every process must call this; the first tunes, and all get the same.

    Returns:
        list of cache.Record, one for each kernel that could be timed.

    Raises:
        RuntimeError: no GPU, or kernels are interpreted. ValueError: an unknown strategy, or no budget at all.
    """
    from ..runtime.arguments import problem_of
    from . import tuner
    from .search import STRATEGIES, Budget

    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if trials is not None and not (isinstance(trials, int) and trials > 0):
        raise ValueError(f"trials: expected a positive integer or None, got {trials!r}")
    if not seconds > 0:
        raise ValueError(f"seconds: expected a positive number, got {seconds!r}")
    problem, lab = problem_of(q, k, v, **options), tuner.local_setup(q.device)
    asked = [(problem, tuner.kernels_of(problem, backward))]
    with lab.compilers:
        return tuner.on_rank0(lambda: tuner.tune_all(asked, lab, strategy, Budget(trials, seconds), again)[0], lab)
