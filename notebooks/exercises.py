"""The judges of the exercises. Do not read on before you have tried: what is right stands here, and why.

A judge takes an answer and returns (whether it is right, words), or None where there is no answer yet.
"""

import statistics

import torch

import tritonattn

JUDGES = {}


def check(number: str, answer) -> None:
    """Say in words whether the answer to an exercise is right; a wrong one does no harm."""
    found = None if answer is None else _judged(number, answer)
    if found is None:
        print(f"Exercise {number}: not answered yet.")
    else:
        print(f"Exercise {number}: {'right' if found[0] else 'not yet'}. {found[1]}")


def _judged(number, answer):
    try:
        return JUDGES[number](answer)
    except Exception as error:  # of the reader's own function
        return False, f"That raised {type(error).__name__}: {error}"


def judge(number):
    def register(function):
        JUDGES[number] = function
        return function
    return register


@judge("1.1")
def parameters(answer):
    d, right = 512, 4 * 512 * 512
    known = {
        right: "Four matrices of 512 x 512, and none of them knows n.",
        3 * d * d: "That is W^q, W^k and W^v. The heads' outputs are mixed by one more matrix.",
        4 * d * 64: "That is one head. There are eight, each with its own 512 x 64 of every kind.",
        8 * right: "Each head has matrices of 512 x 64, not 512 x 512.",
        8 * 3 * d * d: "Each head has matrices of 512 x 64, not 512 x 512. And there is W^O.",
    }
    return answer == right, known.get(answer, f"Got {answer}. How many matrices, and of how many rows and columns each?")


@judge("1.2")
def split_heads(function):
    n, heads, width = 5, 4, 6
    x = torch.arange(n * heads * width, dtype=torch.float32).view(n, heads * width)
    found = function(x, heads)
    if found is None:
        return None
    if tuple(found.shape) != (heads, n, width):
        return False, f"Expected the shape {(heads, n, width)} of {heads} heads, {n} vectors, {width} numbers each, got " \
                      f"{tuple(found.shape)}."
    right = torch.stack([x[:, h * width:(h + 1) * width] for h in range(heads)])
    if torch.equal(found, right):
        return True, "Every head has its own columns of every vector."
    if torch.equal(found, x.reshape(heads, n, width)):
        return False, "The shape is right, but head 0 holds pieces of the first vectors alone, and not a piece of every " \
                      "vector: split the columns first, then let the heads come first."
    return False, "The shape is right, but head 0 should hold the first columns of every vector, in their order."


@judge("1.3")
def pairs_of_neighbours(function):
    n = 6
    bias = function(n)
    if bias is None:
        return None
    if not isinstance(bias, torch.Tensor) or tuple(bias.shape) != (n, n):
        return False, f"Expected a tensor of shape ({n}, {n}), got {tuple(getattr(bias, 'shape', ()))}."
    device = "cpu" if tritonattn.gpu.INTERPRETED else "cuda"
    q, v = torch.zeros(1, n, 16, device=device), torch.zeros(1, n, 16, device=device)
    v[0, :, :n] = torch.eye(n)
    # with queries of 0 the weights are the softmax of the bias, and the values let them through
    weights = tritonattn.attention(q, q, v, bias=bias.float().to(device))[0, :, :n].cpu()
    right = (torch.eye(n) + torch.diag(torch.ones(n - 1), -1)) / 2
    right[0, 0] = 1
    if torch.allclose(weights, right, atol=1e-4):
        return True, "The kernel has become a window of two, a mean of neighbours: attention can do what a convolution does."
    row = int((weights - right).abs().amax(1).argmax())
    words = " ".join(f"{x:.2f}" for x in weights[row].tolist())
    return False, f"Row {row} weighs the keys by {words}, and should by " \
                  f"{' '.join(f'{x:.2f}' for x in right[row].tolist())}. Which number, added to a score, leaves a weight of 0?"


