"""torch's contract: equal results, gradients and errors, and the intended differences."""

import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import tritonattn
from tritonattn import reference, scaled_dot_product_attention

B, H, L, S, E = 2, 2, 5, 7, 8


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def call(q=(B, H, L, E), k=(B, H, S, E), v=None, *positional, dtype=torch.float32, **options):
    """Return the arguments of these shapes (value like key by default), further positional ones, and options."""
    return (*(draw(*shape, dtype=dtype) for shape in (q, k, v or k)), *positional), options


HOLE = torch.ones(L, S, dtype=torch.bool)
HOLE[2] = False
HIDDEN = torch.zeros(L, S).masked_fill(~HOLE, -math.inf)

SAME = {
    "scale None": call(), "scale": call(scale=0.3), "scale 0": call(scale=0), "scale negative": call(scale=-1),
    "scale int": call(scale=2), "scale bool": call(scale=True), "scale 0-dim tensor": call(scale=torch.tensor(0.3)),
    "mask of booleans": call((B, H, L, E), (B, H, S, E), None, HOLE),
    "mask of numbers": call((B, H, L, E), (B, H, S, E), None, draw(B, H, L, S)),
    "mask of -inf": call((B, H, L, E), (B, H, S, E), None, HIDDEN),
    "mask of the lowest number": call((B, H, L, E), (B, H, S, E), None, HIDDEN.clamp(min=torch.finfo(torch.float32).min)),
    "mask of +inf": call((B, H, L, E), (B, H, S, E), None, torch.zeros(L, S).index_fill(0, torch.tensor(1), math.inf)),
    "mask of nan": call((B, H, L, E), (B, H, S, E), None, torch.zeros(L, S).index_fill(0, torch.tensor(1), math.nan)),
    "mask (S)": call((B, H, L, E), (B, H, S, E), None, draw(S)), "mask ()": call((B, H, L, E), (B, H, S, E), None, draw()),
    "mask (L, 1)": call((B, H, L, E), (B, H, S, E), None, draw(L, 1)),
    "mask (B, 1, 1, S)": call((B, H, L, E), (B, H, S, E), None, draw(B, 1, 1, S)),
    "mask (1, H, L, S)": call((B, H, L, E), (B, H, S, E), None, draw(1, H, L, S)),
    "mask (H, 1, 1)": call((B, H, L, E), (B, H, S, E), None, draw(H, 1, 1)),
    "mask of 3-D": call((H, L, E), (H, S, E), None, draw(H, L, S)), "mask of 2-D": call((L, E), (S, E), None, draw(L, S)),
    "causal": call((B, H, L, E), (B, H, S, E), None, None, 0.0, True),
    "causal, more queries": call((B, H, S, E), (B, H, L, E), None, None, 0.0, True),
    "broadcast batch": call((1, H, L, E), (B, H, S, E)), "broadcast heads": call((B, H, L, E), (B, 1, S, E)),
    "query 3-D": call((H, L, E), (B, H, S, E)), "key and value 3-D": call((B, H, L, E), (H, S, E)),
    "more batch dimensions": call((3, B, H, L, E), (3, B, H, S, E)),
    "GQA": call((B, 4, L, E), (B, 2, S, E), enable_gqa=True), "GQA, 3-D": call((4, L, E), (2, S, E), enable_gqa=True),
    "GQA, equal heads": call(enable_gqa=True), "GQA, batch broadcast": call((B, 4, L, E), (1, 2, S, E), enable_gqa=True),
    "GQA, heads of k and v differ": call((1, 12, L, E), (1, 6, S, E), (1, 4, S, E), enable_gqa=True),
    "GQA, one head of v": call((B, 4, L, E), (B, 2, S, E), (B, 1, S, E), enable_gqa=True),
    "other size of v": call((B, H, L, E), (B, H, S, E), (B, H, S, 3)),
    "L = 0": call((B, H, 0, E)), "B = 0": call((0, H, L, E), (0, H, S, E)), "H = 0": call((B, 0, L, E), (B, 0, S, E)),
    "S = 0": call((B, H, L, E), (B, H, 0, E)), "E = 0": call((B, H, L, 0), (B, H, S, 0), (B, H, S, 3)),
    "p = 1": call((B, H, L, E), (B, H, S, E), None, None, 1.0), "p = 0": call((B, H, L, E), (B, H, S, E), None, None, 0),
    "p < 0": call((B, H, L, E), (B, H, S, E), None, None, -0.5), "p 0-dim tensor": call(dropout_p=torch.tensor(0.0)),
    "CausalBias, upper left": call((B, H, L, E), (B, H, S, E), None, causal_upper_left(L, S)),
    "CausalBias, lower right": call((B, H, L, E), (B, H, S, E), None, causal_lower_right(L, S)),
    "float16": call(dtype=torch.float16), "bfloat16": call(dtype=torch.bfloat16), "float64": call(dtype=torch.float64),
    "mask of float32 for float16": call((B, H, L, E), (B, H, S, E), None, draw(L, S), dtype=torch.float16),
    "mask of the query's dtype": call((B, H, L, E), (B, H, S, E), None, draw(L, S).half(), dtype=torch.float16),
}

