"""Graders of the exercises. They hold the solutions, so try first.

A grader takes an answer and returns (correct, message), or None if there is no answer yet.
"""

import statistics

import torch

import tritonattn

GRADERS = {}
DEVICE = "cpu" if tritonattn.gpu.INTERPRETED else "cuda"


def check(number: str, answer) -> None:
    """Print whether the answer to an exercise is right, and a hint if it is not."""
    try:
        graded = None if answer is None else GRADERS[number](answer)
    except Exception as error:  # the answer may be a function that raises anything
        graded = False, f"That raised {type(error).__name__}: {error}"
    if graded is None:
        print(f"Exercise {number}: not answered yet.")
    else:
        print(f"Exercise {number}: {'right' if graded[0] else 'not yet'}. {graded[1]}")


def grader(number):
    """Register the decorated function as the grader of an exercise."""
    def register(function):
        GRADERS[number] = function
        return function
    return register


def compare(result, expected, praise: str, hints: dict, otherwise: str):
    """Grade a result: a number, a tuple or a tensor. `hints` are messages by the wrong result that they explain."""
    if result is None:
        return None
    if isinstance(expected, torch.Tensor):
        shape = tuple(getattr(result, "shape", ()))
        if shape != tuple(expected.shape):
            return False, f"Expected a tensor of shape {tuple(expected.shape)}, got {shape}."
        result = result.detach().cpu()
    for known, message in {expected: praise, **hints}.items():
        if _equal(result, known):
            return known is expected, message
    return False, otherwise


def _equal(a, b):
    if isinstance(b, torch.Tensor):
        return torch.allclose(a.to(b.dtype), b, atol=1e-4)
    return abs(a - b) < 1e-9 if isinstance(b, float) else a == b


@grader("1.1")
def parameters(answer):
    d, expected = 512, 4 * 512 * 512
    return compare(answer, expected, "Four matrices of 512 x 512, whatever n is.", {
        3 * d * d: "That is W^q, W^k and W^v. One more matrix mixes the outputs of the heads.",
        4 * d * 64: "That is one head. There are eight, each with its own 512 x 64 columns of every matrix.",
        8 * expected: "Each head has matrices of 512 x 64, not 512 x 512.",
    }, f"Got {answer}. How many matrices are there, and what are their shapes?")


@grader("1.2")
def split_heads(function):
    n, heads, width = 5, 4, 6
    x = torch.arange(n * heads * width, dtype=torch.float32).view(n, heads * width)
    expected = torch.stack([x[:, h * width:(h + 1) * width] for h in range(heads)])
    return compare(function(x, heads), expected, "Every head has its own columns of every vector.", {
        x.reshape(heads, n, width): "The shape is right, but head 0 holds parts of the first vectors only, and should hold a "
                                    "part of every vector. Split the columns first, then move the heads to the front.",
    }, "The shape is right, but head 0 should hold the first columns of every vector, in their order.")


@grader("1.3")
def neighbour_bias(function):
    n = 6
    bias = function(n)
    if bias is None or tuple(bias.shape) != (n, n):
        return compare(bias, torch.zeros(n, n), "", {}, "")
    q, v = torch.zeros(1, n, 16, device=DEVICE), torch.zeros(1, n, 16, device=DEVICE)
    v[0, :, :n] = torch.eye(n)
    # with queries of 0 the weights are the softmax of the bias, and with these values the output equals the weights
    weights = tritonattn.attention(q, q, v, bias=bias.float().to(DEVICE))[0, :, :n].cpu()
    expected = (torch.eye(n) + torch.diag(torch.ones(n - 1), -1)) / 2
    expected[0, 0] = 1
    row = int((weights - expected).abs().amax(1).argmax())
    actual, wanted = (" ".join(f"{x:.2f}" for x in rows[row].tolist()) for rows in (weights, expected))
    return compare(weights, expected, "The kernel now averages two neighbours: attention can compute what a convolution does.",
                   {}, f"The weights of row {row} are {actual}, and should be {wanted}. "
                       "Which number, added to a score, gives a weight of 0?")


