"""attn_implementation="tritonattn" for Hugging Face's transformers.

    attention_mask [B, S], cache --padding_mask()--> None | lengths [B] | keep [B, S] | mask [B, 1, L, S]
                                 --the model--> hf_attention() --> tritonattn.attention

As in the FlashAttention integration, causal attention and sliding windows come from the arguments of the attention call, and
the mask holds the padding alone. Models that do not follow that contract, and masks with patterns of their own, get the
[B, 1, L, S] mask that they get for torch's SDPA.

T5 and its relatives add a bias [1, H, L, S] that depends on key position - query position alone. `hf_attention` gets a table
of it instead.
"""

import functools
import inspect
import sys

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.utils import generic

from ..attention import attention, attention_varlen

UNSUPPORTED = {
    "cache": "a paged cache (continuous batching)", "output_attentions": "attention weights as a result",
    "sinks": "attention sinks for each token",
}
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
SUPPORTED = ("is_causal", "sliding_window", "position_bias", "softcap", "s_aux")

# arguments that reach every attention function and do not change its result
_harmless = {
    "cache_position", "deterministic", "logits_to_keep", "max_length_k", "max_length_q", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "position_ids", "return_dict", "use_cache",
}
_names = set()      # names under which tritonattn is registered
_tables = set()     # the functions that `_with_table` returned
_padding_only = {}  # configuration class -> whether its models take causality and windows from the attention call


def register(name="tritonattn", *, harmless=()):
    """Register tritonattn's attention as `attn_implementation=name`, for from_pretrained, from_config and
    model.set_attn_implementation.

    Causal attention and sliding windows take no mask in memory, in training, prefill and decoding with any cache. Padding on
    the right becomes key lengths, other padding one boolean per key. Grouped heads are not repeated. Sequences that are packed
    in a batch of one, by position_ids or by cu_seq_lens_q and cu_seq_lens_k, take no mask either (in compiled code, those with
    position_ids do); position_ids separate them with use_cache=False only. T5's position bias is a table of offsets, but for a
    static cache. Masks with a pattern of the model's own are tensors, as for torch's SDPA.

    Args:
        name: any name that transformers gives no meaning to; "flash" and "/" have one.
        harmless: names of further keyword arguments that may reach an attention function without changing its result.

    Raises:
        ValueError: transformers uses the name. TypeError: `harmless` is one string.
        When a model is built or set to this implementation, NotImplementedError: its attention does not use transformers'
        AttentionInterface. A model without attention (a convolutional backbone, say) is accepted, as a part of another.
        When a model runs, NotImplementedError: attention weights as a result, or an unknown argument.
    """
    functions = AttentionInterface().get(name), AttentionMaskInterface().get(name)
    taken = any(getattr(function, "__module__", __name__) != __name__ for function in functions if function is not None)
    if not isinstance(name, str) or not name or taken or any(mark in name for mark in ("flash", "/", "|")):
        raise ValueError("name: expected one that transformers gives no meaning to (none that it has registered, no 'flash', "
                         f"'/', '|'), got {name!r}")
    if isinstance(harmless, str) or not all(isinstance(x, str) for x in harmless):
        raise TypeError(f"harmless: expected a collection of names, got {harmless!r}")
    if not _names:
        _check_before("get_correct_attn_implementation", _check_model)
        _check_before("set_attn_implementation", _check_submodels)
    _names.add(name)
    _harmless.update(harmless)
    AttentionInterface.register(name, hf_attention)
    AttentionMaskInterface.register(name, padding_mask)