# errors of the same type that begin with the same words
ERRORS = {
    "seven positional arguments": call((B, H, L, E), (B, H, S, E), None, None, 0.0, False, 1.0),
    "an unknown argument": call(causal=True),
    "dtypes differ": ((draw(B, H, L, E), draw(B, H, S, E).double(), draw(B, H, S, E)), {}),
    "three dtypes": ((draw(B, H, L, E).half(), draw(B, H, S, E), draw(B, H, S, E).bfloat16()), {}),
    "devices differ": ((draw(B, H, L, E), draw(B, H, S, E).to("meta"), draw(B, H, S, E)), {}),
    "query 1-D": call((E,)), "key 0-D": call((B, H, L, E), (), (B, H, S, E)),
    "mask of integers": call((B, H, L, E), (B, H, S, E), None, torch.ones(L, S, dtype=torch.int64)),
    "mask of float64": call((B, H, L, E), (B, H, S, E), None, draw(L, S).double()),
    "mask of float16 for float32": call((B, H, L, E), (B, H, S, E), None, draw(L, S).half()),
    "mask with too many dimensions": call((B, H, L, E), (B, H, S, E), None, draw(1, B, H, L, S)),
    "mask of a larger batch": call((1, H, L, E), (1, H, S, E), None, draw(3, 1, L, S)),
    "mask of another length": call((B, H, L, E), (B, H, S, E), None, draw(L, S - 1)),
    "heads differ": call((B, 4, L, E), (B, 2, S, E)), "batches differ": call((B, H, L, E), (3, H, S, E)),
    "GQA, heads do not divide": call((B, H, L, E), (B, 3, S, E), enable_gqa=True),
    "GQA, 2-D": call((L, E), (S, E), enable_gqa=True),
    "head sizes differ": call((B, H, L, E), (B, H, S, E - 1)),
    "p > 1": call((B, H, L, E), (B, H, S, E), None, None, 1.5), "p a word": call(dropout_p="x"), "p None": call(dropout_p=None),
    "p requires a gradient": call(dropout_p=torch.tensor(0.5, requires_grad=True)),
    "scale requires a gradient": call(scale=torch.tensor(1.0, requires_grad=True)), "scale a word": call(scale="1"),
    "scale 1-D": call(scale=torch.tensor([1.0])), "is_causal 1": call(is_causal=1), "is_causal None": call(is_causal=None),
    "enable_gqa 1": call(enable_gqa=1), "enable_gqa None": call(enable_gqa=None), "mask a list": call(attn_mask=[1]),
    "query None": ((None, draw(B, H, S, E), draw(B, H, S, E)), {}), "value a list": ((draw(L, E), draw(S, E), [1.0]), {}),
    "CausalBias and is_causal": call((B, H, L, E), (B, H, S, E), None, causal_upper_left(L, S), 0.0, True),
}


def placed(arguments, device):
    """Return the arguments on the device; query, key, value and a floating-point mask require gradients."""
    found = []
    for x in arguments:
        if type(x) is torch.Tensor and x.device.type != "meta":
            x = x.to(device)
            x = x.requires_grad_() if x.is_floating_point() and not x.requires_grad else x
        found.append(x)
    return found


