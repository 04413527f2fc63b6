"""The peers of the decode benchmark are what they claim: transformers' own step, on a cache that holds its tokens."""

import dataclasses
import json

import pytest
import torch
import transformers

from dms_jax.config import ConfigError
from dms_jax.weights.huggingface import config_to_hf
from scripts.benchmarks import decode_peers, fastdms_peer
from scripts.benchmarks.bench_decode import MODELS

TIED = dataclasses.replace(MODELS["tiny"], family="llama", qk_norm=False, tie_embeddings=True)
CONFIGS = {"qwen3": MODELS["tiny"], "llama, tied": TIED}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def small(tmp_path, **changes) -> decode_peers.Settings:
    defaults = {"model": "tiny", "device": "cpu", "dtype": "float32", "steps": 2, "rounds": 1, "modes": ("eager",)}
    return decode_peers.Settings(**defaults | {"out": tmp_path / "peers.json"} | changes)


def rows(settings) -> list[dict]:
    decode_peers.main(settings)
    return json.loads(settings.out.read_text())["rows"]


def test_the_model_is_transformers_own(config):
    """What skipping the slow initialisation leaves out matters: tied weights, the buffers of RoPE."""
    model = decode_peers.random_model(config, "float32", "cpu", seed=1)
    values = config_to_hf(config)
    plain = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(values.pop("model_type"), **values), dtype=torch.float32
    )
    plain.load_state_dict(model.state_dict())
    tokens = torch.randint(64, (2, 20))
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits)
    shared = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert shared == config.tie_embeddings


@torch.inference_mode()
def test_steps_equal_a_forward_pass(config):
    """A prompt read into the random cache, then steps: their logits are those of all tokens at once."""
    model = decode_peers.random_model(config, "float32", "cpu", seed=2)
    for weight in model.parameters():  # large enough that a wrong key would be seen
        if weight.ndim > 1:
            weight.mul_(10)
    tokens = torch.randint(64, (3, 24))
    wanted = model(tokens).logits
    cache = decode_peers.random_cache(model, 3, 32)
    decode_peers.rewind(cache, 0)
    model(tokens[:, :16], **{decode_peers.cache_argument(model): cache})
    step = decode_peers.stepper(model, cache)
    for n in range(16, 24):
        chosen, logits = step(tokens[:, n : n + 1])
        torch.testing.assert_close(logits, wanted[:, n], atol=1e-4, rtol=1e-4)
        assert torch.equal(chosen[:, 0], wanted[:, n].argmax(-1))
    decode_peers.rewind(cache, 20)  # the tokens from 20 on are to be fed again
    torch.testing.assert_close(step(tokens[:, 20:21])[1], wanted[:, 20], atol=1e-4, rtol=1e-4)
    decode_peers.rewind(cache, 21)
    assert not torch.allclose(step(tokens[:, 20:21])[1], wanted[:, 20], atol=1e-3)


def test_bytes(config):
    model = decode_peers.random_model(config, "float32", "cpu", seed=0)
    weights = sum(weight.nbytes for weight in model.parameters())
    layers = [(layer.keys, layer.values) for layer in decode_peers.random_cache(model, 3, 32).layers]
    stored = sum(x.nbytes for pair in layers for x in pair)
    group = config.num_heads // config.num_kv_heads
    repeated = group * sum(x.nbytes for x in layers[0])
    assert decode_peers.bytes_needed(config, 3, 32, weights, 4) == weights + stored + repeated
    memory = 10 * (weights + stored + repeated)
    B = decode_peers.largest_batch(config, 32, weights, 4, memory)
    needed = [decode_peers.bytes_needed(config, n, 32, weights, 4) for n in (B, B + 1)]
    assert needed[0] <= 0.9 * memory < needed[1]


def test_rows(tmp_path):
    """A row for each mode, one for a cell that cannot fit; a mode that fails does not end the others."""
    settings = small(tmp_path, cells=("9999x512", "2x32", "maxx64"), modes=("graph", "eager"), memory=2_000_000)
    missing, graph, eager, *largest = rows(settings)
    assert not missing["fits"] and missing["bytes_needed"] > settings.memory and "mode" not in missing
    assert graph["mode"] == "graph" and "CUDAGraph" in graph["error"]
    assert eager["mode"] == "eager" and eager["tokens_per_second"] == 2 / eager["seconds_per_step"]
    assert eager["kv_bytes"] == 2 * 2 * 32 * 2 * 2 * 16 * 4 and len(eager["rounds"]) == settings.rounds
    assert largest[1]["largest_batch"] and largest[1]["batch"] > 2 and "error" not in largest[1]