@judge("2.1")
def merge(function):
    rng = torch.Generator().manual_seed(0)
    s, v = 30 * torch.randn(3, 40, generator=rng, dtype=torch.float64), torch.randn(40, 4, generator=rng, dtype=torch.float64)
    a, b, whole = (_state(s[:, part], v[part]) for part in (slice(0, 10), slice(10, 40), slice(0, 40)))
    found = function(a, b)
    if found is None:
        return None
    m, l, acc = found
    if not torch.allclose(m, whole[0]):
        return False, "m is not the largest score of both parts."
    if torch.allclose(l, a[1] + b[1]):
        return False, "l was added as it stands. Each sum is relative to a maximum of its own: bring it to the new one first."
    if not torch.allclose(l, whole[1]):
        return False, "m is right, l is not. By which power does each of the two sums change when its maximum becomes m?"
    if not torch.allclose(acc, whole[2]):
        return False, "m and l are right, acc is not. It changes as l does, row by row: mind the shapes [rows] and [rows, d]."
    return True, "So keys can be split over many programs, which is how decoding with one query fills a GPU."


def _state(s, v):
    """(m [rows], l [rows], acc [rows, d]) of all these keys, in base 2."""
    m = s.amax(1)
    p = torch.exp2(s - m[:, None])
    return m, p.sum(1), p @ v


