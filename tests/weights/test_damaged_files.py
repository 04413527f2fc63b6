"""Whatever a file holds, `load` gives a model or an error that names the file: mutations of every kind of file.

Half of them are the same at every run, half are fresh; a failure names the seed and the number of the mutation.
"""

import contextlib
import copy
import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

import dms_jax
from dms_jax.config import ConfigError, DMSConfig, ModelConfig, RopeConfig
from dms_jax.models import transformer
from dms_jax.weights.safetensors import WeightError
from tests.helpers.gguf_files import write_gguf

YARN = RopeConfig("yarn", 500.0, 4.0, original_max_positions=16)
CONFIG = ModelConfig("llama", 24, 1, 8, 2, 1, 4, 8, rope=YARN, bos_id=1, eos_ids=(2, 3))
ADAPTER = DMSConfig(window=4, gate="adapter", decision_offset=1)
MUTATIONS = 250  # of each kind of file and seed
SECONDS = 20  # a load that takes longer hangs

NASTY = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**18, 1e300, 1e-300, 0.5, -0.5, float("nan"), float("inf"), "", "x",
    "\ud800", "1", "../model.safetensors", "/etc/hostname", [], {}, [None], [1, 2], [[]], {"a": 1}, "F16", "BF16",
)  # fmt: skip


class Hang(BaseException):
    """Not an Exception, so that nothing takes it for a fault of the file."""


@contextlib.contextmanager
def limited(seconds: float):
    def ring(*_):
        raise Hang

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: n for n, token in enumerate(["<p>", "<b>", "<e>", "<t>", *"abcdefgh ", "ab", "abc", "gh"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "c"), ("g", "h")], unk_token="<p>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing("<b> $A", special_tokens=[("<b>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<b>", eos_token="<e>", chat_template="{{ 1 }}"
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder of each kind of file, all of one model."""
    root = tmp_path_factory.mktemp("files")
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), CONFIG, ADAPTER))
    params = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32), shapes)
    gated = dms_jax.LM(CONFIG, params, None, ADAPTER, 4)
    dms_jax.save_gate(gated, root / "gate.safetensors")
    dms_jax.save(gated, root / "gated")
    del params["layers_0"]["attn"]["gate"]
    dms_jax.save(dms_jax.LM(CONFIG, params, tokenizer()), root / "whole")
    from safetensors.numpy import load_file, save_file

    tensors = load_file(root / "whole" / "model.safetensors")
    shutil.copytree(root / "whole", root / "shards")
    (root / "shards" / "model.safetensors").unlink()
    places = {name: f"model-{n % 2}.safetensors" for n, name in enumerate(sorted(tensors))}
    for shard in set(places.values()):
        save_file({k: v for k, v in tensors.items() if places[k] == shard}, root / "shards" / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (root / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    words = ["<p>", "<b>", "<e>", "<|im_end|>", *"abcdefgh", "Ġ", "ab", "abc", "gh"]
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3] * 4 + [1] * (len(words) - 4), "tokenizer.ggml.merges": ["a b", "ab c", "g h"],
        "tokenizer.chat_template": "{{ 1 }}", "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 16,
    }  # fmt: skip
    write_gguf(root / "model.gguf", CONFIG, tensors, metadata=metadata)
    return root


# Mutations


def places(value, path=()):
    """The path of every value inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutated_json(rng, text: bytes) -> bytes:
    """One value of a JSON text replaced, left out, given twice or put under another name."""
    value = json.loads(text)
    every = list(places(value))
    path = every[rng.integers(len(every))]
    new = NASTY[rng.integers(len(NASTY))]
    if not path:
        return json.dumps(new).encode()
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    key, kind = path[-1], rng.integers(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(new)] = holder.pop(key)
    elif kind == 2 and isinstance(holder, dict):
        holder["x" + key] = copy.deepcopy(holder[key])
    elif kind == 3:
        holder[key] = "DEEP"
        return json.dumps(value).encode().replace(b'"DEEP"', b"[" * 20000 + b"]" * 20000)
    elif kind == 4:
        other = every[rng.integers(len(every))]
        found = value
        for step in other:
            found = found[step]
        holder[key] = copy.deepcopy(found)
    else:
        holder[key] = new
    return json.dumps(value).encode()


