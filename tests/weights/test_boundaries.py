"""What load, save and LM refuse by name: odd files, foreign keys, weights that are NaN, tokens that are no ids."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dms_jax
from dms_jax.config import ConfigError, DMSConfig, ModelConfig
from dms_jax.models import transformer
from dms_jax.weights.safetensors import WeightError, open_safetensors
from tests.helpers.gguf_files import write_gguf
from tests.helpers.tokenizers import letters

CONFIG = ModelConfig("llama", 24, 1, 8, 2, 1, 4, 8, bos_id=1, eos_ids=(2,))
ADAPTER = DMSConfig(window=4, gate="adapter")
NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


def random_lm(dms=None, cr=None) -> dms_jax.LM:
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), CONFIG, dms))
    params = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(0).normal(size=x.shape), jnp.float32), shapes)
    return dms_jax.LM(CONFIG, params, None, dms, cr)


@pytest.fixture
def folder(tmp_path) -> Path:
    dms_jax.save(random_lm(), tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# Configurations


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_hidden_layers": 10**18},
            "num_hidden_layers=1000000000000000000: expected a whole number from 1 to 4096",
        ),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2'"),
        ({"hidden_size": 8.0}, "hidden_size=8.0"),
        ({"num_key_value_heads": 7}, "num_key_value_heads=7: must divide num_heads=2"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None: the file needs it"),
        ({"max_position_embeddings": None}, "max_position_embeddings=None: the file needs it"),
        ({"rope_theta": 0, "rope_parameters": None}, "rope_theta=0"),
        ({"rope_theta": None, "rope_parameters": None}, "rope_theta=None"),
        ({"rope_theta": "", "rope_parameters": None}, "rope_theta=''"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("inf")}}, "factor=inf"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_type=None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters=.*say something else"),
        ({"rope_theta": 500.0, "rope_scaling": {"rope_type": "default"}}, "rope_parameters="),
        ({"bos_token_id": 24}, "bos_token_id=24: is outside the vocabulary of 24"),
        ({"eos_token_id": [2, -1]}, r"eos_token_id=\(2, -1\)"),
        ({"eos_token_id": "2"}, "eos_token_id='2'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
        ({"dms_window_size": 2.5}, "dms_window_size=2.5"),
        ({"dms_window_size": 4, "dms_alpha_scale": float("nan")}, "dms_alpha_scale=nan"),
        ({"dms_window_size": 4, "dms_neuron": 4}, "dms_neuron=4: must be a dim of a head"),
        ({"dms_window_size": 4, "dms_decision_offset": 6}, "dms_decision_offset=6"),
        ({"dms_window_size": 4, "dms_cr": 0.5}, "dms_cr=0.5"),
        ({"dms_separate_alpha": "yes"}, "dms_separate_alpha='yes'"),
    ],
)
def test_errors_name_the_file_and_its_own_key(folder, values, message):
    change_config(folder, **values)
    with pytest.raises(ConfigError, match=f"{re.escape(str(folder / 'config.json'))}: {message}"):
        dms_jax.load(folder)


def test_minus_one_for_no_padding(folder):
    """What the first conversions of Llama wrote."""
    change_config(folder, pad_token_id=-1)
    assert dms_jax.load(folder).config.pad_id is None


# Files


def test_nan_and_infinite_weights(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    for stored in ("float32", "float16"):
        for value in (np.nan, np.inf, -np.inf):
            damaged = {name: x.astype(stored) for name, x in tensors.items()}
            damaged[QUERY][3, 5] = value
            save_file(damaged, folder / "model.safetensors")
            for dtype in ("bfloat16", "float32", "float16"):
                with pytest.raises(WeightError, match=f"{QUERY} has NaN or infinite values"):
                    dms_jax.load(folder, dtype)
            got = dms_jax.load(folder, "bfloat16", allow_nonfinite=True).params["layers_0"]["attn"]["q"]["kernel"]
            np.testing.assert_array_equal(np.asarray(got, np.float32).reshape(8, 8)[5, 3], np.float32(value))
    beyond = {**tensors, NORM: np.full(8, 3.4e38, np.float32)}
    save_file(beyond, folder / "model.safetensors")
    with pytest.raises(WeightError, match=f"{NORM} has values beyond bfloat16"):
        dms_jax.load(folder, "bfloat16", allow_nonfinite=True)
    write_gguf(tmp_path / "m.gguf", CONFIG, {**tensors, NORM: np.full(8, np.nan, np.float32)})
    with pytest.raises(WeightError, match="m.gguf: tensor output_norm.weight has NaN"):
        dms_jax.load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([], "weight_map=.*expected a map"),
        (None, "weight_map=None"),
        ({NORM: "../model/one.safetensors"}, "which is no file of this folder"),
        ({NORM: "/etc/hostname"}, "'/etc/hostname', which is no file of this folder"),
        ({NORM: ""}, "which is no file of this folder"),
        ({NORM: 3}, "is said to be in 3"),
        ({NORM: "none.safetensors"}, "none.safetensors named by"),
        ({}, "missing tensor"),
        ({"more": "one.safetensors"}, "tensor more is not in one.safetensors"),
    ],
)
def test_index_files_that_lead_nowhere(folder, places, message):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    whole = {**dict.fromkeys(tensors, "one.safetensors"), **places} if places else places
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": whole}))
    with pytest.raises((ConfigError, WeightError), match=message):
        dms_jax.load(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"])
def test_a_fifo_is_refused(folder, name):
    """Opened, it would wait for a writer without end."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises((ConfigError, WeightError, FileNotFoundError), match=name):
        dms_jax.load(folder)