@grader("2.1")
def merge(function):
    rng = torch.Generator().manual_seed(0)
    s, v = 30 * torch.randn(3, 40, generator=rng, dtype=torch.float64), torch.randn(40, 4, generator=rng, dtype=torch.float64)
    a, b, (m, l, acc) = (_state(s[:, part], v[part]) for part in (slice(0, 10), slice(10, 40), slice(0, 40)))
    result = function(a, b)
    if result is None:
        return None
    if not _equal(result[0], m):
        return False, "m is not the largest score of both parts."
    if _equal(result[1], a[1] + b[1]):
        return False, "l is the plain sum. Each sum is relative to its own maximum: rescale both to the new maximum first."
    if not _equal(result[1], l):
        return False, "m is right, l is not. By which power of two does each sum change when its maximum becomes m?"
    praise = "So keys can be split over many programs, which is how decoding with one query fills a GPU."
    return compare(result[2], acc, praise, {}, "m and l are right, acc is not. It is rescaled like l, row by row: note the "
                                               "shapes [rows] and [rows, d].")


def _state(s, v):
    """Return (m [rows], l [rows], acc [rows, d]) over all these keys, in base 2."""
    m = s.amax(1)
    p = torch.exp2(s - m[:, None])
    return m, p.sum(1), p @ v


