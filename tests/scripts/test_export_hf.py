"""The modelling file of an export, under the installed transformers, against our own forward pass and decoding."""

import numpy as np
import pytest
import torch

import dms_jax
from dms_jax.config import ConfigError, DMSConfig, ModelConfig, RopeConfig
from scripts.export import write
from tests.helpers import texts
from tests.helpers.models import first_layers, random_lm
from tests.inference.test_decode import LENGTHS, TOTAL, forced_decode

WEAK = {"scale": 3.0, "logit_bias": 0.3}  # of random weights: decisions of both kinds
CASES = {
    "llama": ("llama", DMSConfig(7, "query", 0, **WEAK), {"tie_embeddings": True}),
    "llama-adapter-layer": ("llama", DMSConfig(0, "adapter", 1, per="layer", **WEAK), {"mlp_bias": True}),
    "llama-late": ("llama", DMSConfig(4, "adapter", 5, sinks=2, **WEAK), {"qkv_bias": True, "out_bias": True}),
    "qwen2": ("qwen2", DMSConfig(5, "query", 5, neuron=3, **WEAK), {}),
    "qwen2-adapter": ("qwen2", DMSConfig(3, "adapter", 0, **WEAK), {"tie_embeddings": True}),
    "qwen3": ("qwen3", DMSConfig(6, "query", 1, sinks=3, **WEAK), {"rope": RopeConfig("linear", 500.0, 2.0)}),
    "qwen3-adapter": ("qwen3", DMSConfig(2, "adapter", 1, gate_dtype="model", **WEAK), {}),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """Code of folders is copied here, not under the home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def in_transformers(folder):
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": True, "dtype": torch.float32, "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A random model of ours and its export."""
    family, dms, changes = CASES[request.param]
    values = {"qk_norm": family == "qwen3", "qkv_bias": family == "qwen2", "rope": RopeConfig(theta=500.0), **changes}
    lm = random_lm(ModelConfig(family, 53, 2, 24, 6, 2, 10, 40, **values), dms)
    folder = tmp_path_factory.mktemp(request.param.replace("-", "_"))
    write(lm, folder, "hf")
    assert dms_jax.load(folder).dms == dms
    return lm, in_transformers(folder)


@torch.no_grad()
def logits(model, ids, **options):
    return model(torch.tensor(ids), **options).logits.numpy()


def test_logits(pair, rng):
    """With eviction and without, and of rows padded on the right."""
    lm, model = pair
    ids = rng.integers(0, 53, (2, 60))
    want = lm.logits(ids, dms=lm.dms)
    assert np.abs(want - lm.logits(ids)).max() > 0.05, "nothing that matters is evicted"
    np.testing.assert_allclose(logits(model, ids), want, atol=1e-4, rtol=0)
    mask = torch.ones(2, 60)
    mask[0, 41:] = 0
    got = logits(model, ids, attention_mask=mask)
    np.testing.assert_allclose(got[1], want[1], atol=1e-4, rtol=0)
    np.testing.assert_allclose(got[0, :41], lm.logits(ids[:1, :41], dms=lm.dms)[0], atol=1e-4, rtol=0)
    model.config.dms_disable_eviction = True
    np.testing.assert_allclose(logits(model, ids), lm.logits(ids), atol=1e-4, rtol=0)
    model.config.dms_disable_eviction = False


def test_decoding_equals_ours_step_by_step(pair, rng):
    """Prompts padded on the left, then a token at a time: logits, and live tokens of each layer, row and head."""
    lm, model = pair
    tokens = rng.integers(0, 53, (len(LENGTHS), TOTAL + max(LENGTHS)))
    want, want_live, _ = forced_decode(lm, tokens, LENGTHS)
    width = max(LENGTHS)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in LENGTHS])
    fed = torch.tensor([[0] * (width - n) + list(row[:n]) for n, row in zip(LENGTHS, tokens, strict=True)])
    cache = None
    for step in range(TOTAL - width + 1):
        with torch.no_grad():
            out = model(fed, attention_mask=mask, past_key_values=cache)
        cache = out.past_key_values
        np.testing.assert_allclose(out.logits[:, -1], want[step], atol=1e-4, rtol=0)
        if step:
            np.testing.assert_array_equal(cache.live_tokens.transpose(0, 1), want_live[step - 1])
        fed = torch.tensor([[row[n + step]] for n, row in zip(LENGTHS, tokens, strict=True)])
        mask = torch.cat([mask, torch.ones(len(LENGTHS), 1, dtype=torch.long)], 1)