# the checks use private names of transformers: _can_set_attn_implementation, _supports_flash_attn
def _check_before(name, check):
    """Make a method of PreTrainedModel call check(model, *arguments) first."""
    method = getattr(PreTrainedModel, name)

    @functools.wraps(method)
    def checked(self, *args, **kwargs):
        check(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    setattr(PreTrainedModel, name, checked)


def _check_model(model, requested_attention, *_, **__):
    """Raise NotImplementedError if a model set to tritonattn does not use the AttentionInterface."""
    if requested_attention not in _names:
        return
    classes = [c for c in type(model).__mro__ if issubclass(c, PreTrainedModel) and c is not PreTrainedModel]
    # the source of an interactive session cannot be read
    if not all(c._can_set_attn_implementation() for c in classes if c.__module__ != "__main__"):
        raise NotImplementedError(f"attn_implementation: {type(model).__name__} computes attention itself, and not through "
                                  "transformers' AttentionInterface, so tritonattn cannot replace it; use \"eager\"")
    # a model that checks for flash attention by name computes with the mask under any other name
    by_name = any(value is generic.is_flash_attention_requested
                  for c in classes for value in vars(sys.modules[c.__module__]).values())
    _replace_position_biases(classes)
    config = type(model.config)
    _padding_only[config] = _padding_only.get(config, True) and type(model)._supports_flash_attn and not by_name


def _replace_position_biases(classes):
    """Replace T5's `compute_bias` in all attention classes of the modules that define these classes, once."""
    for value in [value for c in classes for value in vars(sys.modules[c.__module__]).values() if isinstance(value, type)]:
        compute_bias = getattr(value, "compute_bias", None)
        if not hasattr(value, "_relative_position_bucket") or compute_bias is None or compute_bias in _tables:
            continue
        # LongT5's local attention has another one
        names = list(inspect.signature(compute_bias).parameters)
        if names == ["self", "query_length", "key_length", "device", "past_seen_tokens"]:
            value.compute_bias = _with_table(compute_bias)


def _with_table(compute_bias):
    """Return a `compute_bias` that gives tritonattn a table of offsets [1, H, 1, 1, 2 R + 1], and others what this one gives.

    The model passes the result on to `hf_attention`.
    """

    def table(self, query_length, key_length, device=None, past_seen_tokens=0):
        aligned = not isinstance(past_seen_tokens, torch.Tensor) and past_seen_tokens == key_length - query_length
        # farther keys share the bucket of this distance, unless it is among those that have a bucket each
        radius = self.relative_attention_max_distance
        is_last = radius > self.relative_attention_num_buckets // 2
        if self.config._attn_implementation not in _names or not aligned or not is_last:
            return compute_bias(self, query_length, key_length, device=device, past_seen_tokens=past_seen_tokens)
        return compute_bias(self, 1, 2 * radius + 1, device=device, past_seen_tokens=radius).unsqueeze(2)

    _tables.add(table)
    return table


def _check_submodels(model, attn_implementation, *_, **__):
    """Check each part of a model for which an implementation is requested; transformers itself only logs a warning."""
    requests = _requests(model.config, attn_implementation)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            _check_model(module, requests.get(id(module.config), requests[id(model.config)]))


def _requests(config, request):
    """Return {id: requested name} of a configuration and its sub-configurations. `request`: one name, or names by key."""
    by_key = isinstance(request, dict)
    requests = {id(config): request.get("") if by_key else request}
    for key in config.sub_configs:
        if (part := getattr(config, key, None)) is not None:
            requests |= _requests(part, request.get(key) if by_key else request)
    return requests


@torch.compiler.assume_constant_result
def _takes_padding_only(config_class):
    return _padding_only.get(config_class, False)


def padding_mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=masking_utils.causal_mask_function,
                 attention_mask=None, **options):
    """transformers' mask function: the padding alone if the model follows FlashAttention's contract, else the mask for SDPA.

    Returns None (no padding; the last query is at the last key), lengths [B] (further keys are padding, or unused slots of
    a static cache), keep [B, S'] of booleans (S' <= S: keys from S' on are unused slots), starts [1, 1, sequences + 1] of
    packed sequences, or a boolean mask [B, 1, L, S].
    """
    if attention_mask is not None and attention_mask.dim() == 1:
        return attention_mask  # generate() has called this function already
    bidirectional = mask_function is masking_utils.bidirectional_mask_function
    plain = bidirectional or mask_function is masking_utils.causal_mask_function
    config = options.get("config")
    if not plain and options.get("local_size") is not None and getattr(config, "attention_chunk_size", None) is None:
        # a sliding window; transformers allows skipping its mask if no other pattern was added
        bidirectional = options.get("allow_is_bidirectional_skip", False)
        plain = bidirectional or options.get("allow_is_causal_skip", True)
    sizes = batch_size, q_length, kv_length, q_offset, kv_offset
    padding_only = config is not None and _takes_padding_only(type(config))
    if padding_only and attention_mask is None and (starts := _packed_starts(sizes, mask_function)) is not None:
        return starts
    if plain and padding_only:
        padding = _padding(sizes, attention_mask, not bidirectional, options.get("device", "cpu"))
        if padding is not NotImplemented:
            return padding
    # without a mask, the positions of fewer queries than keys would be unknown
    options["allow_is_causal_skip"] = options.get("allow_is_causal_skip", True) and q_length in (1, kv_length)
    return masking_utils.sdpa_mask(*sizes, mask_function, attention_mask, **options)