@judge("2.2")
def counted_tiles(answer):
    n, rows, cols = 4096, 128, 32
    ends = [(i + 1) * rows for i in range(n // rows)]
    masked, free = sum(rows // cols for _ in ends), sum((end - rows) // cols for end in ends)
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        return False, f"Expected two numbers, (masked, free of a mask), got {answer!r}."
    known = {
        (masked, free): f"The mask is evaluated in {masked / (masked + free):.0%} of the tiles that are visited.",
        (free, masked): "Both numbers are right, and in the wrong order.",
        (n // rows, free): "The diagonal crosses more than one tile of keys: 128 queries meet 32 keys at a time.",
        (masked, n // rows * (n // cols) - masked): "That would be all tiles. Those above the diagonal are never visited.",
    }
    return tuple(answer) == (masked, free), known.get(
        tuple(answer), f"Got {tuple(answer)}. Take the first tile of queries, then the second: what do all 128 of them see?")


@judge("2.3")
def narrowest_window(answer):
    block = 64
    right = 2 * block - 1
    if not isinstance(answer, int) or isinstance(answer, bool):
        return False, f"Expected a whole number of keys, got {answer!r}."
    # queries [first, first + block): their keys' tile [first - block, first) is seen by the last if left reaches its begin
    if answer < right:
        return False, f"With left={answer} the last of 64 queries sees no further back than {answer} keys, and the tile " \
                      f"before its own begins {right} keys before it. Each tile of keys has a query that does not see it whole."
    if answer > right:
        return False, f"left={answer} is enough, but not the least."
    return True, "The last query of a tile has to reach the begin of the tile before: 63 keys in its own, 64 in that one."


@judge("3.1")
def softmax_backward(function):
    rng = torch.Generator().manual_seed(0)
    s, dp = (torch.randn(4, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    s.requires_grad_()
    p = s.softmax(1)
    right, = torch.autograd.grad(p, s, dp)
    p = p.detach()
    found = function(p, dp)
    if found is None:
        return None
    if not isinstance(found, torch.Tensor) or found.shape != p.shape:
        return False, f"Expected a tensor of shape {tuple(p.shape)}, got {tuple(getattr(found, 'shape', ()))}."
    if torch.allclose(found, right):
        return True, "Every row of it sums to 0, whatever dP is."
    known = {
        "That is what a score does to its own weight. It also takes from all others of the row: which part is missing?": p * dp,
        "Delta is an average by the weights, not a plain one.": p * (dp - dp.mean(1, keepdim=True)),
        "The softmax goes along a row: delta has one number for each query, not for each key.":
            p * (dp - (p * dp).sum(0, keepdim=True)),
        "The difference from the average is right, and each counts by its weight.": dp - (p * dp).sum(1, keepdim=True),
        "The sign is the wrong way round: a score is raised where its dP lies over the average.": -right,
    }
    words = next((words for words, wrong in known.items() if torch.allclose(found, wrong)), None)
    return False, words or f"The first row sums to {found[0].sum().item():.2f}. What has to come off dP before it is weighed?"


@judge("3.2")
def bytes_kept(answer):
    n, heads, d = 8192, 16, 128
    o, lse = 2 * n * heads * d, 4 * n * heads
    right = 2 * o + lse
    known = {
        right: f"That is {right / 1e6:.0f} MB. The weights of one pass would be {2 * heads * n * n / 1e9:.1f} GB.",
        o + lse: "That is O and the log-sum-exp. With precise_grad=True one more tensor is kept.",
        2 * o: "O and what rounding took from it are there. Each row has one number more.",
        2 * o + lse // 2: "The log-sum-exp is float32, whatever the inputs are: a power of two hangs on it.",
        right // heads: "That is one head.",
        2 * o + 2 * lse: "One number for each row lies between the passes. Delta is made when the backward pass begins.",
        2 * right: "A bfloat16 has two bytes.",
    }
    return answer == right, known.get(answer, f"Got {answer}. Which tensors, of how many numbers each, of how many bytes each?")


@judge("3.3")
def gradient_of_lse(function):
    device = "cpu" if tritonattn.gpu.INTERPRETED else "cuda"
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, n, 16, generator=rng) for n in (5, 7))
    leaf = q.clone().requires_grad_()
    right, = torch.autograd.grad((leaf @ k.mT / 4).logsumexp(-1).sum(), leaf)
    found = function(q.to(device), k.to(device))
    if found is None:
        return None
    if not isinstance(found, torch.Tensor) or found.shape != q.shape:
        return False, f"Expected a tensor of shape {tuple(q.shape)}, got {tuple(getattr(found, 'shape', ()))}."
    found = found.detach().cpu()
    if torch.allclose(found, right, atol=1e-4):
        return True, "dLSE is 1, so dS is P: each query is drawn to the average key, as it sees the keys."
    if torch.allclose(found, 4 * right, atol=1e-4):
        return False, "That is the average key of each query, which is nearly it. Q reaches the scores through the scale."
    return False, "With dLSE = 1 and nothing else, dS = P. Put that into dQ = scale dS K: what is weighed here?"


@judge("4.1")
def registers_for_two(answer):
    sm, warps = tritonattn.gpu.named("H200").multiprocessor, 8
    if not isinstance(answer, int) or isinstance(answer, bool) or not 1 <= answer <= 255:
        return False, f"Expected a number of registers from 1 to 255, got {answer!r}."
    right = max(count for count in range(1, 256) if sm.warps_with(count) >= 2 * warps)
    blocks = sm.warps_with(answer) // warps
    if answer == right:
        return True, f"Two blocks are {2 * warps} warps, four on each part: 512 / 4 = {right}."
    if blocks < 2:
        return False, f"With {answer} each part has room for {sm.warps_with(answer) // 4} warps, the SM for {blocks} block."
    return False, f"With {answer} two blocks fit, but it is not the most."


@judge("4.2")
def where_they_meet(answer):
    right, *others = (tritonattn.gpu.named(name) for name in ("B200", "H200", "A100"))

    def meet(device):
        return device.peaks.tensor // (4 * device.peaks.exponentials)

    known = {meet(right): "Below it, faster products would change nothing."}
    known |= {meet(other): f"That is where they meet on {other.name}." for other in others}
    known[2 * meet(right)] = "A pair has two products, and each number in them is a multiplication and an addition: 4 d in all."
    return answer == meet(right), known.get(answer, f"Got {answer}. Set 4 d / tensor equal to 1 / 16.")


@judge("4.3")
def ratio_of_times(function):
    warm = [1 + i / 10 for i in range(9)]
    samples, beside = [0.9 * x for x in warm], [*warm]
    samples[0], beside[8] = 10 * samples[0], 5 * beside[8]
    found = function(list(samples), list(beside))
    if found is None:
        return None
    ratios = [a / b for a, b in zip(samples, beside)]
    known = {
        statistics.median(ratios): "Each round is compared with itself, so that what drifts has drifted for both.",
        statistics.fmean(ratios): "Each round is compared with itself, which is right. But one bad sample moves a mean.",
        statistics.median(samples) / statistics.median(beside):
            "The two medians are of different rounds, and the GPU was not as warm in one as in the other.",
        statistics.fmean(samples) / statistics.fmean(beside): "One bad sample moves a mean.",
        min(samples) / min(beside): "The two best samples are of different rounds.",
        1 / statistics.median(ratios): "That is how many times as fast it is.",
    }
    words = next((words for number, words in known.items() if abs(found - number) < 1e-9), None)
    right = abs(found - statistics.median(ratios)) < 1e-9
    return right, words or f"Got {found:.3f}, where {statistics.median(ratios):.3f} is right. Compare round by round first."
