"""Every program under examples/ runs, and does what it says."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str):
    """A program as a module, though the folder is no package."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_new_policy():
    example = load("new_policy")
    made = example.main(budget=80, new=64)
    assert made["full"].peak_tokens > 80
    for name in ("tova", "value_norm"):
        assert made[name].peak_tokens <= 80 < made[name].achieved_cr * 80
    assert made["value_norm"].tokens != made["tova"].tokens
    policy = example.ValueNorm(80)
    assert policy == example.ValueNorm(80) and hash(policy) == hash(example.ValueNorm(80)), "compiled once"


def test_new_gate():
    fresh, trained = load("new_gate").main()
    assert fresh == 0, "nothing is evicted at the start"
    assert trained > 0.01


def test_new_family(tmp_path):
    example = load("new_family")
    written = example.write_tiny(tmp_path / "mistral")
    lm = example.load_mistral(tmp_path / "mistral", dtype="float32")
    np.testing.assert_array_equal(lm.logits(example.TOKENS), written.logits(example.TOKENS))
    with pytest.raises(ValueError, match="model_type='mistral'"):
        import dms_jax

        dms_jax.load(tmp_path / "mistral")
    example.main()


def test_a_mistral_is_a_llama(tmp_path):
    """Against transformers' own Mistral, written by transformers."""
    import torch
    import transformers

    example = load("new_family")
    config = transformers.MistralConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, head_dim=8, sliding_window=None,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.MistralForCausalLM(config).float().eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        want = theirs(torch.tensor(example.TOKENS)).logits.numpy()
    assert want.std() > 0.01
    got = example.load_mistral(tmp_path, dtype="float32").logits(example.TOKENS)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


def test_new_loss():
    losses = load("new_loss").main(steps=10)
    assert losses[-1] < losses[0] - 0.1


def test_regressed_gate(tmp_path):
    """Scores against plain numpy, the fit against unseen chains, and the ratios that the thresholds give."""
    import dms_jax

    example = load("regressed_gate")
    family = example.main(documents=4, window=16, longest=448, out=tmp_path)
    lm = dms_jax.load("mini", dtype="float32")
    assert dms_jax.load("mini", dtype="float32", gate=tmp_path, cr=4.0).dms == family[4.0].dms
    made = dms_jax.generate(lm, [example.PROBLEM], chains=4, temperature=1.0, max_new_tokens=400, seed=1)
    chain = made.tokens[0][0]
    rows, lengths = example.repeated([np.array([*lm.tokenizer([example.PROBLEM])["input_ids"][0], *chain])], 448)
    x, target, counted = example.features(lm, rows, lengths)
    for layer in (0, lm.config.num_layers - 1):
        kernel = family[4.0].params[f"layers_{layer}"]["attn"]["gate"]["proj"]["kernel"]
        predicted = np.asarray(x[layer] @ kernel)[counted]
        assert np.corrcoef(predicted.ravel(), np.asarray(target[layer])[counted].ravel())[0, 1] > 0.5
    used = [dms_jax.generate(family[cr], [example.PROBLEM], max_new_tokens=320) for cr in (2.0, 8.0)]
    less, more = (float(out.achieved_cr[0, 0]) for out in used)
    assert 1.3 < less and 1.3 * less < more


def test_the_score_of_the_regression():
    """Two copies of three tokens, of which the second has one query for each key: a maximum over queries and heads."""
    example, (B, S, H, K, D) = load("regressed_gate"), (1, 8, 4, 2, 4)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, S, n, D)).astype(np.float32) for n in (H, K, K))
    _, (score,) = example.observing(np.array([3]))(0, *map(jnp.asarray, (q, k, v)), None, ())
    for h in range(K):
        for i in range(3):
            weights = []
            for j in (3, 4, 5):
                for g in (2 * h, 2 * h + 1):
                    e = np.exp(k[0, : j + 1, h] @ q[0, j, g] * D**-0.5)
                    weights.append((e / e.sum())[i])
            np.testing.assert_allclose(score[0, h, i], max(weights), rtol=1e-5)


def test_none_is_left_out():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested
