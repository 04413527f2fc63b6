"""Real weights: SmolLM2-135M-Instruct against transformers, which reads the file by its own code."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import dms_jax
from dms_jax.weights.huggingface import config_to_hf
from tests.helpers import models, texts, tiny
from tests.helpers.gguf_files import write_gguf
from tests.helpers.loading import MEMORY, assert_same_bits

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lm(smollm2_file):
    return dms_jax.load(smollm2_file, dtype="float32")


@pytest.fixture(scope="module")
def theirs(smollm2_file, lm):
    return tiny.hf_from_gguf(smollm2_file, config_to_hf(lm.config))


@pytest.fixture(scope="module")
def ids(lm):
    """400 tokens of real text: several windows of the bundled gates."""
    return np.asarray([lm.tokenizer(texts.real_text())["input_ids"][:400]])


@pytest.fixture(scope="module")
def logits(lm, ids):
    return np.asarray(lm.logits(ids))


def test_logits_on_real_text(logits, theirs, ids):
    assert ids.shape == (1, 400)
    want = tiny.hf_logits(theirs, ids)
    assert want.std() > 1
    np.testing.assert_allclose(logits, want, atol=2e-3, rtol=0)


PROMPT_LENGTHS = (9, 33)
NEW = 24
TIE = 2e-3  # the bound on logits above: a smaller gap between the best two is not decided by the weights


def prompts(lm) -> list[list[int]]:
    """8 prompts in two lengths, from places all over the text."""
    ids = lm.tokenizer(texts.real_text())["input_ids"]
    return [ids[n * 800 : n * 800 + PROMPT_LENGTHS[n % 2]] for n in range(8)]


def hf_greedy(model, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuations; prompts of one length go in one batch, so that nothing is padded."""
    out = {}
    for length in PROMPT_LENGTHS:
        rows = [n for n, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[n] for n in rows])
        with torch.no_grad():
            new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        out.update(zip(rows, new[:, length:].tolist(), strict=True))
    return [out[n] for n in range(len(prompts))]


def until(ids: list[int], stop: int) -> list[int]:
    """Up to and without the first stop token; HF pads behind it."""
    return ids[: ids.index(stop)] if stop in ids else ids


def test_greedy_continuations(lm, theirs):
    asked = prompts(lm)
    ours = [chains[0] for chains in dms_jax.generate(lm, asked, max_new_tokens=NEW).tokens]
    want = hf_greedy(theirs, asked)
    (stop,) = lm.config.eos_ids
    differ = []
    for n, prompt in enumerate(asked):
        mine, other = until(list(map(int, ours[n])), stop), until(want[n], stop)
        if mine != other:
            same = next(
                (k for k, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b),
                min(len(mine), len(other)),
            )
            top = np.sort(tiny.hf_logits(theirs, np.asarray([prompt + other[:same]]))[0, -1])
            differ.append((n, same, float(top[-1] - top[-2])))
    assert sum(len(until(tokens, stop)) for tokens in want) > len(asked) * NEW / 2, "too short to prove anything"
    assert len(differ) <= 1 and all(gap < TIE for *_, gap in differ), differ


def test_peak_memory_with_a_real_vocabulary(smollm2_file, tmp_path):
    """The metadata of a real file (49,152 tokens and their merges) fits in the bound as well."""
    small, config = tmp_path / "small.gguf", models.tiny()
    dms_jax.save(models.random_lm(config), tmp_path / "small")
    write_gguf(small, config, load_file(tmp_path / "small" / "model.safetensors"))
    command = [sys.executable, "-c", MEMORY, small, smollm2_file, "bfloat16"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.98 < result["ratio"] < 1.3, result


def test_bfloat16_and_a_saved_copy(lm, ids, logits, smollm2_file, tmp_path):
    half = dms_jax.load(smollm2_file)
    dms_jax.save(half, tmp_path)
    again = dms_jax.load(tmp_path)
    assert_same_bits(again.params, half.params)
    agree = (again.logits(ids[:, :50]).argmax(-1) == logits[:, :50].argmax(-1)).mean()
    assert agree > 0.9, agree
    assert again.tokenizer(texts.VARIED)["input_ids"] == lm.tokenizer(texts.VARIED)["input_ids"]


def test_the_bundled_gates(smollm2_file, lm, ids, logits):
    """Laid over the real weights they evict about what their CR says, and the model stays near itself.

    That for CR 4 is in the README's ten lines, whose figures are tested.
    """
    original = dms_jax.load(smollm2_file, dtype="float32", gate="smollm2")
    assert original.dms is None
    assert_same_bits(original.params, lm.params)
    for cr in (2, 8):
        gated = dms_jax.load(smollm2_file, dtype="float32", gate="smollm2", cr=cr)
        assert gated.cr == cr and gated.dms.gate == "adapter"
        got, alpha = models.full_forward(gated, ids)
        assert (got.argmax(-1) == logits.argmax(-1)).mean() > 0.6
        assert np.abs(got - logits).max() > 0.1, "something is evicted"
        assert 1 - 1.7 / cr < alpha.mean() < 1 - 0.5 / cr
    with pytest.raises(dms_jax.ConfigError, match="cr=16: the gates in smollm2 are for CR 2, 4, 8"):
        dms_jax.load(smollm2_file, gate="smollm2", cr=16)
