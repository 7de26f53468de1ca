"""attn_implementation="tritonattn" for Hugging Face's transformers.

    2-D attention_mask, caches --mask()--> None or a Mask --the model, untouched--> attend() --> tritonattn.attention

transformers describes who sees whom as a function of indices, and makes a [B, 1, L, S] tensor of it. Where the function
is one that we know, a Mask says the same in a few numbers: a window of diagonals, key lengths, at most one boolean for each
key. It stands in for the tensor, and becomes it as soon as anybody computes with it.
"""

import inspect
import re
import sys
from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from ..attention import attention

# what transformers hands to every attention function, and no result depends on
HARMLESS = frozenset((
    "cache_position", "deterministic", "logits_to_keep", "max_length_k", "max_length_q", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "position_ids", "return_dict", "use_cache",
))
REFUSED = {
    "cache": "a paged cache (continuous batching)",
    "output_attentions": "attention weights as a result",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "softcap": "a soft cap on the scores",
}
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")

_harmless = set(HARMLESS)
_asking = {}  # configuration class -> whether its models call an attention function


def register(name="tritonattn", *, harmless=()):
    """Make `attn_implementation=name` mean ours, in every model that transformers loads or builds from now on.

    Also `model.set_attn_implementation(name)`, for a model that exists. Padding to the right becomes key lengths, other
    padding one boolean for each key; causal and sliding-window attention, prefill and decoding with any cache stay
    structure, without a mask in memory; grouped heads are not repeated. Packed sequences and masks of a model's own are
    tensors, as transformers makes them; so is padding under torch.compile, where nobody may look into it.

    Args:
        name: as free as a dictionary's key, but "flash" in it, or "/", would mean other things to transformers.
        harmless: names of further keyword arguments that may reach an attention function without changing its result.

    Raises:
        ValueError: a name that transformers takes, or would take, for something else. TypeError: one string for `harmless`.
        While a model runs, NotImplementedError: what it needs and we do not serve (soft caps, sinks, attention weights as a
        result, ...), a model that calls no attention function, or an argument that nobody knows here; nothing is ignored.
    """
    if not isinstance(name, str) or not name or "flash" in name or "/" in name or "|" in name or name in ("eager", "sdpa"):
        raise ValueError(f"name: expected one that transformers has no meaning for (no 'flash', '/', '|'), got {name!r}")
    for taken in (AttentionInterface().get(name), AttentionMaskInterface().get(name)):
        if taken is not None and getattr(taken, "__module__", None) != __name__:
            raise ValueError(f"name: expected a free one, got {name!r}, which transformers has for something else")
    # a string is a collection too, of its letters
    names = () if isinstance(harmless, str) else tuple(harmless)
    if isinstance(harmless, str) or not all(isinstance(x, str) for x in names):
        raise TypeError(f"harmless: expected a collection of names, got {harmless!r}")
    _harmless.update(names)
    AttentionInterface.register(name, hf_attention)
    AttentionMaskInterface.register(name, mask)


class Structure(NamedTuple):
    """Who sees whom: what `tritonattn.attention` takes."""

    window: tuple = (None, None)
    align: str = "top_left"
    key_lengths: torch.Tensor | None = None  # [B]
    mask: torch.Tensor | None = None         # [B, 1, 1, S], or any that a model brings

    def is_full(self):
        """Whether everybody sees everything."""
        return self.window == (None, None) and self.key_lengths is None and self.mask is None


class Mask:
    """Stands in for a boolean [B, 1, L, S] tensor, True where a query sees a key; takes no memory until computed with.

    It is no tensor, so that torch.compile reads the structure as it reads any object, and guards it as such.
    """

    dtype, ndim, requires_grad = torch.bool, 4, False

    def __init__(self, shape, device, structure, dense):
        """`dense` makes the tensor that the structure stands for."""
        self.shape, self.device, self.structure, self.dense = torch.Size(shape), device, structure, dense

    def dim(self):
        return 4

    def size(self, dim=None):
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self):
        # generate() asks for this before a prefill; before a step of decoding too, which it may compile for plain tensors
        return self if self.shape[-2] > 1 else self.dense()

    def __getitem__(self, index):
        # models cut a mask to the keys that there are: most often to all of them
        slices = index if isinstance(index, tuple) else (index,)
        whole = len(slices) <= 4 and all(
            isinstance(x, slice) and x.start in (None, 0) and x.step in (None, 1) and (x.stop is None or x.stop >= n)
            for x, n in zip(slices, self.shape))
        return self if whole else self.dense()[index]

    def __getattr__(self, name):
        if name.startswith("__") or name in ("shape", "device", "structure", "dense"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        # a model that adds the mask to its scores takes True and False for numbers, those of an eager mask
        numbers = any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in args)
        if numbers and getattr(function, "__name__", "").strip("_") in ADDITIONS:
            raise NotImplementedError("attention_mask: expected to be handed to the attention function, got added to scores by "
                                      "the model itself, which attn_implementation=\"eager\" serves")
        args, kwargs = torch.utils._pytree.tree_map_only(Mask, lambda mask: mask.dense(), (args, kwargs or {}))
        return function(*args, **kwargs)


