"""Every kind of file that is read: a sound one, how it is used, and what another program reads in it."""

import functools
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import dms_jax
from dms_jax.config import DMSConfig, ModelConfig, RopeConfig
from dms_jax.models import transformer
from tests.helpers import mutations
from tests.helpers.gguf_files import gguf_name, permute, write_gguf
from tests.helpers.mutations import Kind
from tests.helpers.tokenizers import TEMPLATE, letters

YARN = RopeConfig("yarn", 500.0, 4.0, original_max_positions=16)
CONFIG = ModelConfig("llama", 24, 1, 8, 2, 1, 4, 8, rope=YARN, bos_id=1, eos_ids=(2, 3))
ADAPTER = DMSConfig(window=4, gate="adapter", decision_offset=1)
TOKENS = np.arange(1, 23)[None]
TEXTS = ("abc gh", "a", "<b>d e<e>", "")
INDEX = "shards/model.safetensors.index.json"

# Sound files


def write(name: str, root: Path) -> None:
    """The files that a kind needs below `root`."""
    root.mkdir()
    {"checkpoints": write_checkpoints, "run": write_run}.get(KINDS[name].file.split("/")[0], write_models)(root)


def write_models(root: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), CONFIG, ADAPTER))
    params = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32), shapes)
    gated = dms_jax.LM(CONFIG, params, None, ADAPTER, 4)
    dms_jax.save_gate(gated, root / "gate.safetensors")
    dms_jax.save(gated, root / "gated")
    del params["layers_0"]["attn"]["gate"]
    dms_jax.save(dms_jax.LM(CONFIG, params, letters(template=TEMPLATE)), root / "whole")
    tensors = load_file(root / "whole" / "model.safetensors")
    shutil.copytree(root / "whole", root / "shards")
    (root / "shards" / "model.safetensors").unlink()
    shards = {name: f"model-{n % 2}.safetensors" for n, name in enumerate(sorted(tensors))}
    for shard in set(shards.values()):
        save_file({k: v for k, v in tensors.items() if shards[k] == shard}, root / "shards" / shard)
    (root / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": shards}))
    words = ["<p>", "<b>", "<e>", "<|im_end|>", *"abcdefgh", "Ġ", "ab", "abc", "gh"]
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3] * 4 + [1] * (len(words) - 4), "tokenizer.ggml.merges": ["a b", "ab c", "g h"],
        "tokenizer.chat_template": "{{ 1 }}", "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 16,
    }  # fmt: skip
    write_gguf(root / "model.gguf", CONFIG, tensors, metadata=metadata)


def state(number: int):
    from dms_jax.training.step import TrainState

    return TrainState({"w": jnp.full((4, 3), float(number))}, (), jnp.int32(number))


def write_checkpoints(root: Path) -> None:
    from dms_jax.training.checkpoint import Checkpoints

    with Checkpoints(root / "checkpoints", keep=3) as checkpoints:
        for n in (2, 3):
            checkpoints.save(n, state(n), [n, 2 * n])


