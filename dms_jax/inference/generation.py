"""From a loaded model to an engine, and `generate`."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from dms_jax import policies, programs, sharding
from dms_jax.cache import kv_cache
from dms_jax.config import CacheConfig, Count, DMSConfig, SamplingConfig, Size, check, require
from dms_jax.inference import sampling, use_counts
from dms_jax.inference.decode import DecodeSpec
from dms_jax.inference.engine import Engine
from dms_jax.inference.parallel import run_together
from dms_jax.inference.scheduler import EngineConfig, Job, round_up
from dms_jax.models.transformer import Decoder
from dms_jax.policies import Policy
from dms_jax.types import Keys
from dms_jax.weights import table
from dms_jax.weights import text as texts


@dataclass(frozen=True)
class GenerationConfig:
    """What `generate` can be asked for.

    max_new_tokens, chains: of each prompt. temperature 0 is greedy; top_k 0 and top_p 1 are off.
    stop: token ids that end a chain; None means the model's own.
    policy: a name of `policies.NAMES` or a Policy; None means "dms" where the model was retrofitted, else "full".
    dms: overrides `lm.dms` (another window, say).
    budget: for named policies that need one: tokens a head, or a float in (0, 1]: a share of the longest sequence.
    protect_prompt, evict_every: for named policies with a budget (but Quest): never evict a token of the prompt; steps
      from one eviction to the next. None: as the method has it.
    cache, page_size, quant: see CacheConfig.
    max_num_seqs: sequences decoded at the same time (by each engine); more of them wait.
    devices: (data, tensor): prompts are shared between `data` engines, and the heads of each between `tensor`
      devices. None: one device.
    engine: other settings of the engine; its max_num_seqs counts.
    """

    max_new_tokens: Size = 256
    temperature: float = 0.0
    chains: Size = 1
    seed: int = 0
    policy: str | Policy | None = None
    cache: str = "paged"
    dms: DMSConfig | None = None
    budget: int | float | None = None
    protect_prompt: bool | None = None
    evict_every: Size | None = None
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[Count, ...] | list[Count] | None = None
    page_size: Size = 64
    quant: str = "none"
    max_num_seqs: Size = 64
    devices: tuple[Size, Size] | None = None
    engine: EngineConfig | None = None

    def __post_init__(self):
        check(self)
        named = not isinstance(self.policy, Policy)
        for key in ("budget", "protect_prompt", "evict_every"):
            value = getattr(self, key)
            require(named or value is None, key, value, "a policy object has its own")

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(self.temperature, self.top_k, self.top_p)


class Output(NamedTuple):
    """What `generate` returns; every field is indexed `[prompt][chain]`.

    text is None without a tokenizer; tokens are the new ids, the stop token included; for the counts see
    `use_counts.CacheUse`, and for `by_head` `use_counts.HeadUse`.
    """

    text: list[list[str]] | None
    tokens: list[list[list[int]]]
    kv_reads: np.ndarray
    prefill_reads: np.ndarray
    peak_tokens: np.ndarray
    achieved_cr: np.ndarray
    by_head: list[list[use_counts.HeadUse]]


def resolve_dms(lm, dms: DMSConfig | None) -> DMSConfig | None:
    """The gate's config that `generate` means by None.

    Raises:
      ConfigError: a config on a model that was never retrofitted, or of another gate than its own.
    """
    if dms is not None:
        lm.check_gate(dms)
    return dms or lm.dms


def resolve_policy(config: GenerationConfig, dms: DMSConfig | None, length: int) -> Policy:
    """The policy that a config means for sequences of up to `length` tokens.

    Raises:
      ConfigError: an unknown policy, a missing budget, or DMS on a model that was never retrofitted.
    """
    policy = config.policy
    if not isinstance(policy, Policy):
        name = ("dms" if dms else "full") if policy is None else policy
        options = {"protect_prompt": config.protect_prompt, "evict_every": config.evict_every}
        return policies.named(name, dms, config.budget, length, config.page_size, **options)
    same = getattr(policy, "page_size", config.page_size) == config.page_size
    require(same, "page_size", config.page_size, f"the policy reads pages of {getattr(policy, 'page_size', None)}")
    if isinstance(policy, policies.DelayedEviction):
        require(dms is not None, "policy", policy.name, "this model was never retrofitted (no DMSConfig)")
    return policy


def encode(lm, prompts: str | Sequence[str | Sequence[int]]) -> list[list[int]]:
    """Token ids of each prompt, checked; one string is one prompt.

    Raises:
      ConfigError: no prompt, an empty one, what is neither text nor ids of the vocabulary, or text for a model without
        a tokenizer.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    require(hasattr(prompts, "__len__") and len(prompts) > 0, "prompts", prompts, "expected texts, or lists of ids")
    ids = [texts.encode(lm.tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    return [lm.checked_ids(prompt, f"prompts[{n}]", "[T]").tolist() for n, prompt in enumerate(ids)]


def build(lm, length: int, config: GenerationConfig, mesh: Mesh | None = None, **callbacks) -> Engine:
    """An engine for sequences of up to `length` tokens, prompt included.

    Args:
      mesh: devices to share the heads of every sequence along its tensor axis, each with a pool of its own.
      callbacks: `on_tokens` and `on_progress` of the Engine.
    Raises:
      ConfigError: an impossible config; see `resolve_policy` and CacheConfig.
    """
    programs.release()
    dms = resolve_dms(lm, config.dms)
    policy = resolve_policy(config, dms, length)
    shape, heads = np.shape(getattr(policy, "budget", 0)), (lm.config.num_layers, lm.config.num_kv_heads)
    require(shape in ((), heads), "budget", policy, f"expected one number, or one for each layer and KV head, {heads}")
    stop = tuple(lm.config.eos_ids if config.stop is None else config.stop)
    if stop:
        lm.checked_ids(stop, "stop", "[N]")
    lm.config.check_length(length)
    cache_config = CacheConfig(config.cache, round_up(length), config.page_size, config.quant)
    spec = DecodeSpec(
        model=Decoder(lm.config, dms),
        policy=policy,
        kv_cache=kv_cache(cache_config, 1 if mesh is None else sharding.tensor_ways(mesh)),
        sampling=config.sampling,
        stop=stop,
    )
    steps = min(EngineConfig.steps, config.max_new_tokens)
    engine = config.engine or EngineConfig(max_num_seqs=config.max_num_seqs, steps=steps)
    expected_cr = (lm.cr or 1.0) if policy.name == "dms" else 1.0
    params = lm.params if mesh is None else place(lm, mesh)
    return Engine(spec, params, cache_config, engine, expected_cr, mesh, **callbacks)


def place(lm, mesh: Mesh):
    """The model's parameters laid out over a mesh."""
    letters = {spec.path: spec.letters for spec in table.specs(lm.config, lm.dms)}
    flat: dict[str, Any] = traverse_util.flatten_dict(lm.params, sep="/")
    places = {path: sharding.parameter(mesh, letters[path], x.shape) for path, x in flat.items()}
    return traverse_util.unflatten_dict(jax.device_put(flat, places), sep="/")


def prepare(lm, prompts: str | Sequence[str | Sequence[int]], config: GenerationConfig) -> None:
    """Compiles what `generate` will call, as far as it can be foreseen; the parameters of `lm` may be shapes."""
    for engine, jobs in _work(lm, encode(lm, prompts), config, None):
        engine.prepare(jobs)


def _work(
    lm, ids: list[list[int]], config: GenerationConfig, keys: Keys | None, **callbacks
) -> list[tuple[Engine, list[Job]]]:
    """Engines, and the prompts that each of them continues."""
    many = len(ids) * config.chains
    drawn = sampling.sequence_keys(config.seed, len(ids), config.chains) if keys is None else keys
    require(np.shape(drawn) == (many, 2), "keys.shape", np.shape(drawn), f"expected {(many, 2)}, {sampling.IMPL} keys")
    drawn = np.asarray(drawn).reshape(len(ids), config.chains, 2)
    length = max(map(len, ids)) + config.max_new_tokens
    jobs = [Job(prompt, drawn[n], config.max_new_tokens, n) for n, prompt in enumerate(ids)]
    meshes = [None] if config.devices is None else sharding.tensor_meshes(*config.devices)
    engines = [build(lm, length, config, mesh, **callbacks) for mesh in meshes]
    return [(engine, jobs[n :: len(meshes)]) for n, engine in enumerate(engines)]


def generate(
    lm,
    prompts: str | Sequence[str | Sequence[int]],
    max_new_tokens: int | None = None,
    *,
    config: GenerationConfig | None = None,
    keys: Keys | None = None,
    on_tokens: Callable[[int, int, list[int]], None] | None = None,
    **options,
) -> Output:
    """Continues every prompt with some chains.

    Args:
      lm: from `dms_jax.load`.
      prompts: strings, or lists of token ids; one string is one prompt.
      config, max_new_tokens, options: a GenerationConfig, or its fields by name; both together are the config with
        these fields replaced.
      keys: `[prompts * chains, 2]` raw random keys in place of those made from the seed.
      on_tokens: called with (prompt number, chain number, new tokens) while decoding.
    Raises:
      ConfigError: an impossible option, or bad prompts.
    """
    options |= {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    config = dataclasses.replace(config or GenerationConfig(), **options)
    ids = encode(lm, prompts)
    work = _work(lm, ids, config, keys, on_tokens=on_tokens)
    done = {(result.name, result.chain): result for _, result in run_together(work)}
    rows = [[done[n, c] for c in range(config.chains)] for n in range(len(ids))]
    tokens = [[result.tokens for result in row] for row in rows]
    counts = {
        field: np.array([[getattr(result.use, field) for result in row] for row in rows])
        for field in use_counts.CacheUse._fields
    }
    text = lm.tokenizer and [[lm.tokenizer.decode(t, skip_special_tokens=True) for t in row] for row in tokens]
    return Output(text, tokens, by_head=[[result.by_head for result in row] for row in rows], **counts)