def outcome(function, arguments, options, device):
    """Return the output and the gradients of all inputs that require them."""
    arguments = placed([x.detach().clone() if type(x) is torch.Tensor else x for x in arguments], device)
    leaves = [x for x in arguments if type(x) is torch.Tensor and x.requires_grad]
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about a lower right bias
        o = function(*arguments, **options)
    return o, torch.autograd.grad(o.sum(), leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("row", SAME)
def test_the_same_as_torch(row, device):
    arguments, options = SAME[row]
    if arguments[0].dtype == torch.float64 and device.type != "cpu":
        pytest.skip("the kernels run in float64 in the interpreter alone")
    ours, theirs = (outcome(f, arguments, options, device) for f in (scaled_dot_product_attention,
                    F.scaled_dot_product_attention))
    close = {"atol": 1e-5, "rtol": 1e-4} if arguments[0].dtype.itemsize > 2 else {"atol": 0.02, "rtol": 0.02}
    assert ours[0].dtype == theirs[0].dtype
    torch.testing.assert_close(ours[0], theirs[0], equal_nan=True, **close)
    if "nan" not in row and "+inf" not in row:
        torch.testing.assert_close(ours[1], theirs[1], **close)


@pytest.mark.parametrize("row", ERRORS)
def test_the_same_errors_as_torch(row, device):
    arguments, options = ERRORS[row]
    arguments = [x.to(device) if type(x) is torch.Tensor and x.device.type != "meta" else x for x in arguments]
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(Exception) as theirs:
        F.scaled_dot_product_attention(*arguments, **options)
    with pytest.raises(theirs.type) as ours:
        scaled_dot_product_attention(*arguments, **options)
    # tritonattn passes all arguments by position
    found, words = (re.sub(r" \(position \d\)", "", str(error.value)) for error in (ours, theirs))
    assert theirs.type is ours.type and words.split("\n")[0].removeprefix("scaled_dot_product_attention() ")[:80] in found


@pytest.mark.parametrize("strict", [False, True])
def test_errors_are_torchs_while_patched(strict, device, monkeypatch):
    """A call that raises counts neither as handled nor as a fallback."""
    if strict:
        monkeypatch.setenv("TRITONATTN_STRICT", "1")
    q, k, v = (draw(1, 2, 4, E).to(device) for _ in range(3))
    tritonattn.fallback_report(clear=True)
    with tritonattn.swapped():
        with pytest.raises(RuntimeError, match="^The size of tensor a|^Attempting to broadcast") as ours:
            scaled_dot_product_attention(q, k, v, draw(5, 5).to(device))
        with pytest.raises(ValueError, match="scale"):
            scaled_dot_product_attention(q, k, v, scale=math.inf)
    assert "does not support" not in str(ours.value) and not tritonattn.fallback_report(clear=True).fallbacks


def test_errors_under_autocast_name_the_mask(device):
    q, k, v = draw(1, 2, 4, E).to(device), *(draw(1, 2, 4, E).to(device, torch.bfloat16) for _ in range(2))
    with torch.autocast(device.type, dtype=torch.bfloat16), pytest.raises(RuntimeError, match="attn_mask") as ours:
        scaled_dot_product_attention(q, k, v, draw(5, 5).to(device))
    assert "same dtype" not in str(ours.value)


# differences from torch by intent

def test_a_mask_beside_is_causal_is_always_an_error(device):
    """torch's math kernel accepts it in some versions."""
    arguments, _ = call((B, H, L, E), (B, H, S, E), None, draw(L, S), 0.0, True)
    with pytest.raises(RuntimeError, match="Explicit attn_mask should not be set when is_causal=True"):
        scaled_dot_product_attention(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments))


def test_values_of_another_length_are_an_error(device):
    """torch's fused CPU kernel reads out of bounds."""
    with pytest.raises(RuntimeError, match="value: expected the length of key, 7, got 6"):
        scaled_dot_product_attention(*(x.to(device) for x in (draw(B, H, L, E), draw(B, H, S, E), draw(B, H, S - 1, E))))