def test_chunks_and_a_second_turn(pair, rng):
    """Several tokens over a cache that is not empty; the mask of queries in pieces."""
    lm, model = pair
    ids = rng.integers(0, 53, (2, 300))
    want, cache, parts = lm.logits(ids, dms=lm.dms), None, []
    for part in np.split(ids, (13, 14, 23, 290), axis=1):
        with torch.no_grad():
            out = model(torch.tensor(part), past_key_values=cache)
        cache = out.past_key_values
        parts.append(out.logits.numpy())
    np.testing.assert_allclose(np.concatenate(parts, 1), want, atol=1e-4, rtol=0)


def test_memory_falls(pair, rng):
    """The arrays hold the live tokens and not one more, each head as many as it has."""
    lm, model = pair
    ids = rng.integers(0, 53, (2, 80))
    with torch.no_grad():
        cache = model(torch.tensor(ids)).past_key_values
    live, token = cache.live_tokens, 2 * lm.config.head_dim * 4  # a key and a value in float32
    stored = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
    assert stored == cache.nbytes == live.sum() * token < 0.8 * live.numel() * 80 * token
    assert len(set(live.flatten().tolist())) > 1, "heads of one length prove little"


@pytest.mark.parametrize("pair", ["llama", "qwen3-adapter"], indirect=True)
def test_generate(pair, rng):
    """A batch of unequal prompts; beams, whose caches are reordered, against beams that recompute everything."""
    lm, model = pair
    prompts = [rng.integers(3, 53, n).tolist() for n in (9, 20, 14)]
    want = [chains[0] for chains in dms_jax.generate(lm, prompts, max_new_tokens=24, stop=()).tokens]
    ids = torch.tensor([[0] * (20 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (20 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    got = model.generate(ids, attention_mask=mask, **options)
    assert got[:, 20:].tolist() == want
    beams = [model.generate(ids, attention_mask=mask, num_beams=3, use_cache=use, **options) for use in (True, False)]
    assert beams[0].tolist() == beams[1].tolist() != got.tolist()
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], assistant_model=model, **options)
    from transformers import DynamicCache

    with pytest.raises(TypeError, match="DynamicCache"):
        model(ids, past_key_values=DynamicCache())


@pytest.mark.parametrize("pair", ["qwen2"], indirect=True)
def test_the_loss_is_shared_by_micro_batches(pair, rng):
    """A Trainer that accumulates gradients says how many tokens all its micro-batches have, and divides no more."""
    _, model = pair
    ids = torch.tensor(rng.integers(0, 53, (2, 20)))
    whole = model(ids, labels=ids).loss
    parts = sum(model(row[None], labels=row[None], num_items_in_batch=torch.tensor(2 * 19)).loss for row in ids)
    torch.testing.assert_close(parts, whole)


def test_a_model_without_a_gate_is_no_such_export(tmp_path):
    with pytest.raises(ConfigError, match="format='hf'"):
        write(random_lm(ModelConfig("llama", 53, 2, 24, 6, 2, 10, 40)), tmp_path, "hf")


@pytest.mark.slow
def test_a_real_model_in_a_pipeline(smollm2_file, tmp_path):
    """SmolLM2's first layers with the bundled gate: our tokens, and as many live ones in every head at the end."""
    from transformers import pipeline

    lm = first_layers(dms_jax.load(smollm2_file, dtype="float32", gate="smollm2", cr=4), 4)
    write(lm, tmp_path, "hf")
    ids = lm.tokenizer(texts.real_text())["input_ids"]
    prompts = [ids[:150], ids[400:500]]
    want = dms_jax.generate(lm, prompts, max_new_tokens=24)
    pipe = pipeline("text-generation", model=str(tmp_path), trust_remote_code=True, dtype=torch.float32)
    text = lm.tokenizer.decode(prompts[0])
    (out,) = pipe(text, max_new_tokens=24, do_sample=False, return_full_text=False)
    assert out["generated_text"] == want.text[0][0]
    for n, prompt in enumerate(prompts):
        options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}
        full = pipe.model.generate(torch.tensor([prompt]), **options)
        assert full.sequences[0, len(prompt) :].tolist() == want.tokens[n][0]
        np.testing.assert_array_equal(full.past_key_values.live_tokens[:, 0], want.by_head[n][0].live)
    assert want.achieved_cr.max() > 1.5
