"""Problem: shapes, dtype and variant of one attention call, without its tensors.

    q [*batch, heads, n_q, d]   k [*batch, kv_heads, n_k, d]   v [*batch, kv_heads, n_k, dv]
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch

Window = tuple[int | None, int | None]
NORMALIZERS = ("softmax", "sigmoid", "relu")


class UserFunction(NamedTuple):
    """A function of the user's own: its name (score_function.py), and dtype and number of elements of its payload."""

    name: str
    payload: tuple[str, int] | None = None

    @staticmethod
    def of(name: str | None, payload: torch.Tensor | None) -> "UserFunction | None":
        """Return the description of a function and its payload; None for None."""
        return name and UserFunction(name, None if payload is None else (_name(payload.dtype), payload.numel()))

    def example_payload(self, device) -> torch.Tensor | None:
        """Return a payload of zeros, which are numbers of every dtype and indices of every tensor; None without one."""
        if self.payload is None:
            return None
        return torch.zeros(self.payload[1], dtype=getattr(torch, self.payload[0]), device=device)


@dataclass(frozen=True)
class Problem:
    """A hashable description of one call. Query i attends to key j if -left <= j - (i + shift) <= right."""

    batch: tuple[int, ...]
    heads: int
    kv_heads: int
    n_q: int
    n_k: int
    d: int
    dv: int
    dtype: torch.dtype
    window: Window = (None, None)
    shift: int = 0
    bias: torch.dtype | None = None  # dtype of the bias
    masked: bool = False             # a boolean mask is given
    dropout: bool = False
    lengths: bool = False            # each batch has its own number of keys, at most n_k
    mapped: bool = False             # the mask is a BlockMask
    softcap: bool = False            # scores are bounded by a softcap
    sink: bool = False               # each head has a sink
    # queries and keys of all sequences, if these are packed; then n_q and n_k are the most rows of one, or an upper bound
    packed: tuple[int, int] | None = None
    alibi: bool = False              # each head has a slope
    relative: bool = False           # each head has a table of relative positions
    entropy: bool = False            # the entropy of each row is computed, in a backward pass differentiated
    key_mass: bool = False           # the same for the mass of each key
    normalizer: str = "softmax"      # one of NORMALIZERS
    score_function: "UserFunction | None" = None
    mask_function: "UserFunction | None" = None  # of a BlockMask without a tensor; then `masked` and `mapped` hold too

    @staticmethod
    def of(q, k, v, window: Window = (None, None), bottom_right=False, bias=None, mask=None, dropout_p=0.0,
           key_lengths=None, kv_blocks=None, softcap=None, sink=None, packed=None, alibi=None,
           relative=None, entropy=False, key_mass=False, normalizer="softmax", score_function=None,
           mask_function=None) -> "Problem":
        """Return the problem of these tensors. A side of the window that excludes nothing becomes None.

        packed: the number of packed sequences, and the most queries and keys of one.
        """
        batch, n_q, n_k = tuple(q.shape[:-3]), q.shape[-2], k.shape[-2]
        if packed is not None:
            (*batch, n_q, n_k) = packed
        shift = n_k - n_q if bottom_right else 0
        left, right = window
        # the first key is n_q - 1 + shift before the last query, the last key n_k - 1 - shift after the first
        left = None if left is None or left >= n_q - 1 + shift else left
        right = None if right is None or right >= n_k - 1 - shift else right
        return Problem(tuple(batch), q.shape[-3], k.shape[-3], n_q, n_k, q.shape[-1], v.shape[-1], q.dtype,
                       (left, right), shift, bias if bias is None else bias.dtype,
                       mask is not None or mask_function is not None,
                       dropout_p > 0, key_lengths is not None, kv_blocks is not None, softcap is not None, sink is not None,
                       packed and (q.shape[-2], k.shape[-2]), alibi is not None, relative is not None, entropy, key_mass,
                       normalizer, score_function, mask_function)

    @staticmethod
    def parse(shape: str, dtype: torch.dtype, causal: bool = False) -> "Problem":
        """Return the problem of "2x32x8x4096x128": batch, heads, kv heads, length, head size. Raises ValueError."""
        try:
            batch, heads, kv_heads, n, d = map(int, shape.split("x"))
        except ValueError:
            raise ValueError(f"shape: expected BATCHxHEADSxKV_HEADSxLENGTHxHEAD_SIZE, got {shape!r}") from None
        if min(batch, heads, kv_heads, n, d) < 1 or heads % kv_heads or d > 512:
            raise ValueError("shape: expected positive sizes, kv heads that divide heads and a head size up to 512, got "
                             f"{shape!r}")
        return Problem((batch,), heads, kv_heads, n, n, d, d, dtype, (None, 0) if causal else (None, None))

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.heads // max(self.kv_heads, 1)

    @property
    def mask(self) -> str:
        """The class of the window: full, causal or window."""
        return "full" if self.window == (None, None) else "causal" if self.window == (None, 0) else "window"

    def pairs(self) -> int:
        """Return the number of (query, key) pairs of one head inside the window."""
        left, right = self.window

        def keys_up_to(reach):
            """Return the sum over queries i of clamp(i + shift + reach + 1, 0, n_k)."""
            low, high = self.shift + reach + 1, self.shift + reach + self.n_q
            low_cut, high_cut = min(max(low, 0), self.n_k), min(max(high, 0), self.n_k)
            rising = (low_cut + high_cut) * (high_cut - low_cut + 1) // 2
            before = low_cut * max(min(low_cut, high) - low, 0)
            after = self.n_k * max(high - max(high_cut, low), 0)
            return rising + before + after if self.n_q else 0

        pairs = self.n_q * self.n_k if right is None else keys_up_to(right)
        return pairs if left is None else pairs - keys_up_to(-left - 1)

    def flops(self, direction: str = "forward") -> int:
        """Return the floating-point operations of the pairs in the window: two products forward, five backward.

        Of packed sequences it is an upper bound.
        """
        if self.packed is not None:
            return self.padded().flops(direction)
        per_pair = {"forward": self.d + self.dv, "backward": 3 * self.d + 2 * self.dv}[direction]
        return 2 * math.prod(self.batch) * self.heads * self.pairs() * per_pair

    def tensors(self, device="cpu", seed: int = 0):
        """Return random normal q, k, v of this problem; on device "meta", tensors without data."""
        rng = None if str(device) == "meta" else torch.Generator(device).manual_seed(seed)

        def draw(heads, n, width):
            if self.packed is not None:
                return torch.randn(n, heads, width, dtype=self.dtype, device=device, generator=rng).transpose(0, 1)[None]
            return torch.randn(*self.batch, heads, n, width, dtype=self.dtype, device=device, generator=rng)

        return tuple(draw(*size) for size in self._sizes())

    def bytes(self, direction: str = "forward") -> int:
        """Return the least memory traffic: inputs read once, results written once. Without biases and masks, whose shapes
        are not part of a Problem."""
        batch, sizes = 1 if self.packed else math.prod(self.batch), self._sizes()
        q, k, v = (batch * heads * n * width for heads, n, width in sizes)
        o, rows = q // max(self.d, 1) * self.dv, batch * self.heads * sizes[0][1]
        # a softmax reads its output again, and the lse, in float32
        softmax = self.normalizer == "softmax"
        numbers = {"forward": q + k + v + o, "backward": 2 * (q + k + v) + (1 + softmax) * o}[direction]
        return numbers * self.dtype.itemsize + 4 * rows * softmax

    def padded(self) -> "Problem":
        """Return a padded batch with key lengths and about as many rows as packed sequences; any other problem as it is."""
        if self.packed is None:
            return self
        batch = max(1, *(-(-total // max(1, n)) for total, n in zip(self.packed, (self.n_q, self.n_k))))
        return replace(self, packed=None, lengths=True, batch=(batch,))

    def _sizes(self):
        """Return heads, length and width of q, k and v."""
        n_q, n_k = self.packed or (self.n_q, self.n_k)
        return (self.heads, n_q, self.d), (self.kv_heads, n_k, self.d), (self.kv_heads, n_k, self.dv)

    def as_json(self) -> dict:
        """Return the fields in JSON's types. `from_json` is the inverse."""
        return asdict(self) | {"dtype": _name(self.dtype), "bias": self.bias and _name(self.bias)}

    @staticmethod
    def from_json(fields: dict) -> "Problem":
        """Return the problem with this `as_json`."""
        lists = {name: tuple(fields[name]) for name in ("batch", "window", "packed") if fields.get(name) is not None}
        # records from before biases existed have no such key
        dtypes = {name: fields.get(name) and getattr(torch, fields[name]) for name in ("dtype", "bias")}
        functions = {name: UserFunction(function, payload and tuple(payload))
                     for name in ("score_function", "mask_function") for function, payload in [fields.get(name) or (None, None)]
                     if function is not None}
        return Problem(**fields | lists | dtypes | functions)

    def __str__(self):
        def pair(a, b):
            return f"{a}" if a == b else f"{a}/{b}"

        sizes = (*self.batch, pair(self.heads, self.kv_heads), pair(self.n_q, self.n_k), pair(self.d, self.dv))
        window = "" if self.mask != "window" else f"{self.window[0]},{self.window[1]}"
        placed = self.mask != "full" or self.alibi or self.relative
        shift = f" shift {self.shift}" if self.shift and placed else ""
        names = ("masked", "mapped", "dropout", "lengths", "softcap", "sink", "alibi", "relative", "entropy", "key_mass")
        extras = [f"bias {_name(self.bias)}"] * (self.bias is not None) + [name for name in names if getattr(self, name)]
        extras += [self.normalizer] * (self.normalizer != "softmax")
        extras += [f"{name} {getattr(self, name).name}" for name in ("score_function", "mask_function") if getattr(self, name)]
        extras += [] if self.packed is None else [f"packed {pair(*self.packed)}"]
        return " ".join([f"{'x'.join(map(str, sizes))} {_name(self.dtype)} {self.mask}{window}{shift}", *extras])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