def mutated_bytes(rng, data: bytes, most: int | None = None) -> bytes:
    """A few bytes of the first `most` changed, or the file cut, filled or shifted there."""
    at = int(rng.integers(most or len(data)))
    count = int(rng.integers(1, 9))
    kind = rng.integers(7)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + rng.bytes(count) + data[at:]
    if kind == 2:
        return data[:at] + data[at + count :]
    if kind == 3:
        return data[:at] + b"\xff" * count + data[at + count :]
    if kind == 4:
        return data[:at] + b"\0" * count + data[at + count :]
    if kind == 5:
        return data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
    return data[:at] + rng.bytes(count) + data[at + count :]


def text_file(rng, data: bytes) -> bytes:
    return mutated_json(rng, data) if rng.random() < 0.8 else mutated_bytes(rng, data)


def tensor_file(rng, data: bytes) -> bytes:
    """Half of the mutations are in the header, which is written again with its length; few are in the data."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        header = mutated_json(rng, data[8 : 8 + size])
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    return mutated_bytes(rng, data, len(data) if rng.random() < 0.2 else 8 + size)


def gguf_file(rng, data: bytes) -> bytes:
    return mutated_bytes(rng, data, len(data) if rng.random() < 0.1 else data.index(b"blk.0.ffn_up") + 200)


KINDS = {
    "config": ("whole/config.json", text_file),
    "config of a gate": ("gated/config.json", text_file),
    "generation config": ("whole/generation_config.json", text_file),
    "tensors": ("whole/model.safetensors", tensor_file),
    "index": ("shards/model.safetensors.index.json", text_file),
    "gate": ("gate.safetensors", tensor_file),
    "tokenizer": ("whole/tokenizer.json", text_file),
    "tokenizer config": ("whole/tokenizer_config.json", text_file),
    "gguf": ("model.gguf", gguf_file),
}


def load(root: Path, file: str):
    if file == "gate.safetensors":
        return dms_jax.load(root / "whole", "float32", gate=root / file, tokenizer=object())
    if file.endswith(".gguf"):
        return dms_jax.load(root / file, "float32")
    return dms_jax.load((root / file).parent, "float32", tokenizer=None if "tokenizer" in file else object())


def check_accepted(lm, sound, file: str, old: bytes, new: bytes) -> None:
    """What a mutation may change in a model that loads: nothing in the weights but by changed weights."""
    header = 8 + int.from_bytes(old[:8], "little")
    data_changed = file.endswith(".gguf") or file.endswith("safetensors") and old[:header] == new[:header]
    mine, theirs = traverse_util.flatten_dict(lm.params), traverse_util.flatten_dict(sound.params)
    assert mine.keys() == theirs.keys()
    for path, value in mine.items():
        assert np.isfinite(value).all(), path
        assert data_changed or np.array_equal(value, theirs[path]), path
    assert all(0 <= token < CONFIG.vocab_size for token in lm.config.eos_ids)
    if lm.tokenizer is not None and hasattr(lm.tokenizer, "decode"):
        lm.tokenizer.decode(lm.tokenizer("abc gh")["input_ids"])


@pytest.mark.parametrize("fresh", [False, True], ids=["seeded", "fresh"])
@pytest.mark.parametrize("kind", KINDS)
def test_mutations(files, tmp_path, kind, fresh):
    file, mutate = KINDS[kind]
    seed = np.random.SeedSequence().entropy % 2**32 if fresh else 0
    root = tmp_path / "files"
    shutil.copytree(files, root)
    old, sound, outcomes = (root / file).read_bytes(), load(root, file), {"refused": 0, "accepted": 0}
    for n in range(MUTATIONS):
        new = mutate(np.random.default_rng((seed, n)), old)
        (root / file).write_bytes(new)
        try:
            with limited(SECONDS):
                lm = load(root, file)
                check_accepted(lm, sound, file, old, new)
            outcomes["accepted"] += 1
        except (ConfigError, WeightError, FileNotFoundError) as error:
            assert str(root) in str(error), f"seed {seed}, mutation {n}: {error}"
            outcomes["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}, mutation {n}: {type(error).__name__}: {error}") from error
    print(kind, seed, outcomes)
    assert outcomes["refused"] > MUTATIONS / 20