def _padding(sizes, attention_mask, causal, device):
    """Return the padding among the keys as `padding_mask` does, or NotImplemented where it takes a mask [B, 1, L, S].

    Query i is at position q_offset + i, key j at kv_offset + j. Keys from `end` on are later than every query.
    """
    batch_size, n_q, n_k, q_offset, kv_offset = sizes
    end, keep = q_offset - kv_offset + n_q if causal else n_k, None
    if attention_mask is not None:
        if isinstance(kv_offset, torch.Tensor) or kv_offset:
            # generate() may pass the result in again, which must not be cut twice
            return NotImplemented
        keep = masking_utils.prepare_padding_mask(attention_mask.to(torch.bool), n_k, 0)[:, :n_k]
        if _host_cannot_read():
            known = not isinstance(end, torch.Tensor) and end == n_k
            if n_q > 1 and not known:
                return NotImplemented
            return keep if known else keep & (torch.arange(n_k, device=keep.device) < end)
        end = int(end)
    if isinstance(end, torch.Tensor):
        return end.to(device).reshape(-1).expand(batch_size).clone()
    if end > n_k:
        return NotImplemented
    if keep is not None:
        keep = keep[:, :end]
        lengths = keep.sum(-1)
        right = (keep == (torch.arange(end, device=keep.device) < lengths[:, None])).all()
        none, right = torch.stack((keep.all(), right)).tolist()
        if not none:
            return lengths if right and (not causal or n_q == n_k) else keep
    # lengths are needed if keys from `end` on are unused, or to align the last of several queries with the last key. They
    # are filled on the device, because a copy from the host cannot be captured into a CUDA graph
    return None if end == n_k and n_q in (1, n_k) else torch.full((batch_size,), end, device=device)


def _packed_starts(sizes, mask_function):
    """Return [1, 1, sequences + 1] int32 if this mask separates sequences packed by position_ids, each causal or with a window.

    transformers composes such a mask of functions, which are recognized by their names; of others the mask is made.
    """
    batch_size, n_q, n_k, *offsets = sizes
    if batch_size != 1 or n_q != n_k or any(isinstance(x, torch.Tensor) or x for x in offsets) or _host_cannot_read():
        return None
    remapped, separated = _both(mask_function) or (None, None)
    inner = _made_with(remapped, "remap_positions_for_packed_sequence", "mask_function")
    sequence = _made_with(separated, "packed_sequence_mask_function", "packed_sequence_mask")
    window, causal = _both(inner) or (None, inner)
    if causal is not masking_utils.causal_mask_function or sequence is None:
        return None
    if window is not None and _made_with(window, "sliding_window_overlay", "sliding_window") is None:
        return None
    changes = torch.nonzero(sequence[0].diff()).flatten() + 1
    return torch.cat((changes.new_zeros(1), changes, changes.new_full((1,), n_q))).to(torch.int32).view(1, 1, -1)