@pytest.mark.parametrize("scale", [math.inf, math.nan])
def test_a_scale_that_is_not_finite_is_an_error(scale, device):
    with pytest.raises(ValueError, match="scale: expected a finite number"):
        scaled_dot_product_attention(*(draw(1, 1, 4, E).to(device) for _ in range(3)), scale=scale)


def test_hidden_nan_does_not_reach_the_output(device):
    q, k, v = (draw(1, 1, 6, E).to(device) for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool, device=device)
    mask[:, 4:] = False
    expected = reference.attention(q, k[:, :, :4], v[:, :, :4])
    causal = reference.attention(q[:, :, :4], k[:, :, :4], v[:, :, :4], causal=True)
    k[:, :, 4:], v[:, :, 4:] = math.nan, math.nan
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, :4], causal, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtypes_raise(dtype, device):
    q, k, v = (draw(1, 1, 4, E).to(device).to(dtype) for _ in range(3))
    with pytest.raises((RuntimeError, NotImplementedError)):
        F.scaled_dot_product_attention(q, k, v)
    with pytest.raises((RuntimeError, NotImplementedError), match="expected dtype float16"):
        scaled_dot_product_attention(q, k, v)


# layout, randomness, transforms

def test_memory_layout_of_results(device):
    q, k, v = (draw(B, L, H, E).to(device).transpose(1, 2) for _ in range(3))
    assert scaled_dot_product_attention(q, k, v).transpose(1, 2).is_contiguous()
    assert scaled_dot_product_attention(*(x.contiguous() for x in (q, k, v))).is_contiguous()
    q, k, v = (draw(L, H, E).to(device).transpose(0, 1) for _ in range(3))
    assert scaled_dot_product_attention(q, k, v).is_contiguous()


def test_dropout_is_always_applied_and_follows_the_seed(device):
    q, k, v = (draw(1, 2, 16, E).to(device) for _ in range(3))
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(scaled_dot_product_attention(q, k, v, None, 0.5))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert not torch.allclose(runs[0], scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, device):
    q, k, v = (draw(1, 2, 6, E).to(device) for _ in range(3))
    mask = draw(6, 6).to(device)
    with torch.autocast(device.type, dtype=dtype):
        ours, theirs = (f(q, k, v, mask) for f in (scaled_dot_product_attention, F.scaled_dot_product_attention))
    assert ours.dtype == theirs.dtype == dtype
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


def test_vmap_and_its_gradient(device):
    q, k, v = (draw(3, 2, 6, E).to(device) for _ in range(3))
    mask = draw(6, 6).to(device)

    def of(function):
        return torch.vmap(torch.func.grad(lambda q, k, v: function(q, k, v, mask).square().sum(), (0, 1, 2)))(q, k, v)

    with sdpa_kernel(SDPBackend.MATH):
        theirs = of(F.scaled_dot_product_attention)
    torch.testing.assert_close(of(scaled_dot_product_attention), theirs, atol=1e-4, rtol=1e-4)


def test_export_and_compile(device):
    class Model(torch.nn.Module):
        def forward(self, q, k, v, mask):
            return scaled_dot_product_attention(q, k, v, mask, scale=0.2)

    inputs = tuple(x.to(device) for x in (*(draw(1, 2, 6, E) for _ in range(3)), draw(6, 6)))
    expected = Model()(*inputs)
    program = torch.export.export(Model(), inputs)
    assert torch.equal(program.module()(*inputs), expected)
    assert torch.equal(program.run_decompositions().module()(*inputs), expected)
    assert torch.equal(torch.compile(Model(), backend="aot_eager", fullgraph=True)(*inputs), expected)


def test_second_and_forward_derivatives_raise(device):
    q, k, v = (draw(1, 1, 4, E).to(device).requires_grad_() for _ in range(3))
    first, = torch.autograd.grad(scaled_dot_product_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="at most first derivatives"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="reverse-mode"):
        torch.func.jvp(lambda q: scaled_dot_product_attention(q, k.detach(), v.detach()), (q.detach(),), (k.detach(),))