def test_a_run_that_is_broken_off_keeps_its_rows(tmp_path, monkeypatch):
    measure = decode_peers.measure

    def interrupted(settings, model, cache, batch, context, mode):
        if mode == "graph":
            raise KeyboardInterrupt
        return measure(settings, model, cache, batch, context, mode)

    settings = small(tmp_path, cells=("2x32",), modes=("eager", "graph"))
    monkeypatch.setattr(decode_peers, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode_peers.main(settings)
    assert [row["mode"] for row in json.loads(settings.out.read_text())["rows"]] == ["eager"]


def test_the_compiled_step_is_one_graph(tmp_path, monkeypatch):
    compile_with, given = torch.compile, {}

    def traced(function, **options):
        given.update(options)
        return compile_with(function, backend="eager", fullgraph=options["fullgraph"], dynamic=options["dynamic"])

    monkeypatch.setattr(torch, "compile", traced)
    (row,) = rows(small(tmp_path, cells=("2x32",), modes=("compiled",)))
    assert "error" not in row and row["seconds_per_step"] > 0
    assert given == {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}


def test_memory_that_is_not_there_is_a_row(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decode_peers, "random_cache", full)
    (row,) = rows(small(tmp_path, cells=("2x32",)))
    assert row["fits"] and row["error"].startswith("OutOfMemoryError")


def test_a_cell_that_is_none():
    with pytest.raises(ConfigError, match="BATCHxCONTEXT"):
        decode_peers.parse("largex8192")


def test_fastdms_decides_by_token(config, tmp_path):
    """The neuron of each group's first query head is negative for the token that is kept, in every layer."""
    fastdms_peer.write_model(decode_peers.random_model(config, "bfloat16", "cpu", seed=3), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    made = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, given, out: made.append(out))
    cell = fastdms_peer.Cell("", str(tmp_path), "fastdms", batch=1, context=2048, cr=4.0)
    tokens = torch.tensor([fastdms_peer.prompt(cell, config.vocab_size, number=0)])
    with torch.inference_mode():
        model(tokens)
    kept = (tokens == fastdms_peer.KEPT)[0]
    group = config.num_heads // config.num_kv_heads
    assert len(made) == config.num_layers
    for queries in made:
        neurons = queries.view(-1, config.num_kv_heads, group, config.head_dim)[:, :, 0, -1]
        assert torch.equal(neurons < 0, kept[:, None].expand_as(neurons)) and (neurons != 0).all()
    window = fastdms_peer.WINDOW
    assert int(kept[: -window - 1].sum()) + window + 1 == 2048 / 4 and not kept[-window - 1 :].any()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, use_fast=True)
    assert (
        tokenizer.eos_token_id == 0
        and json.loads((tmp_path / "dms_metadata.json").read_text())["window_size"] == window
    )


def test_attention_in_place_of_flash_attn():
    q, k = torch.randn(2 * 6, 4, 8), torch.randn(2 * 6, 2, 8)
    out = fastdms_peer.sdpa_varlen(q, k, k, torch.tensor([0, 6, 12]), 6, 0.5, True, cu_seqlens_k=None, max_seqlen_k=6)
    for b, h, t in ((0, 0, 0), (1, 3, 4)):
        keys = k[6 * b : 6 * b + t + 1, h // 2]
        wanted = torch.softmax(0.5 * keys @ q[6 * b + t, h], 0) @ keys
        torch.testing.assert_close(out[6 * b + t, h], wanted)


def test_fastdms_that_waits_forever_is_a_row_that_says_where(tmp_path):
    """Its group of one process needs no network; what takes too long is given up."""
    (tmp_path / "fastdms.py").write_text(
        "import time, torch.distributed\n"
        "class SamplingParams:\n    def __init__(self, **_): pass\n"
        "class LLM:\n    def __init__(self, *_, **__):\n"
        '        torch.distributed.init_process_group("gloo", "tcp://localhost:2333", world_size=1, rank=0)\n'
        "        assert torch.distributed.get_world_size() == 1\n"
        "        self.wait_for_godot()\n"
        "    def wait_for_godot(self):\n        time.sleep(600)\n"
    )
    cell = fastdms_peer.Cell(str(tmp_path), "", "fastdms", batch=1, context=512, cr=2.0, seconds=10)
    error = fastdms_peer.measure(cell, {"mode": "fastdms"})["error"]
    assert error.startswith("Timeout") and "wait_for_godot" in error


def test_fastdms_that_is_not_there_is_a_row(tmp_path):
    settings = small(tmp_path, cells=("2x32",), fastdms=tmp_path / "nothing", fastdms_modes=("fastdms_fp8",), cr=2.0)
    eager, fastdms = rows(settings)
    assert eager["mode"] == "eager" and "error" not in eager
    assert fastdms["mode"] == "fastdms_fp8" and "No module named 'fastdms'" in fastdms["error"] and fastdms["cr"] == 2
    assert str(tmp_path) not in settings.out.read_text().replace(fastdms["error"], "")
