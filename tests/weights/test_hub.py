"""Load and save: bit-for-bit round trips, loud errors, atomic writes and peak memory."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import dms_jax
from dms_jax.config import ConfigError, DMSConfig, ModelConfig, RopeConfig
from dms_jax.weights import load
from dms_jax.weights.safetensors import WeightError
from tests.helpers import models, tiny
from tests.helpers.gguf_files import write_gguf
from tests.helpers.loading import MEMORY, assert_same_bits

CONFIG = ModelConfig("llama", 97, 2, 48, 6, 2, 16, 40, rope=RopeConfig(theta=500.0), eos_ids=(2,), bos_id=1)
ADAPTER = DMSConfig(window=4, gate="adapter", decision_offset=1)


def random_lm(dtype="float32", dms=None, config=CONFIG, seed=0, cr=None) -> dms_jax.LM:
    return models.random_lm(config, dms, seed, dtype, cr)


@pytest.fixture
def folder(tmp_path) -> Path:
    dms_jax.save(random_lm(), tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change) -> Path:
    """Applies `change` to the dict of tensors in model.safetensors, with the safetensors library."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def shard(folder: Path, place=lambda names: {name: n % 2 for n, name in enumerate(names)}) -> Path:
    """Splits model.safetensors in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    where = {name: f"model-{n + 1:05}-of-00002.safetensors" for name, n in place(sorted(tensors)).items()}
    for file in sorted(set(where.values())):
        save_file({k: v for k, v in tensors.items() if where[k] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dms", [None, DMSConfig(window=3), ADAPTER], ids=["base", "query", "adapter"])
def test_round_trip_bit_for_bit(tmp_path, dtype, dms):
    lm = random_lm(dtype, dms, cr=dms and 2.5)
    dms_jax.save(lm, tmp_path)
    again = dms_jax.load(tmp_path, dtype=dtype)
    assert (again.config, again.dms, again.cr, again.tokenizer) == (CONFIG, dms, dms and 2.5, None)
    assert_same_bits(again.params, lm.params)
    # The independent reader sees the same bytes, and nothing else was left in the folder.
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt", "written_by": "dms_jax"}
        q = file.get_tensor("model.layers.1.self_attn.q_proj.weight")
    assert q.tobytes() == np.asarray(lm.params["layers_1"]["attn"]["q"]["kernel"]).reshape(48, 96).T.tobytes()
    assert sorted(os.listdir(tmp_path)) == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_dtype_is_converted_on_the_way_in(tmp_path, stored, wanted):
    lm = random_lm(stored)
    dms_jax.save(lm, tmp_path)
    want = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(wanted)), lm.params)
    assert_same_bits(dms_jax.load(tmp_path, dtype=wanted).params, want)


def test_shards_equal_one_file(folder):
    whole = dms_jax.load(folder, dtype="float32").params
    assert_same_bits(dms_jax.load(shard(folder), dtype="float32").params, whole)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(NORM), f"missing tensor {NORM}"),
        (drop(HEAD), f"missing tensor {HEAD}"),
        (
            put("model.layers.2.mlp.up_proj.weight", np.ones(3, "f")),
            "unexpected tensor model.layers.2.mlp.up_proj",
        ),
        (put("model.layers.0.self_attn.q_proj.bias", np.ones(96, "f")), "unexpected tensor .*q_proj.bias"),
        (put(NORM, np.ones(47, "f")), rf"tensor {NORM} has shape \(47,\), expected \(48,\)"),
        (put(HEAD, np.ones((48, 97), "f")), rf"tensor {HEAD} has shape \(48, 97\), expected \(97, 48\)"),
        (put(NORM, np.ones(48, np.int32)), f"tensor {NORM} has dtype I32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    with pytest.raises(WeightError, match=message):
        dms_jax.load(rewrite(folder, change), dtype="float32")


def test_redundant_tensors_are_known(folder, tmp_path):
    whole = dms_jax.load(folder, dtype="float32").params
    rewrite(folder, put("model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(8, "f")))
    assert_same_bits(dms_jax.load(folder, dtype="float32").params, whole)

    config = {**json.loads((folder / "config.json").read_text()), "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightError, match=f"{HEAD} differs"):
        dms_jax.load(folder, dtype="float32")
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors["model.embed_tokens.weight"].copy()}))
    tied = dms_jax.load(folder, dtype="float32")
    assert tied.config.tie_embeddings and "unembedding" not in tied.params


def test_shards_that_disagree_are_named(folder):
    shard(folder)
    one, two = sorted(folder.glob("model-*.safetensors"))
    both, second = load_file(one), load_file(two)
    name = sorted(second)[0]
    save_file({**both, name: second[name]}, one)
    with pytest.raises(WeightError, match=f"{name} is in {one.name}"):
        dms_jax.load(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = {**json.loads(index.read_text())["weight_map"], name: one.name}
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightError, match=f"tensor {name} is in {one.name} and in {two.name}"):
        dms_jax.load(folder)
    two.unlink()
    with pytest.raises(WeightError, match=f"shard {two.name} .* is missing"):
        dms_jax.load(folder)


def test_a_duplicate_inside_one_file_is_refused(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    header = header[:-1] + f', "{NORM}": {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}}}'.encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    with pytest.raises(WeightError, match="model.safetensors: .*invalid offset"):
        dms_jax.load(folder)


def test_truncated_files_are_named(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    cuts = [data[:cut] for cut in (0, 5, 8 + size // 2, 8 + size, len(data) - 1)]
    for damaged in (*cuts, data + b"\0", data[:8] + b"!" + data[9:]):
        file.write_bytes(damaged)
        with pytest.raises(WeightError, match="model.safetensors: truncated, damaged"):
            dms_jax.load(folder)


def test_values_beyond_float16_are_named(folder):
    rewrite(folder, put(NORM, np.full(48, 1e6, "f")))
    with pytest.raises(WeightError, match=f"{NORM} has values beyond float16"):
        dms_jax.load(folder, dtype="float16")
    dms_jax.load(folder, dtype="bfloat16")


def test_sources_that_are_not_there(folder, tmp_path):
    with pytest.raises(ConfigError, match="dtype='float64'"):
        dms_jax.load(folder, dtype="float64")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        dms_jax.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither an HF folder"):
        dms_jax.load("no-such-model")
    with pytest.raises(FileNotFoundError, match="neither an HF folder"):
        dms_jax.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="absent.gguf"):
        dms_jax.load(tmp_path / "absent.gguf")
    with pytest.raises(FileNotFoundError, match="org/no-such-model: .*hub"):
        dms_jax.load("org/no-such-model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightError, match="no model.safetensors .*pytorch_model.bin"):
        dms_jax.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json"):
        dms_jax.load(folder)


def test_hub_names_are_downloaded_without_pickles_or_code(folder, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same_bits(dms_jax.load("org/model", "float32").params, dms_jax.load(folder, "float32").params)
    assert asked["name"] == "org/model"
    assert not [p for p in asked["patterns"] if p.endswith(("bin", "py", "pt", "pth", "*"))]


def test_mini_family(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "ASSETS", tmp_path)
    members = {
        None: random_lm(seed=1),
        4: random_lm(dms=DMSConfig(), seed=2, cr=4),
        8: random_lm(dms=ADAPTER, seed=3),
    }
    for cr, lm in members.items():
        dms_jax.save(lm, tmp_path / "mini" / ("base" if cr is None else f"cr{cr}"))
    for cr, lm in members.items():
        again = dms_jax.load("mini", dtype="float32", cr=cr)
        assert again.dms == lm.dms and again.cr == cr, "recorded for 4, what was asked for of 8"
        assert_same_bits(again.params, lm.params)
    assert dms_jax.load("mini", cr=4.0).dms == DMSConfig()
    with pytest.raises(ConfigError, match="cr=0.5"):
        dms_jax.LM(CONFIG, {}, None, ADAPTER, 0.5)
    with pytest.raises(ConfigError, match="cr=3: mini has cr4, cr8"):
        dms_jax.load("mini", cr=3)
    with pytest.raises(ConfigError, match="cr=2: base has no retrofitted members"):
        dms_jax.load(tmp_path / "mini" / "base", cr=2)


def test_gate_file_over_base_weights(folder, tmp_path):
    base, adapted = dms_jax.load(folder, "float32"), random_lm(dms=ADAPTER, seed=0, cr=4)
    gate = tmp_path / "gate.safetensors"
    dms_jax.save_gate(adapted, gate)
    lm = dms_jax.load(folder, "float32", gate=gate)
    assert (lm.dms, lm.cr) == (ADAPTER, 4)
    for n in range(2):
        mine = lm.params[f"layers_{n}"]["attn"]
        assert_same_bits(mine["gate"], adapted.params[f"layers_{n}"]["attn"]["gate"])
        assert_same_bits(mine["q"], base.params[f"layers_{n}"]["attn"]["q"])
    names = set(load_file(gate))
    assert names == {f"model.layers.{n}.self_attn.dms_proj_alpha{s}.weight" for n in range(2) for s in ("", "_norm")}

    ids = tiny.tokens(2, 40)
    np.testing.assert_array_equal(lm.logits(ids), base.logits(ids))  # eviction off: the base model
    assert np.abs(lm.logits(ids, dms=ADAPTER) - base.logits(ids)).max() > 1e-2
    with pytest.raises(ConfigError, match="never retrofitted"):
        base.logits(ids, dms=ADAPTER)
    with pytest.raises(ConfigError, match="dms.gate='query': the model carries the 'adapter' gate"):
        lm.logits(ids, dms=DMSConfig(window=4))
    with pytest.raises(ConfigError, match="the parameters hold no such gate"):
        dms_jax.LM(base.config, base.params, None, ADAPTER).logits(ids, dms=ADAPTER)
    with pytest.raises(ConfigError, match="no gate with parameters of its own"):
        dms_jax.save_gate(base, gate)
    dms_jax.save(random_lm(dms=DMSConfig()), tmp_path / "query")
    with pytest.raises(ConfigError, match="gate='query'"):
        dms_jax.load(tmp_path / "query", gate=gate)
    with pytest.raises(FileNotFoundError, match="no such gate file"):
        dms_jax.load(folder, gate=tmp_path / "none")
    with pytest.raises(WeightError, match="not a gate"):
        dms_jax.load(folder, gate=folder / "model.safetensors")
    small = tmp_path / "small"
    dms_jax.save(random_lm(config=ModelConfig("llama", 97, 1, 48, 6, 2, 16, 40)), small)
    with pytest.raises(WeightError, match="unexpected tensor model.layers.1.self_attn.dms_proj_alpha"):
        dms_jax.load(small, gate=gate)


def test_logits_with_eviction():
    lm, ids = random_lm(), tiny.tokens(2, 40)
    borrowed = DMSConfig(window=100, gate="query")
    retrofitted = dms_jax.LM(lm.config, lm.params, None, borrowed)
    # A window longer than the text evicts nothing, and the borrowed neuron is hidden either way.
    np.testing.assert_allclose(retrofitted.logits(ids, dms=borrowed), retrofitted.logits(ids), atol=1e-5)
    assert np.abs(lm.logits(ids) - retrofitted.logits(ids)).max() > 1e-3
    short = DMSConfig(window=2, gate="query")
    delta = np.abs(retrofitted.logits(ids, dms=short) - retrofitted.logits(ids)).max(axis=(0, 2))
    assert delta[:3].max() < 1e-5 and delta[3:].max() > 1e-2
    with pytest.raises(ConfigError, match="tokens.shape"):
        lm.logits(ids[0])


@pytest.mark.parametrize("what", ["save", "save_gate"])
def test_a_full_disk_leaves_the_old_files(tmp_path, what):
    old, new = random_lm(dms=ADAPTER, seed=1), random_lm(dms=ADAPTER, seed=2)
    dms_jax.save(old, tmp_path / "model")
    dms_jax.save_gate(old, tmp_path / "model" / "gate.safetensors")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    assert {"config.json", "gate.safetensors", "model.safetensors"} <= set(before)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails with EFBIG
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError):
            if what == "save":
                dms_jax.save(new, tmp_path / "model")
            else:
                dms_jax.save_gate(new, tmp_path / "model" / "gate.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before


def test_params_that_do_not_fit_are_not_saved(tmp_path):
    lm = random_lm()
    del lm.params["final_norm"]
    with pytest.raises(WeightError, match="final_norm/scale"):
        dms_jax.save(lm, tmp_path)
    lm = random_lm()
    lm.params["final_norm"]["scale"] = jnp.ones(3)
    with pytest.raises(WeightError, match="final_norm/scale has shape"):
        dms_jax.save(lm, tmp_path)
    assert not list(tmp_path.iterdir())


def test_tokenizer_travels_with_the_model(folder, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "<e>": 3}, merges=[("a", "b")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="<e>", chat_template="{{ 1 }}")
    lm = dms_jax.load(folder, "float32", tokenizer=tokenizer)
    dms_jax.save(lm, tmp_path / "with")
    again = dms_jax.load(tmp_path / "with").tokenizer
    assert again("abba")["input_ids"] == tokenizer("abba")["input_ids"] == [2, 1, 0]
    assert (again.eos_token_id, again.chat_template) == (3, "{{ 1 }}")


def test_eos_ids_of_generation_config_are_added(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    assert dms_jax.load(folder).config.eos_ids == (2, 5)


BIG = ModelConfig("llama", 40000, 4, 512, 8, 2, 64, 2048, eos_ids=(2,))


@pytest.fixture(scope="module")
def big_sources(tmp_path_factory):
    """A model of 150 MB in float32 as a folder, in shards and as GGUF (float32, Q8_0), and a small twin."""
    root = tmp_path_factory.mktemp("big")
    for name, config in (("small", CONFIG), ("big", BIG)):
        dms_jax.save(random_lm(config=config), root / name)
        shutil.copytree(root / name, root / f"{name}-shards")
        shard(root / f"{name}-shards")
        tensors = load_file(root / name / "model.safetensors")
        kinds = ("F32", "Q8_0") if name == "big" else ("F32", "F16")
        for kind, label in zip(kinds, ("f32", "q8"), strict=True):
            write_gguf(root / f"{name}-{label}.gguf", config, tensors, kind=kind)
    return root


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures resident memory through /proc")
@pytest.mark.parametrize(
    ("end", "dtype"),
    [
        ("", "bfloat16"),
        ("", "float32"),
        ("-shards", "bfloat16"),
        ("-f32.gguf", "bfloat16"),
        ("-q8.gguf", "bfloat16"),
    ],
)
def test_peak_memory_of_loading(big_sources, end, dtype):
    command = [sys.executable, "-c", MEMORY, big_sources / f"small{end}", big_sources / f"big{end}", dtype]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert result["size"] > (70e6 if dtype == "bfloat16" else 140e6)
    # Below 1 the parameters would not all have been resident and the measure would be broken.
    assert 0.98 < result["ratio"] < 1.3, result