def _both(function):
    """Return the two mask functions whose conjunction this is, or None."""
    parts = _made_with(function, "and_masks", "mask_functions")
    return parts if parts is not None and len(parts) == 2 else None


def _made_with(function, maker, variable):
    """Return a variable of the function of transformers that made this mask function, or None if another one did."""
    if getattr(function, "__qualname__", "").split(".")[0] != maker or function.__module__ != masking_utils.__name__:
        return None
    return inspect.getclosurevars(function).nonlocals.get(variable)


def _host_cannot_read():
    """Return whether the values of tensors are unknown now: in a trace, and in the capture of a CUDA graph."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return tracing or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def hf_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    """transformers' attention function: q [B, H, L, D], k and v [B, Hk, S, D] -> o [B, L, H, D], None."""
    _check_options(attention_mask, options)
    if getattr(module, "compressor", None) is not None:
        raise NotImplementedError(f"{type(module).__name__} appends a bias for compressed keys to its mask, which is boolean "
                                  'here; use attn_implementation="eager"')
    variant = {"scale": scaling, "dropout_p": dropout, "softcap": options.get("softcap"), "sink": options.get("s_aux")}
    if _is_packed(attention_mask, options):
        # the lengths count if both are given, as in transformers' FlashAttention
        if not _has_lengths(options):
            starts = attention_mask[0, 0]
            options |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": None, "max_length_k": None}
        return _packed_attention(module, query, key, value, options, variant), None
    mask, bias, n_q, n_k = attention_mask, options.get("position_bias"), query.shape[-2], key.shape[-2]
    if bias is not None and bias.dim() == 5 and bias.shape[2:4] == (1, 1):
        # a table of offsets, see _with_table
        variant["relative"], bias = bias[0, :, 0, 0], None
    rank, dtype = (mask.dim(), mask.dtype) if isinstance(mask, torch.Tensor) else (0, None)
    align = {"align": "top_left" if n_q == n_k else "bottom_right"}
    if rank == 4 and dtype == torch.bool:
        structure = align | {"mask": mask}
    elif rank == 4 and dtype.is_floating_point:
        structure, bias = align, mask if bias is None else mask + bias
    elif rank == 2 and dtype == torch.bool and mask.shape[1] <= n_k and (mask.shape[1] >= n_q or n_q == 1):
        key, value = (x[..., :mask.shape[1], :] for x in (key, value))
        structure = _structure(module, n_q, mask.shape[1], options) | {"mask": mask[:, None, None, :]}
    elif rank == 1 and dtype in (torch.int32, torch.int64):
        structure = _structure(module, n_q, n_k, options) | {"key_lengths": mask}
    elif mask is None:
        structure = _structure(module, n_q, n_k, options)
        if structure["window"][1] == 0 and n_q not in (1, n_k):
            raise NotImplementedError(f"attention_mask: expected one for {n_q} causal queries and {n_k} keys, got None, which "
                                      "does not give the positions of the queries")
    else:
        got = f"{dtype} of shape {tuple(mask.shape)}" if dtype else type(mask).__name__
        raise NotImplementedError("attention_mask: expected numbers or booleans [B, H or 1, L, S], booleans [B, S] or key "
                                  f"lengths [B] for {n_q} queries and {n_k} keys, got {got}")
    if bias is not None and bias.dtype != query.dtype:
        bias = bias.float()
    if rank == 4 and _has_lengths(options):
        _check_batch_of_one(query)
        # the mask need not separate the sequences: transformers separates those that position_ids show
        same = _same_sequence(options["cu_seq_lens_q"], n_q)[:, None] == _same_sequence(options["cu_seq_lens_k"], n_k)
        structure["mask"] = structure["mask"] & same if "mask" in structure else same
    return attention(query, key, value, bias=bias, **variant, **structure).transpose(1, 2).contiguous(), None