def test_sources_and_gates_that_are_no_files(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe.gguf", tmp_path / "pipe", "/dev/zero", "~nobody-here/model", "x" * 5000, "a\0b"):
        with pytest.raises(FileNotFoundError):
            dms_jax.load(source)
    for gate, kind in ((folder, ConfigError), ("", ConfigError), (tmp_path / "pipe", FileNotFoundError)):
        with pytest.raises(kind):
            dms_jax.load(folder, gate=gate)
    for cr in (0.5, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="cr="):
            dms_jax.load(folder, cr=cr)


def gguf_numbers(file: Path) -> dict[str, int]:
    """Where the offset of each tensor stands in a GGUF file."""
    data, found = file.read_bytes(), {}
    for name in ("output_norm.weight", "blk.0.attn_q.weight"):
        at = data.index(name.encode()) + len(name)
        dims = int.from_bytes(data[at : at + 4], "little")
        found[name] = at + 4 + 8 * dims + 4
    return found


def test_gguf_tensors_fill_the_file(folder, tmp_path):
    """Overlap, hole and bytes that belong to none."""
    file = tmp_path / "m.gguf"
    write_gguf(file, CONFIG, load_file(folder / "model.safetensors"))
    data = file.read_bytes()
    for name, at in gguf_numbers(file).items():
        old = int.from_bytes(data[at : at + 8], "little")
        for new in (old - 32, old + 32, old + 1, 2**63):
            if new >= 0:
                file.write_bytes(data[:at] + new.to_bytes(8, "little") + data[at + 8 :])
                with pytest.raises(WeightError, match=f"tensor {name} is at byte {new} of the data, expected {old}"):
                    dms_jax.load(file)
    file.write_bytes(data + bytes(64))
    with pytest.raises(WeightError, match="its tensors fill"):
        dms_jax.load(file)
    for code in (255, 2):  # a type that is none, and blocks of 32 in rows of 8
        at = gguf_numbers(file)["blk.0.attn_q.weight"] - 4
        file.write_bytes(data[:at] + code.to_bytes(4, "little") + data[at + 4 :])
        with pytest.raises(WeightError, match="tensor blk.0.attn_q.weight"):
            dms_jax.load(file)


def test_absurd_sizes_are_refused_before_anything_is_allocated(folder, tmp_path):
    """Heads of 2^30 dims: an array over them would not fit in memory."""
    file = tmp_path / "m.gguf"
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.attn_factor": 2.0}
    for metadata, extra in (({}, None), (yarn, None), ({}, {"rope_freqs.weight": np.full(2, 2.0, np.float32)})):
        write_gguf(file, CONFIG, load_file(folder / "model.safetensors"), metadata=metadata, extra=extra)
        data = file.read_bytes()
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            at = data.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
            data = data[:at] + (2**30).to_bytes(4, "little") + data[at + 4 :]
        file.write_bytes(data)
        with pytest.raises(WeightError, match="m.gguf: .*shape"):
            dms_jax.load(file)


@pytest.mark.parametrize("text", ["<|eot_id|>", "<|im_end|>", "<|end|>"])
def test_gguf_stops_at_the_end_of_a_turn(folder, tmp_path, text):
    """A file whose end of text is not the end of a turn (Llama 3): the control token is found by its text."""
    words = [f"w{n}" for n in range(CONFIG.vocab_size)]
    words[7], kinds = text, [1] * CONFIG.vocab_size
    write_gguf(tmp_path / "plain.gguf", CONFIG, load_file(folder / "model.safetensors"),
               metadata={"tokenizer.ggml.tokens": words, "tokenizer.ggml.token_type": kinds})  # fmt: skip
    assert dms_jax.load(tmp_path / "plain.gguf").config.eos_ids == (2,), "an ordinary token of that text ends nothing"
    kinds[7] = 3
    write_gguf(tmp_path / "control.gguf", CONFIG, load_file(folder / "model.safetensors"),
               metadata={"tokenizer.ggml.tokens": words, "tokenizer.ggml.token_type": kinds})  # fmt: skip
    assert dms_jax.load(tmp_path / "control.gguf").config.eos_ids == (2, 7)


# Saving


def test_save_replaces_what_it_wrote_and_nothing_else(folder, tmp_path):
    again = random_lm(ADAPTER, 4.0)
    dms_jax.save(again, folder)
    assert dms_jax.load(folder).dms == ADAPTER
    for name in ("config.json", "model.safetensors"):
        other = tmp_path / f"other-{name}"
        (other / name / "precious").mkdir(parents=True)
        with pytest.raises(ConfigError, match=f"holds a {name} that dms_jax did not write"):
            dms_jax.save(again, other)
        assert os.listdir(other) == [name] and (other / name / "precious").is_dir()
    theirs = tmp_path / "theirs"
    shutil.copytree(folder, theirs)
    save_file(load_file(folder / "model.safetensors"), theirs / "model.safetensors", {"format": "pt"})
    before = {file.name: file.read_bytes() for file in theirs.iterdir()}
    with pytest.raises(ConfigError, match="holds a model.safetensors that dms_jax did not write"):
        dms_jax.save(random_lm(), theirs)
    assert {file.name: file.read_bytes() for file in theirs.iterdir()} == before
    gate = tmp_path / "gate.safetensors"
    dms_jax.save_gate(again, gate)
    dms_jax.save_gate(random_lm(ADAPTER, 8.0), gate)
    assert dms_jax.load(tmp_path / "theirs", gate=gate).cr == 8
    (tmp_path / "directory").mkdir()
    for file in (theirs / "config.json", theirs / "model.safetensors", tmp_path / "directory"):
        with pytest.raises(ConfigError, match="is there, and no gate"):
            dms_jax.save_gate(again, file)


def test_a_tokenizer_saved_over_another_is_itself(tmp_path):
    """A chat template stands in a file of its own, which a tokenizer without one does not write over."""
    for tokenizer in (letters(), letters(template=None)):
        dms_jax.save(replace(random_lm(), tokenizer=tokenizer), tmp_path)
        assert dms_jax.load(tmp_path).tokenizer.chat_template == tokenizer.chat_template
    dms_jax.save(random_lm(), tmp_path)
    assert dms_jax.load(tmp_path).tokenizer is not None, "of a model without one it stays"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "merges.txt").write_text("a user's")
    dms_jax.save(replace(random_lm(), tokenizer=letters()), tmp_path / "mine")
    assert (tmp_path / "mine" / "merges.txt").read_text() == "a user's"


