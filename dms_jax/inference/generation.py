"""From a loaded model to an engine, and `generate`."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from dms_jax import policies, sharding
from dms_jax.cache import storage
from dms_jax.config import CacheConfig, DMSConfig, SamplingConfig, require
from dms_jax.inference import sampling
from dms_jax.inference import use_counts as metrics
from dms_jax.inference.decode import DecodeSpec
from dms_jax.inference.engine import Engine, round_up
from dms_jax.inference.jobs import EngineConfig, Job
from dms_jax.inference.parallel import run_together
from dms_jax.models.transformer import Decoder
from dms_jax.types import Keys
from dms_jax.weights import table as weights


class Output(NamedTuple):
    """What `generate` returns; every field is indexed `[prompt][chain]`.

    text is None without a tokenizer; tokens are the new ids, the stop token included; for the counts see
    `metrics.CacheUse`, and for `by_head` `metrics.HeadUse`.
    """

    text: list[list[str]] | None
    tokens: list[list[list[int]]]
    kv_reads: np.ndarray
    prefill_reads: np.ndarray
    peak_tokens: np.ndarray
    achieved_cr: np.ndarray
    by_head: list[list[metrics.HeadUse]]


def resolve_dms(lm, policy: str | None, dms: DMSConfig | None) -> tuple[str, DMSConfig | None]:
    """The policy's name and the gate's config that `generate` means by None.

    Raises:
      ConfigError: a DMS policy or config on a model that was never retrofitted, or another gate than its own.
    """
    if dms is not None:
        lm.check_gate(dms)
    dms = dms or lm.dms
    return policy or ("dms" if dms else "full"), dms


def encode(lm, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """Token ids of each prompt, checked.

    Raises:
      ValueError: an empty prompt, ids outside the vocabulary, or text for a model without a tokenizer.
    """
    V = lm.config.vocab_size
    encoded = []
    for n, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if lm.tokenizer is None:
                raise ValueError(f"prompts[{n}] is text, but this model has no tokenizer: pass token ids")
            prompt = lm.tokenizer(prompt)["input_ids"]
        ids = [int(t) for t in prompt]
        if not ids:
            raise ValueError(f"prompts[{n}] is empty")
        if min(ids) < 0 or max(ids) >= V:
            raise ValueError(f"prompts[{n}] has token ids outside 0..{V - 1}")
        encoded.append(ids)
    return encoded


def build(
    lm,
    length: int,
    policy: str | None = None,
    dms: DMSConfig | None = None,
    budget: int | float | None = None,
    sampling: SamplingConfig | None = None,
    stop: Sequence[int] | None = None,
    cache: str = "paged",
    page_size: int = 64,
    quant: str = "none",
    engine: EngineConfig | None = None,
    mesh: Mesh | None = None,
    **callbacks,
) -> Engine:
    """An engine for sequences of up to `length` tokens, prompt included.

    Args:
      policy: None means "dms" where the model was retrofitted, else "full".
      dms: overrides `lm.dms` (another window, say).
      budget: for policies that need one: tokens a head, or as a float in (0, 1] a share of `length`.
      stop: token ids that end a chain; None means the model's own.
      cache, page_size, quant: see CacheConfig.
      mesh: devices to share the heads of every sequence along its tensor axis, each with a pool of its own.
    Raises:
      ConfigError: an unknown policy or storage, a missing budget, or DMS on a model that was never retrofitted.
    """
    name, dms = resolve_dms(lm, policy, dms)
    cache_config = CacheConfig(cache, round_up(length), page_size, quant)
    chosen = policies.policy(name, dms, budget, length, page_size, lm.config.head_dim)
    spec = DecodeSpec(
        model=Decoder(lm.config, dms),
        policy=chosen,
        storage=storage(cache_config, 1 if mesh is None else sharding.tensor_ways(mesh)),
        sampling=sampling or SamplingConfig(),
        stop=tuple(lm.config.eos_ids if stop is None else stop),
    )
    expected_cr = (lm.cr or 1.0) if name == "dms" else 1.0
    params = lm.params if mesh is None else place(lm, mesh)
    return Engine(spec, params, cache_config, engine or EngineConfig(), expected_cr, mesh, **callbacks)


def place(lm, mesh: Mesh):
    """The model's parameters laid out over a mesh."""
    letters = {spec.path: spec.letters for spec in weights.specs(lm.config, lm.dms)}
    flat = traverse_util.flatten_dict(lm.params, sep="/")
    places = {path: sharding.parameter(mesh, letters[path], x.shape) for path, x in flat.items()}
    return traverse_util.unflatten_dict(jax.device_put(flat, places), sep="/")


def generate(
    lm,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    chains: int = 1,
    seed: int = 0,
    policy: str | None = None,
    cache: str = "paged",
    dms: DMSConfig | None = None,
    budget: int | float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[int] | None = None,
    keys: Keys | None = None,
    max_num_seqs: int = 64,
    devices: tuple[int, int] | None = None,
    on_tokens: Callable[[int, int, list[int]], None] | None = None,
    **options,
) -> Output:
    """Continues every prompt with `chains` chains.

    Args:
      lm: from `dms_jax.load`.
      prompts: strings, or lists of token ids.
      keys: `[prompts * chains, 2]` raw random keys in place of those made from `seed`.
      max_num_seqs: sequences decoded at the same time (by each engine); more of them wait for a place.
      devices: (data, tensor): prompts are shared between `data` engines, and the heads of each between `tensor`
        devices. None: one device.
      on_tokens: called with (prompt number, chain number, new tokens) while decoding.
      policy, dms, budget, stop, cache and `options` (page_size, quant, engine): see `build`.
    Raises:
      ConfigError: an impossible option.  ValueError: bad prompts.
    """
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "must be at least 1")
    require(chains >= 1, "chains", chains, "must be at least 1")
    ids = encode(lm, prompts)
    if not ids:
        raise ValueError("prompts is empty")
    if keys is None:
        keys = sampling.sequence_keys(seed, len(ids), chains)
    keys = np.asarray(keys).reshape(len(ids), chains, 2)
    options.setdefault("engine", EngineConfig(max_num_seqs=max_num_seqs, steps=min(64, max_new_tokens)))
    make = functools.partial(
        build,
        lm,
        max(len(p) for p in ids) + max_new_tokens,
        policy=policy,
        dms=dms,
        budget=budget,
        sampling=SamplingConfig(temperature, top_k, top_p),
        stop=stop,
        cache=cache,
        on_tokens=on_tokens,
        **options,
    )
    jobs = [Job(prompt, keys[n], max_new_tokens, n) for n, prompt in enumerate(ids)]
    meshes = [None] if devices is None else sharding.tensor_meshes(*devices)
    work = [(make(mesh=mesh), jobs[n :: len(meshes)]) for n, mesh in enumerate(meshes)]
    done = {(result.name, result.chain): result for _, result in run_together(work)}
    table = [[done[n, c] for c in range(chains)] for n in range(len(ids))]
    tokens = [[result.tokens for result in row] for row in table]
    counts = {
        field: np.array([[getattr(result.use, field) for result in row] for row in table])
        for field in metrics.CacheUse._fields
    }
    decoded = lm.tokenizer and [[lm.tokenizer.decode(t, skip_special_tokens=True) for t in row] for row in tokens]
    return Output(decoded, tokens, by_head=[[result.by_head for result in row] for row in table], **counts)