ADDITIONS = frozenset(("add", "iadd", "radd", "sub", "isub", "rsub"))


def _operator(name):
    """A tensor's operator as a method of Mask."""
    function = getattr(torch.Tensor, name)
    return lambda self, *args: Mask.__torch_function__(function, (Mask,), (self, *args))


for _name in ("add", "sub", "mul", "and", "or", "xor", "invert", "eq", "ne", "lt", "le", "gt", "ge", "bool", "len"):
    setattr(Mask, f"__{_name}__", _operator(f"__{_name}__"))


@torch.compiler.assume_constant_result
def _asks(config_class):
    """Whether a configuration's models call transformers' attention functions. Found out once for each."""
    if config_class not in _asking:
        _asking[config_class] = _source_asks(config_class.__module__)
    return _asking[config_class]


def _source_asks(name):
    """The same by the source of the models beside a configuration's module, as transformers judges it."""
    module = sys.modules.get(name.replace(".configuration_", ".modeling_"))
    if module is None or ".configuration_" not in name:
        return True  # nobody knows where its models are
    try:
        source = inspect.getsource(module)
    except OSError:
        return True
    return "ALL_ATTENTION_FUNCTIONS" in source or re.search(r"^class \w*Attention\w*\(nn\.Module\)", source, re.M) is None


def mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=masking_utils.causal_mask_function, **asked):
    """transformers' mask function: None where attention is full, a Mask, or a dense mask."""
    config, given = asked.get("config"), asked.get("attention_mask")
    if config is not None and not _asks(type(config)):
        raise NotImplementedError(f"attn_implementation: {type(config).__name__.removesuffix('Config')} calls no attention "
                                  "function of transformers, so tritonattn cannot serve it; attn_implementation=\"eager\" does")
    if isinstance(given, Mask):
        return given  # generate() made it already
    # tensors of a static cache, which moves them on in place before the mask is read
    q_offset, kv_offset = (x.clone() if isinstance(x, torch.Tensor) else x for x in (q_offset, kv_offset))
    sizes = batch_size, q_length, kv_length, q_offset, kv_offset

    def dense():
        options = asked | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return masking_utils.sdpa_mask(*sizes, mask_function, **options)

    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return masking_utils.sdpa_mask(*sizes, mask_function, **asked)
    window, device = _window(mask_function), torch.device(asked.get("device", "cpu"))
    found = None if window is None else _structure(sizes, window, given, device)
    if found is None:
        return dense()
    # never None where several queries are causal: a model may yet cut them, and None would not say which ones are left
    full = window == (None, None)
    may_skip = asked.get("allow_is_bidirectional_skip", False) if full else asked.get("allow_is_causal_skip", True)
    return None if may_skip and found.is_full() else Mask((batch_size, 1, q_length, kv_length), device, found, dense)


def _window(mask_function):
    """(left, right) of one of transformers' own mask functions; None for any other, and for what was added to one."""
    if mask_function is masking_utils.causal_mask_function:
        return None, 0
    if mask_function is masking_utils.bidirectional_mask_function:
        return None, None
    held = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    code = getattr(mask_function, "__code__", None)
    if len(held) != 1:
        return None
    # made by the same function of transformers: its code is the same object, what it holds is the window
    if code is masking_utils.sliding_window_overlay(1).__code__ and isinstance(held[0], int):
        return held[0] - 1, None
    if code is masking_utils.sliding_window_bidirectional_overlay(1).__code__ and isinstance(held[0], int):
        return held[0], held[0]
    if code is masking_utils.and_masks().__code__:
        parts = [_window(part) for part in held[0]]
        return None if None in parts else tuple(min((x for x in side if x is not None), default=None) for side in zip(*parts))
    return None


def _structure(sizes, window, padding, device):
    """The Structure of a window among keys of which some may be padding; None if there is none.

    Query i stands at position q_offset + i, key j at kv_offset + j; a static cache has keys beyond the last query.
    """
    batch_size, n_q, n_k, q_offset, kv_offset = sizes
    left, right = window
    shift = q_offset - kv_offset
    end = shift + n_q
    if right == 0 and left is not None and n_k <= left + 1:
        left = None  # nothing is that far away
    given, kind = _padding(padding, n_k, kv_offset, end if right == 0 else n_k)
    seen = None if kind == "none" else given[:, None, None, :]
    if (left, right) == (None, None) or (isinstance(shift, int) and shift == 0):
        return Structure((left, right), "top_left", *((given.sum(-1), None) if kind == "right" else (None, seen)))
    if right != 0:
        return Structure((left, right), "bottom_right", None, seen) if isinstance(end, int) and end == n_k else None
    # causal: nobody sees past the last query, so the keys may as well end there
    filled = None
    if not isinstance(end, torch.Tensor) and end > n_k:
        return None
    if isinstance(end, torch.Tensor) or end != n_k:
        # a number from the host is filled in, since a copy would not be captured into a CUDA graph
        filled = end.to(device) if isinstance(end, torch.Tensor) else torch.full((), end, device=device)
        filled = filled.reshape(-1).expand(batch_size)
    if n_q == 1 and left is None:
        return Structure((None, None), "top_left", filled, seen)
    return Structure((left, 0), "bottom_right", filled, seen)