@grader("2.2")
def tile_counts(answer):
    n, rows, cols = 4096, 128, 32
    ends = [(i + 1) * rows for i in range(n // rows)]
    masked, unmasked = sum(rows // cols for _ in ends), sum((end - rows) // cols for end in ends)
    praise = f"The mask is evaluated in {masked / (masked + unmasked):.0%} of the visited tiles."
    return compare(tuple(answer) if isinstance(answer, list) else answer, (masked, unmasked), praise, {
        (unmasked, masked): "Both numbers are right, but in the wrong order.",
        (n // rows, unmasked): "The diagonal crosses more than one tile of keys: a tile has 128 queries and 32 keys.",
        (masked, n // rows * (n // cols) - masked): "That is all tiles. Those above the diagonal are never visited.",
    }, f"Got {answer}, expected two numbers, (masked, unmasked). To which keys do all 128 queries of the first tile attend? "
       "And of the second?")


@grader("2.3")
def narrowest_window(answer):
    # queries [first, first + 64) all attend to the key tile [first - 64, first) if the last query reaches its start
    expected = 2 * 64 - 1
    otherwise = f"left={answer} is enough, but not the smallest." if answer > expected else \
        f"With left={answer} the last of 64 queries reaches back {answer} keys, and the previous tile begins {expected} keys " \
        "back. So every tile of keys has a query that does not attend to all of it."
    praise = "The last query of a tile has to reach the start of the previous tile: 63 keys in its tile, 64 in that one."
    return compare(answer, expected, praise, {}, otherwise)


@grader("3.1")
def softmax_backward(function):
    rng = torch.Generator().manual_seed(0)
    s, dp = (torch.randn(4, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    p = s.requires_grad_().softmax(1)
    expected, = torch.autograd.grad(p, s, dp)
    p = p.detach()
    delta = (p * dp).sum(1, keepdim=True)
    return compare(function(p, dp), expected, "Every row sums to 0, whatever dP is.", {
        p * dp: "That is the effect of a score on its own weight. It also lowers all other weights of the row: which term is "
                "missing?",
        p * (dp - dp.mean(1, keepdim=True)): "Delta is an average weighted by P, not a plain one.",
        p * (dp - (p * dp).sum(0, keepdim=True)):
            "The softmax is along a row: delta has one number for each query, not for each key.",
        dp - delta: "The difference from the average is right, but it has to be multiplied by the weight.",
        -expected: "The sign is wrong: dS is positive where dP is above the average.",
    }, "A row of dS sums to 0. What has to be subtracted from dP first?")


@grader("3.2")
def saved_bytes(answer):
    n, heads, d = 8192, 16, 128
    o, number = 2 * n * heads * d, 4 * n * heads
    expected = 2 * o + 2 * number
    praise = f"That is {expected / 1e6:.0f} MB. The weights would take {2 * heads * n * n / 1e9:.1f} GB."
    return compare(answer, expected, praise, {
        o + 2 * number: "That is O and two numbers for each row. With precise_grad=True one more tensor is kept.",
        2 * o: "That is O and its rounding error. Two more numbers are kept for each row.",
        2 * o + number: "Two numbers are kept for each row: m and ln l. In float32, whatever the inputs are.",
        expected // heads: "That is one head.",
        2 * o + 3 * number: "Two numbers are kept for each row. Delta is computed at the start of the backward pass.",
        2 * expected: "A bfloat16 has two bytes.",
    }, f"Got {answer}. Which tensors, how many numbers in each, how many bytes each?")


@grader("3.3")
def gradient_of_lse(function):
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, n, 16, generator=rng) for n in (5, 7))
    leaf = q.clone().requires_grad_()
    expected, = torch.autograd.grad((leaf @ k.mT / 4).logsumexp(-1).sum(), leaf)
    return compare(function(q.to(DEVICE), k.to(DEVICE)), expected,
                   "dLSE is 1, so dS is P: dQ is the average of the keys, weighted by attention, times the scale.", {
        4 * expected: "That is the average key of each query, which is nearly it. The scores are Q K^T times the scale.",
    }, "With dLSE = 1 and nothing else, dS = P. Put that into dQ = scale dS K: what is averaged here?")


@grader("4.1")
def registers_for_two(answer):
    sm, warps = tritonattn.gpu.named("H200").multiprocessor, 8
    expected = max(count for count in range(1, 256) if sm.warps_with(count) >= 2 * warps)
    blocks = sm.warps_with(answer) // warps
    otherwise = f"With {answer} two blocks fit, but it is not the largest number." if blocks >= 2 else \
        f"With {answer} each part has room for {sm.warps_with(answer) // 4} warps, so the SM for {blocks} block."
    praise = f"Two blocks are {2 * warps} warps, four on each part: 512 / 4 = {expected}."
    return compare(answer, expected, praise, {}, otherwise)


@grader("4.2")
def balanced_head_size(answer):
    devices = [tritonattn.gpu.named(name) for name in ("B200", "H200", "A100")]
    expected, *others = (device.peaks.tensor // (4 * device.peaks.exponentials) for device in devices)
    hints = {size: f"That is the head size on {device.name}." for size, device in zip(others, devices[1:])}
    hints[2 * expected] = "A pair has two products of d multiplications and d additions each: 4 d in all."
    return compare(answer, expected, "Below it, faster matrix products would change nothing.", hints,
                   f"Got {answer}. Set 4 d / tensor equal to 1 / 16.")


@grader("4.3")
def ratio_of_times(function):
    drift = [1 + i / 10 for i in range(9)]
    samples, baseline = [0.9 * x for x in drift], [*drift]
    samples[0], baseline[8] = 10 * samples[0], 5 * baseline[8]
    ratios = [a / b for a, b in zip(samples, baseline)]
    expected, result = statistics.median(ratios), function([*samples], [*baseline])
    praise = "Each round is compared with itself, so drift cancels, and the median ignores single bad samples."
    return compare(result, expected, praise, {
        statistics.fmean(ratios): "Each round is compared with itself, which is right. But one bad sample moves a mean.",
        statistics.median(samples) / statistics.median(baseline):
            "The two medians are of different rounds, and the GPU was not as warm in one as in the other.",
        statistics.fmean(samples) / statistics.fmean(baseline): "One bad sample moves a mean.",
        min(samples) / min(baseline): "The two best samples are of different rounds.",
        1 / expected: "That is the speedup, the inverse of the ratio of times.",
    }, f"Got {result}, expected {expected:.3f}. Compare round by round first.")