@pytest.mark.parametrize("dtype", ["int32", "bool", "float8_e4m3fn", "complex64"])
def test_parameters_of_a_kind_that_is_no_weight_are_not_saved(tmp_path, dtype):
    lm = random_lm()
    params = {**lm.params, "final_norm": {"scale": lm.params["final_norm"]["scale"].astype(dtype)}}
    with pytest.raises(WeightError, match=f"params: final_norm/scale has dtype {dtype}, expected one of float64"):
        dms_jax.save(replace(lm, params=params), tmp_path / "model")
    assert not os.listdir(tmp_path / "model")


def test_what_a_killed_save_left_goes_at_the_next(folder, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    before = sorted(os.listdir(folder))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if the process were gone before it could tidy up
        patch.setattr(os, "replace", kill)
        with pytest.raises(Killed):
            dms_jax.save(random_lm(ADAPTER), folder)
    assert len(os.listdir(folder)) > len(before)
    dms_jax.save(random_lm(), folder)
    assert sorted(os.listdir(folder)) == before
    assert open_safetensors(folder / "model.safetensors")[1]["written_by"] == "dms_jax"


# Tokens


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 24]], "tokens=24: is outside the vocabulary, 0 to 23"),
        ([[1, -1]], "tokens=-1"),
        ([[1, 2**40]], "tokens=1099511627776"),
        ([[1.5, 2.0]], "tokens.dtype=.*expected whole numbers"),
        ([[float("nan"), 2.0]], "tokens.dtype"),
        ([[True, False]], "tokens.dtype"),
        ([1, 2], "tokens.shape"),
        ([[]], "tokens.shape"),
    ],
)
def test_tokens_that_are_no_ids_are_refused(tokens, message):
    with pytest.raises(ConfigError, match=message):
        random_lm().logits(np.asarray(tokens))


def test_a_gate_that_the_model_has_not_is_refused():
    ids = np.arange(6)[None]
    with pytest.raises(ConfigError, match="never retrofitted"):
        random_lm().logits(ids, dms=DMSConfig())
    with pytest.raises(ConfigError, match="dms.gate='query': the model carries the 'adapter' gate"):
        random_lm(ADAPTER).logits(ids, dms=DMSConfig())
    with pytest.raises(ConfigError, match="dms.gate='adapter': the model carries the 'query' gate"):
        random_lm(DMSConfig()).logits(ids, dms=ADAPTER)