def _padding(padding, n_k, kv_offset, end):
    """A 2-D padding mask as [B, n_k] booleans, and its kind: "none", "right" or "mask". Nobody sees keys from `end` on."""
    if padding is None:
        return None, "none"
    given = masking_utils.prepare_padding_mask(padding.to(torch.bool), n_k, kv_offset)
    if isinstance(kv_offset, torch.Tensor) or given.shape[-1] != n_k:
        given = given[:, torch.arange(n_k, device=given.device) + kv_offset]
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return given, "mask"  # right for every kind; a CUDA graph cannot wait for the answer
    places = torch.arange(n_k, device=given.device)
    none, right = (given | (places >= end)).all(), (given == (places < given.sum(-1, keepdim=True))).all()
    none, right = torch.stack((none, right)).tolist()  # the one time that the host waits for the device
    return given, "none" if none else "right" if right else "mask"


def hf_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    """transformers' attention function: [B, H, L, D] queries, [B, Hk, S, D] keys and values -> [B, L, H, D], None."""
    _check(attention_mask, options)
    _check_mask(attention_mask, query.shape[-2], key.shape[-2])
    bias = options.get("position_bias")
    if attention_mask is None:
        structure = _without_mask(module, query.shape[-2], key.shape[-2], options)
    elif isinstance(attention_mask, Mask):
        structure = attention_mask.structure
    elif attention_mask.dtype == torch.bool:
        structure = Structure(mask=attention_mask)
    else:
        structure, bias = Structure(), attention_mask if bias is None else attention_mask + bias
    if bias is not None and bias.dtype != query.dtype:
        bias = bias.float()
    o = attention(query, key, value, scale=scaling, bias=bias, dropout_p=dropout, **structure._asdict())
    return o.transpose(1, 2).contiguous(), None


def _check(attention_mask, options):
    """Nothing that may change the result passes unseen."""
    for name, what in REFUSED.items():
        if options.get(name) is not None and options[name] is not False:
            raise NotImplementedError(f"{name}: this model asks for {what}, which tritonattn does not serve; "
                                      'attn_implementation="eager" does')
    for name in PACKED:
        # a tensor tells the sequences apart, as transformers makes it of position_ids; a Mask never does
        several = options.get(name) is not None and (name == "seq_idx" or len(options[name]) > 2)
        if several and not isinstance(attention_mask, torch.Tensor):
            raise NotImplementedError(f"{name}: packed sequences are not served by this argument, but by position_ids that "
                                      "start again, with use_cache=False")
    known = {"is_causal", "sliding_window", "position_bias", *REFUSED, *PACKED, *_harmless}
    for name, value in options.items():
        if name not in known and value is not None and value is not False:
            raise NotImplementedError(f"{name}: an argument of attention that is not known here; if it changes no result, say "
                                      f"register(harmless=[{name!r}])")


def _check_mask(attention_mask, n_q, n_k):
    """A mask is one that we made, for these queries and keys, or a tensor of booleans or of numbers to be added."""
    if attention_mask is None:
        return
    if isinstance(attention_mask, Mask):
        if attention_mask.shape[-2] != n_q or attention_mask.shape[-1] != n_k:
            raise NotImplementedError(f"attention_mask: expected one for {n_q} queries and {n_k} keys, got "
                                      f"{tuple(attention_mask.shape)}")
        return
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
        raise NotImplementedError(f"attention_mask: expected a tensor [B, H or 1, L, S], got {got}")
    if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
        raise NotImplementedError("attention_mask: expected booleans, or floating point numbers to be added, got "
                                  f"{attention_mask.dtype}")


def _without_mask(module, n_q, n_k, options):
    """What no mask means to transformers: causal if the module is, where each query has its key; full for a single query."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", None) if causal is None else causal
    if causal is None and n_q > 1:
        # to torch's function it would mean causal, but encoders that know eager attention alone do not say it either
        raise NotImplementedError(f"is_causal: expected it from {type(module).__name__} where there is no mask, got neither; "
                                  'attn_implementation="eager" serves this model')
    if causal and n_q > 1 and n_q != n_k:
        raise NotImplementedError(f"attention_mask: expected one where {n_q} queries are causal among {n_k} keys, got None, "
                                  "which does not say where they stand")
    width = options.get("sliding_window")
    if width is not None and not (isinstance(width, int) and n_k <= width):
        if not causal or not isinstance(width, int):
            raise NotImplementedError(f"sliding_window: expected a mask beside a window of {width} where attention is not "
                                      "causal, got none")
        return Structure((width - 1, 0), "bottom_right" if n_q == 1 else "top_left")
    return Structure((None, 0)) if causal and n_q > 1 else Structure()