def write_run(root: Path) -> None:
    """What a retrofit and an experiment leave, and what a retrofit is given."""
    import pyarrow
    import yaml
    from pyarrow import parquet

    from dms_jax.training.config import LoraConfig, RetrofitConfig, SourceConfig
    from experiments.run import write_json
    from scripts.retrofit import record_run

    folder = root / "run"
    folder.mkdir()
    data = (SourceConfig("a.jsonl", 2.0), SourceConfig("org/name", subset="x"))
    settings = RetrofitConfig(mode="lora", lora=LoraConfig(4), crs=(2.0, 2.5), data=data, dms=DMSConfig(window=4))
    record_run(folder, settings)
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads((folder / "run.json").read_text())))
    log = [{"step": n, "loss": 1 / n, "alpha_by_head": [[0.5, 0.25]], "mfu": 0.1} for n in (10, 20, 30)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    write_json(folder / "config.json", {"model": "mini", "limit": 3, "seed": 0, "weights": {"base/full": "1a"}})
    write_json(folder / "metadata.json", [{"started": "2026-01-01", "command": "python -m x", "cpu_count": 2}])
    samples = [
        {"id": f"p{n}", "chain": n, "source": "base/full", "text": "a\u0142", "answer": None if n else "7", "tokens": 9,
         "finished": True, "correct": not n, "kv_reads": 1.5, "live_by_head": [[1.0]]} for n in range(3)
    ]  # fmt: skip
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c d"}]
    rows = [{"messages": chat, "id": 1}, {"messages": chat[:1] * 2, "id": 2}, {"messages": chat, "id": None}]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet")


# Models


def loaded(lm: dms_jax.LM) -> dict[str, Any]:
    """What may differ between two models; shows that it runs."""
    flat = traverse_util.flatten_dict(lm.params, sep="/")
    found = {path: np.asarray(value) for path, value in flat.items()}
    if hasattr(lm.tokenizer, "decode"):
        ids = [lm.tokenizer(text)["input_ids"] for text in TEXTS]
        found |= {"ids": ids, "texts": [lm.tokenizer.decode(each) for each in ids if each]}
        found["ends"] = lm.tokenizer.bos_token, lm.tokenizer.eos_token
    return found | {"config": lm.config, "dms": lm.dms, "cr": lm.cr}


def load(root: Path, file: str) -> dms_jax.LM:
    """Without the tokenizer, which is slow, where it is not what is damaged."""
    if file == "gate.safetensors":
        return dms_jax.load(root / "whole", "float32", gate=root / file, tokenizer=object())
    if file.endswith(".gguf"):
        return dms_jax.load(root / file, "float32")
    return dms_jax.load((root / file).parent, "float32", tokenizer=None if "tokenizer" in file else object())


def use_model(file: str):
    return lambda root: loaded(load(root, file))


def says_config(file: str, root: Path, got: dict[str, Any]) -> bool:
    """The logits of transformers' own model of the folder, and its ids; of a gate's keys their values."""
    import torch
    from transformers import AutoModelForCausalLM

    folder, config = (root / file).parent, got["config"]
    raw = json.loads((root / file).read_bytes())
    for key in ("rms_norm_eps", "rope_theta"):  # to transformers 1 is no float
        raw |= {key: float(raw[key])} if key in raw else {}
    (root / file).write_text(json.dumps(raw))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        want = theirs(torch.tensor(TOKENS % config.vocab_size)).logits.numpy()
    mine = np.asarray(load(root, file).logits(TOKENS % config.vocab_size))
    ids = {"bos_id": theirs.config.bos_token_id, "max_positions": theirs.config.max_position_embeddings}
    keys = {
        "window": "dms_window_size", "scale": "dms_alpha_scale", "logit_bias": "dms_initial_alpha_offset",
        "per": "dms_alpha_per", "tau": "dms_tau", "decision_offset": "dms_decision_offset", "sinks": "dms_sinks",
    }  # fmt: skip
    written = {field: raw[key] for field, key in keys.items() if key in raw}
    gate = got["dms"] is None and not written or all(getattr(got["dms"], k) == v for k, v in written.items())
    same_ids = all(getattr(config, key) == value for key, value in ids.items())
    return same_ids and gate and np.allclose(mine, want, rtol=1e-3, atol=1e-3)


def says_generation(file: str, root: Path, got: dict[str, Any]) -> bool:
    ids = json.loads((root / file).read_bytes()).get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return set(got["config"].eos_ids) == {*CONFIG.eos_ids, *ids}


def says_tensors(file: str, root: Path, got: dict[str, Any]) -> bool:
    """What the safetensors library reads, against what is saved of what was read."""
    from safetensors import safe_open
    from safetensors.numpy import load_file

    lm = replace(load(root, file), tokenizer=None)
    if file == "gate.safetensors":
        dms_jax.save_gate(lm, root / "again.safetensors")
        with safe_open(root / file, "numpy") as opened:
            said = opened.metadata() or {}
        raw = json.loads(said.get("dms", "{}"))  # none in NVIDIA's adapters: then their recipe's values hold
        written = raw.get("dms_window_size", 512), raw.get("dms_alpha_scale", 100.0), raw.get("dms_cr")
        if written != (lm.dms.window, lm.dms.scale, lm.cr) or not said.keys() <= {"format", "dms"}:
            return False
        again, files = load_file(root / "again.safetensors"), [root / file]
    else:
        dms_jax.save(lm, root / "again")
        again, files = (
            load_file(root / "again" / "model.safetensors"),
            sorted((root / file).parent.glob("*.safetensors")),
        )
    theirs = {name: value for each in files for name, value in load_file(each).items()}
    theirs = {name: value for name, value in theirs.items() if not name.endswith("inv_freq")}
    return again.keys() == theirs.keys() and all(np.array_equal(again[k], v.astype("f4")) for k, v in theirs.items())


def says_tokenizer(file: str, root: Path, got: dict[str, Any]) -> bool:
    """The library of tokenizer.json alone, and the tokens that tokenizer_config.json names, which are special."""
    from tokenizers import Tokenizer

    if not (root / file).exists() and "ids" not in got:
        return True  # a folder without a tokenizer
    whole = (root / file).with_name("tokenizer.json")
    alone = Tokenizer.from_file(str(whole))
    named_in = (root / file).parent / "tokenizer_config.json"
    raw = json.loads(named_in.read_bytes()) if named_in.exists() else {}

    def named(key: str) -> Any:
        return raw[key].get("content") if isinstance(raw.get(key), dict) else raw.get(key)

    ends = all(mine == named(key) for mine, key in zip(got["ends"], ("bos_token", "eos_token"), strict=True))
    there = {token["content"] for token in json.loads(whole.read_bytes()).get("added_tokens", [])}
    wanted = {token for token in map(named, ("bos_token", "eos_token")) if isinstance(token, str)}
    alone.add_special_tokens(sorted(wanted - there))
    ids = [alone.encode(text).ids for text in TEXTS]
    if getattr(alone.model, "dropout", None):  # merges are left out at random: other ids of the same text
        return ends and got["texts"] == [alone.decode(each, skip_special_tokens=False) for each in ids if each]
    return ends and got["ids"] == ids


def says_gguf(root: Path, got: dict[str, Any]) -> bool:
    """What llama.cpp's own package reads in it: numbers, ids and tensors."""
    import gguf
    from safetensors.numpy import load_file

    reader, config = gguf.GGUFReader(root / "model.gguf"), got["config"]
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tokens = fields.get("tokenizer.ggml.tokens", ())
    numbers = {
        "llama.block_count": config.num_layers, "llama.context_length": config.max_positions,
        "llama.embedding_length": config.model_dim, "tokenizer.ggml.bos_token_id": config.bos_id,
        "llama.attention.layer_norm_rms_epsilon": np.float32(config.norm_eps),
    }  # fmt: skip
    theta = np.float32(fields.get("llama.rope.freq_base", 1e4)) == np.float32(config.rope.theta)
    ends = {fields.get("tokenizer.ggml.eos_token_id"), tokens.index("<|im_end|>") if "<|im_end|>" in tokens else None}
    ids = set(config.eos_ids) <= ends
    if not theta or not ids or any(fields.get(key) != value for key, value in numbers.items()):
        return False
    dms_jax.save(dms_jax.LM(config, load(root, "model.gguf").params), root / "again")
    again = load_file(root / "again" / "model.safetensors")
    theirs = {t.name: np.asarray(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    for name, value in again.items():
        if "q_proj" in name or "k_proj" in name:
            value = permute(value, config.num_heads if "q_proj" in name else config.num_kv_heads)
        if not np.array_equal(value, theirs[gguf_name(name)].reshape(value.shape)):
            return False
    return len(again) == len(theirs)


# Folders of runs


def use_checkpoints(root: Path) -> dict[str, Any]:
    from dms_jax.training.checkpoint import Checkpoints

    with Checkpoints(root / "checkpoints", keep=3) as checkpoints:
        step, found, cursor = checkpoints.restore(state(0))
    return {"step": step, "own": int(found.step), "w": np.asarray(found.params["w"]), "cursor": cursor}


def says_checkpoints(root: Path, got: dict[str, Any]) -> bool:
    """That of step 2, once that of step 3 was put aside."""
    want = {"step": 2, "own": 2, "w": np.asarray(state(2).params["w"]), "cursor": [2, 4]}
    return mutations.same(got, want) and len(list((root / "rejected").iterdir())) == 1


def use_settings(root: Path) -> dict[str, Any]:
    from scripts.retrofit import read_run

    return asdict(read_run(root / "run"))


def use_yaml(root: Path) -> dict[str, Any]:
    from dms_jax.config_files import load_yaml
    from dms_jax.training.config import RetrofitConfig

    return asdict(load_yaml(RetrofitConfig, root / "run" / "config.yaml"))


def says_settings(file: str, root: Path, got: dict[str, Any]) -> bool:
    """Every value that YAML (of which JSON is a part, but for NaN) reads there."""
    import yaml

    text = (root / file).read_bytes()
    raw = yaml.safe_load(text) if file.endswith("yaml") else json.loads(text)

    def agrees(value: Any, mine: Any) -> bool:
        if isinstance(value, dict):
            return all(agrees(value[key], mine[key]) for key in value)
        if isinstance(value, list):
            return len(value) == len(mine) and all(map(agrees, value, mine))
        return mine == (float(value) if isinstance(mine, float) and isinstance(value, str) else value)

    return agrees(raw, got)


def use_log(root: Path) -> dict[str, Any]:
    """As a run that goes on."""
    from dms_jax.training.log import Log, read_log

    with Log(root / "run" / "log.jsonl", 20, 30, None, ()):
        pass
    return {"lines": read_log(root / "run" / "log.jsonl")}


def says_log(root: Path, got: dict[str, Any]) -> bool:
    """Whole lines are kept, up to the step at which the run goes on."""
    lines, damaged = got["lines"]
    return not damaged and all(line["step"] <= 20 for line in lines) and len(lines) <= 3


def use_samples(root: Path) -> dict[str, Any]:
    """As an experiment that goes on."""
    from experiments.run import open_run, read_json

    folder = root / "run"
    config = {"model": "mini", "limit": 3, "seed": 0, "weights": {"base/full": "1a"}}
    run = open_run(root, "x", config, run_dir=folder)
    keys = [(sample["source"], sample["id"], sample["chain"]) for sample in run.samples]
    entries = read_json(folder / "metadata.json", list)
    run.close()
    return {"samples": run.samples, "keys": keys, "entries": entries}


def says_samples(root: Path, got: dict[str, Any]) -> bool:
    """Every line that is JSON, but for one without an end."""
    lines = (root / "run" / "samples.jsonl").read_bytes().splitlines()
    entries = json.loads((root / "run" / "metadata.json").read_bytes())
    return repr(got["samples"]) == repr([json.loads(line) for line in lines]) and repr(entries) == repr(got["entries"])


def use_documents(file: str, root: Path) -> dict[str, Any]:
    from dms_jax.training.config import SourceConfig
    from dms_jax.training.documents import open_documents

    documents = open_documents(SourceConfig(str(root / file), messages="messages"), tokenizer())
    return {"ids": [documents.encode([row])[0].tolist() for row in range(len(documents))]}


def says_documents(file: str, root: Path, got: dict[str, Any]) -> bool:
    from pyarrow import parquet

    if file.endswith("parquet"):
        rows = parquet.read_table(root / file).to_pylist()
    else:
        rows = [json.loads(line) for line in (root / file).read_bytes().splitlines() if line.strip()]
    chats = [[{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]] for row in rows]
    return got["ids"] == [tokenizer().apply_chat_template(chat, return_dict=True)["input_ids"] for chat in chats]


@functools.cache
def tokenizer():
    return letters(template=TEMPLATE)


def model(file: str, mutate, says) -> Kind:
    return Kind(file, mutate, use_model(file), functools.partial(says, file))


def documents(file: str, mutate) -> Kind:
    return Kind(file, mutate, functools.partial(use_documents, file), functools.partial(says_documents, file))


def settings(file: str, mutate, use) -> Kind:
    return Kind(file, mutate, use, functools.partial(says_settings, file))


KINDS = {
    "config": model("whole/config.json", mutations.text_file, says_config),
    "config of a gate": model("gated/config.json", mutations.text_file, says_config),
    "generation config": model("whole/generation_config.json", mutations.text_file, says_generation),
    "tensors": model("whole/model.safetensors", mutations.tensor_file, says_tensors),
    "index": model(INDEX, mutations.text_file, says_tensors),
    "shard": model("shards/model-0.safetensors", mutations.tensor_file, says_tensors),
    "gate": model("gate.safetensors", mutations.tensor_file, says_tensors),
    "tokenizer": model("whole/tokenizer.json", mutations.text_file, says_tokenizer),
    "tokenizer config": model("whole/tokenizer_config.json", mutations.text_file, says_tokenizer),
    "gguf": Kind("model.gguf", mutations.gguf_file, use_model("model.gguf"), says_gguf),
    "checkpoint": Kind("checkpoints/3/**/*", mutations.some_bytes, use_checkpoints, says_checkpoints),
    "run.json": Kind(
        "run/run.json", mutations.text_file, use_settings, functools.partial(says_settings, "run/run.json")
    ),
    "yaml": Kind("run/config.yaml", mutations.yaml_file, use_yaml, functools.partial(says_settings, "run/config.yaml")),
    "log.jsonl": Kind("run/log.jsonl", mutations.line_file, use_log, says_log),
    "metadata.json": Kind("run/metadata.json", mutations.text_file, use_samples, says_samples),
    "samples.jsonl": Kind("run/samples.jsonl", mutations.line_file, use_samples, says_samples),
    "data.jsonl": documents("run/data.jsonl", mutations.line_file),
    "data.parquet": documents("run/data.parquet", mutations.some_bytes),
}
