"""attn_implementation="tritonattn" for Hugging Face's transformers.

    2-D attention_mask, caches --mask()--> None or a Mask --the model, untouched--> attend() --> tritonattn.attention

transformers describes who sees whom as a function of indices, and makes a [B, 1, L, S] tensor of it. Where the function
is one that we know, a Mask says the same in a few numbers: a window of diagonals, key lengths, at most one boolean for each
key. It passes for the tensor, and becomes it as soon as anybody computes with it.
"""

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
        ValueError: a name that transformers would take for something else. While a model runs, NotImplementedError: what
        it needs and we do not serve (soft caps, sinks, attention weights as a result, ...), or an argument that nobody
        knows here; nothing is ignored.
    """
    if not isinstance(name, str) or not name or "flash" in name or "/" in name or "|" in name or name in ("eager", "sdpa"):
        raise ValueError(f"name: expected one that transformers has no meaning for (no 'flash', '/', '|'), got {name!r}")
    _harmless.update(harmless)
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)


class Structure(NamedTuple):
    """Who sees whom: what `tritonattn.attention` takes."""

    window: tuple = (None, None)
    align: str = "top_left"
    key_lengths: torch.Tensor | None = None  # [B]
    mask: torch.Tensor | None = None         # [B, 1, 1, S], or any that a model brings

    def is_plain(self, window):
        """Whether there is this window, aligned top-left where that matters, and nothing else."""
        return self.window == window and self.align == "top_left" and self.key_lengths is None and self.mask is None


class Mask(torch.Tensor):
    """Passes for a boolean [B, 1, L, S] tensor, True where a query sees a key, and takes no memory until computed with."""

    @staticmethod
    def of(shape, device, structure, dense):
        """`dense` makes the tensor that the structure stands for."""
        self = torch.ones((), dtype=torch.bool, device=device).expand(shape).as_subclass(Mask)
        self.structure, self.dense = structure, dense
        return self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in METADATA:
            return super().__torch_function__(function, types, args, kwargs)
        # generate() asks for this before a prefill; before a step of decoding too, which it may compile for plain tensors
        if function is torch.Tensor.contiguous and args[0].shape[-2] > 1:
            return args[0]
        args, kwargs = torch.utils._pytree.tree_map_only(Mask, lambda mask: mask.dense(), (args, kwargs or {}))
        return function(*args, **kwargs)


METADATA = frozenset((
    torch.Tensor.dim, torch.Tensor.size, torch.Tensor.ndim.__get__, torch.Tensor.shape.__get__, torch.Tensor.dtype.__get__,
    torch.Tensor.device.__get__, torch.Tensor.requires_grad.__get__, torch.Tensor.is_floating_point,
    torch.Tensor.stride,
))


def mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=masking_utils.causal_mask_function, **asked):
    """transformers' mask function: None where attention is full or causal and nothing else, a Mask, or a dense mask."""
    # tensors of a static cache, which moves them on in place before the mask is read
    q_offset, kv_offset = (x.clone() if isinstance(x, torch.Tensor) else x for x in (q_offset, kv_offset))
    sizes = batch_size, q_length, kv_length, q_offset, kv_offset

    def dense():
        options = asked | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return masking_utils.sdpa_mask(*sizes, mask_function, **options)

    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return masking_utils.sdpa_mask(*sizes, mask_function, **asked)
    window, device = _window(mask_function), torch.device(asked.get("device", "cpu"))
    found = None if window is None else _structure(sizes, window, asked.get("attention_mask"), device)
    if found is None:
        return dense()
    if window == (None, None):
        may_skip = asked.get("allow_is_bidirectional_skip", False) and found.is_plain((None, None))
    else:
        # None means causal to `attend`, but for a single query, which then sees all
        may_skip = asked.get("allow_is_causal_skip", True) and found.is_plain((None, None) if q_length == 1 else (None, 0))
    return None if may_skip else Mask.of((batch_size, 1, q_length, kv_length), device, found, dense)


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
        filled = torch.as_tensor(end, device=device).reshape(-1).expand(batch_size)
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
    places = torch.arange(n_k, device=given.device)
    none, right = (given | (places >= end)).all(), (given == (places < given.sum(-1, keepdim=True))).all()
    none, right = torch.stack((none, right)).tolist()  # the one time that the host waits for the device
    return given, "none" if none else "right" if right else "mask"


def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    """transformers' attention function: [B, H, L, D] queries, [B, Hk, S, D] keys and values -> [B, L, H, D], None."""
    _check(attention_mask, options)
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
        # a mask, where there is one, already tells the sequences apart
        if attention_mask is None and options.get(name) is not None and (name == "seq_idx" or len(options[name]) > 2):
            raise NotImplementedError(f"{name}: packed sequences are not served by this argument, but by position_ids that "
                                      "start again, with use_cache=False")
    known = {"is_causal", "sliding_window", "position_bias", *REFUSED, *PACKED, *_harmless}
    for name, value in options.items():
        if name not in known and value is not None and value is not False:
            raise NotImplementedError(f"{name}: an argument of attention that is not known here; if it changes no result, say "
                                      f"register(harmless=[{name!r}])")
    if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4):
        got = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
        raise NotImplementedError(f"attention_mask: expected a tensor [B, H or 1, L, S], got {got}")


def _without_mask(module, n_q, n_k, options):
    """What no mask means to transformers: causal from the top left, if the module is causal; full for a single query."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    width = options.get("sliding_window")
    if width is not None and not (isinstance(width, int) and n_k <= width):
        if not causal or not isinstance(width, int):
            raise NotImplementedError(f"sliding_window: expected a mask beside a window of {width} where attention is not "
                                      "causal, got none")
        return Structure((width - 1, 0), "bottom_right" if n_q == 1 else "top_left")
    return Structure((None, 0)) if causal and n_q > 1 else Structure()