def _packed_attention(module, query, key, value, options, variant):
    """Return o [1, L, H, D] of sequences that lie one after the other in q [1, H, L, D], k and v [1, Hk, S, D]."""
    _check_batch_of_one(query)
    if options.get("position_bias") is not None:
        raise NotImplementedError("position_bias: expected None with packed sequences (cu_seq_lens_q), got a bias")
    # the last query of a sequence is at its last key, as in FlashAttention
    structure = _structure(module, query.shape[-2], key.shape[-2], options) | {"align": "bottom_right"}
    longest = (n if isinstance(n, int) else None for n in (options.get("max_length_q"), options.get("max_length_k")))
    return attention_varlen(*(x[0].transpose(0, 1) for x in (query, key, value)), options["cu_seq_lens_q"],
                            options["cu_seq_lens_k"], *longest, **structure, **variant)[None].contiguous()


def _check_batch_of_one(query):
    """Raise NotImplementedError if the rows of several batches would be numbered one after the other."""
    if len(query) != 1:
        raise NotImplementedError(f"cu_seq_lens_q: expected a batch of one, got a batch of {len(query)}")


def _structure(module, n_q, n_k, options):
    """Return window and align of `attention` for a call whose mask holds padding alone."""
    causal, width = options.get("is_causal"), options.get("sliding_window")
    causal = getattr(module, "is_causal", None) if causal is None else causal
    if causal is None and n_q > 1:
        raise NotImplementedError(f"is_causal: {type(module).__name__} sets neither this argument nor the attribute; "
                                  'attn_implementation="eager" supports this model')
    if width is not None and not isinstance(width, int):
        raise NotImplementedError(f"sliding_window: expected an integer or None, got {width!r}")
    left = None if width is None or n_k <= width else width - 1
    return {"window": (left, 0 if causal else left), "align": "top_left" if n_q == n_k else "bottom_right"}


def _check_options(attention_mask, options):
    """Raise NotImplementedError for every argument that may change the result and is not supported."""
    for name, value in options.items():
        if value is None or value is False or name in SUPPORTED or name in _harmless:
            continue
        if name in UNSUPPORTED:
            raise NotImplementedError(f"{name}: this model needs {UNSUPPORTED[name]}, which tritonattn does not support yet; "
                                      'use attn_implementation="eager"')
        if name not in PACKED:
            raise NotImplementedError(f"{name}: unknown argument of an attention function; if it does not change the result, "
                                      f"call register(harmless=[{name!r}])")
        # a mask [B, 1, L, S] separates the sequences, as transformers makes it from position_ids
        masked = isinstance(attention_mask, torch.Tensor) and (attention_mask.dim() == 4 or _has_starts(attention_mask))
        # one sequence, or both arguments where they are used
        by_lengths = len(value) <= 2 or (_has_lengths(options) and (masked or attention_mask is None))
        if not (masked if name == "seq_idx" else by_lengths):
            raise NotImplementedError(f"{name}: packed sequences are not supported through this argument here; pass "
                                      "cu_seq_lens_q and cu_seq_lens_k without an attention_mask, or position_ids that restart "
                                      "for each sequence, and use_cache=False")


def _is_packed(attention_mask, options):
    """Return whether a call has packed sequences and no other mask."""
    return _has_lengths(options) if attention_mask is None else _has_starts(attention_mask)


def _has_lengths(options):
    """Return whether the sequences of queries and of keys are given by their lengths."""
    return all(options.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k"))


def _same_sequence(starts, n):
    """Return [n]: the number of the sequence that each of n rows belongs to."""
    return torch.searchsorted(starts[1:].contiguous(), torch.arange(n, dtype=starts.dtype, device=starts.device), right=True)


def _has_starts(attention_mask):
    """Return whether this is the result of `_packed_starts`."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 3 and attention_mask.dtype == torch.int32
