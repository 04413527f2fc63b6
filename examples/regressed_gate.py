"""A gate by regression instead of distillation: KVzap's way (arXiv 2601.07891), with DMS's gate and cache.

A document is written twice in a row, and a key of the first copy scores as much as the largest attention that it gets
from the second (KVzip, arXiv 2505.23416). The adapter gate is fitted to minus the log of that score by least squares,
solved exactly, layer by layer; base weights stay as they are. What is predicted above a threshold is evicted, by the
same delayed eviction. So all that differs from `scripts.retrofit --mode adapter` is the supervision, and one fit
serves every ratio: the threshold alone decides.

Deviations from KVzap: no instruction to repeat stands between the copies; the score is KVzip's own, not weighted by
values; the map has no bias for each head, but one for all, as the gate has; the window is DMSConfig's.

usage:
  python examples/regressed_gate.py
  python examples/regressed_gate.py --model file.gguf --data chats.jsonl --out gates     # gate_cr2.safetensors ...
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.models.gates import gate_of
from dms_jax.models.transformer import Decoder, arange_positions, causal
from dms_jax.training.config import SourceConfig
from dms_jax.training.documents import open_documents
from dms_jax.weights.save import save_gate

PROBLEM = (
    "Let b = 996, z = 621, v = 248. Set d = b - z, j = 5 * d, m = z + j, a = j + m, t = v - z, q = d + a, e = q + t. "
    "Find e modulo 1000.\n"
)
RIDGE = 1e-3  # of the mean square of a feature
TINY = 1e-8  # a score of 0 has no log


def repeated(documents: list[np.ndarray], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows `[N, 2 * longest]` with each document twice, padded on the right, and lengths `[N]` of one copy."""
    rows = np.zeros((len(documents), 2 * longest), np.int32)
    lengths = np.array([min(len(document), longest) for document in documents])
    for row, document, n in zip(rows, documents, lengths, strict=True):
        row[: 2 * n] = np.tile(document[:n], 2)
    return rows, lengths


def observing(lengths):
    """An `Attend`: causal attention; the state collects the largest weight of each key, `[B, K, S]` a layer."""

    def attend(layer, q, k, v, logit, state):
        B, S, H, D = q.shape
        out, _ = causal(layer, q, k, v, logit, ())
        query = jnp.arange(S)[:, None]
        scores = jnp.einsum("BTKGD,BSKD->BKGTS", q.reshape(B, S, k.shape[2], -1, D), k) * D**-0.5
        weights = jax.nn.softmax(jnp.where(query >= jnp.arange(S), scores, -jnp.inf), axis=-1)
        second = (query >= lengths[:, None, None]) & (query < 2 * lengths[:, None, None])
        return out, (*state, jnp.where(second[:, None, None], weights, 0.0).max(axis=(2, 3)))

    return attend


def features(lm, rows, lengths):
    """What the gate reads in each layer, `[L, B, S, E]`, the score to predict, `[L, B, S, K]`, and which count."""
    tokens, params = jnp.asarray(rows), {"params": lm.params}
    positions, method = arange_positions(tokens), Decoder.with_residuals
    _, score, x = Decoder(lm.config).apply(params, tokens, positions, observing(jnp.asarray(lengths)), method=method)
    x = jnp.stack(x).astype(jnp.float32)
    normed = x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + lm.config.norm_eps)
    target = -jnp.log(jnp.stack(score).swapaxes(2, 3) + TINY)
    return normed, target, positions < lengths[:, None]


def fit(lm, documents: list[np.ndarray], config: DMSConfig, longest: int = 512, batch: int = 4):
    """The model with a gate whose logit is the predicted minus log score, less its mean; and all logits, sorted."""
    rows, lengths = repeated(documents, longest)
    groups = [slice(n, n + batch) for n in range(0, len(rows), batch)]

    @jax.jit
    def products(rows, lengths):
        x, y, counted = features(lm, rows, lengths)
        x = x * counted[..., None]
        of = jnp.concatenate([y, jnp.ones_like(y[..., :1])], axis=-1)
        y_sum = jnp.where(counted[..., None], y, 0.0).sum()
        return jnp.einsum("LBSE,LBSF->LEF", x, x), jnp.einsum("LBSE,LBSK->LEK", x, of), y_sum

    gram, moment, y_sum = jax.tree.map(lambda *xs: sum(xs), *(products(rows[g], lengths[g]) for g in groups))
    L, E, K = lm.config.num_layers, lm.config.model_dim, lm.config.num_kv_heads
    mean = y_sum / (lengths.sum() * L * K)
    ridge = RIDGE * jnp.trace(gram, axis1=1, axis2=2)[:, None, None] / E * jnp.eye(E)
    kernel = jnp.linalg.solve(gram + ridge, moment[..., :-1] - mean * moment[..., -1:])

    @jax.jit
    def predicted(rows, lengths):
        x, _, counted = features(lm, rows, lengths)
        return jnp.where(counted[..., None], jnp.einsum("LBSE,LEK->LBSK", x, kernel), jnp.nan)

    logits = np.concatenate([np.asarray(predicted(rows[g], lengths[g])).ravel() for g in groups])
    params = gate_of(config).with_gate(lm.params, lm.config)
    for n in range(L):
        gate = params[f"layers_{n}"]["attn"]["gate"]
        gate["proj"]["kernel"] = kernel[n].astype(gate["proj"]["kernel"].dtype)
    return dataclasses.replace(lm, params=params, dms=config), np.sort(logits[~np.isnan(logits)])


def at_ratio(lm, logits: np.ndarray, cr: float):
    """The model with the threshold that evicts 1 - 1 / CR of all tokens."""
    bias = float(np.quantile(logits, 1 / cr))
    return dataclasses.replace(lm, dms=dataclasses.replace(lm.dms, logit_bias=bias), cr=cr)


def main(
    model: str = "mini",
    data: tuple[Path, ...] = (),
    out: Path | None = None,
    documents: int = 64,
    window: int = 64,
    longest: int = 512,
) -> dict:
    """Fits a gate for CR 2, 4 and 8; without data the model's own chains are the documents. Returns the models."""
    lm = dms_jax.load(model, dtype="float32")
    if data:
        share = -(-documents // len(data))
        sources = [open_documents(SourceConfig(str(path)), lm.tokenizer) for path in data]
        texts = [ids for source in sources for ids in source.encode(list(range(min(share, len(source)))))]
    else:
        made = dms_jax.generate(lm, [PROBLEM], chains=min(documents, 8), temperature=1.0, max_new_tokens=400)
        prompt = lm.tokenizer([PROBLEM])["input_ids"][0]
        texts = [np.array([*prompt, *tokens]) for tokens in made.tokens[0]]
    config = DMSConfig(window=window, gate="adapter", scale=1.0, logit_bias=0.0)
    fitted, logits = fit(lm, texts, config, longest)
    family = {cr: at_ratio(fitted, logits, cr) for cr in (2.0, 4.0, 8.0)}
    for cr, member in family.items():
        print(f"CR {cr:g}: evicts what is predicted to score below {np.exp(-member.dms.logit_bias):.3g} times the mean")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            save_gate(member, out / f"gate_cr{cr:g}.safetensors")
    return family


if __name__ == "__main__":
    tyro.cli(main)
