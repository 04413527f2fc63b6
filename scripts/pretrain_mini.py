"""Pretrains the bundled mini model from nothing: next-token training on chains of thought of the mini task.

An interrupted run continues from its newest checkpoint.
"""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dms_jax.config import Count, ModelConfig, Positive, Seed, Share, Size, check, require
from dms_jax.config_files import load_yaml
from dms_jax.models.transformer import Decoder, arange_positions, causal, init
from dms_jax.training.data import Batch, PoolStream
from dms_jax.training.loop import Loop
from dms_jax.training.step import TrainState
from dms_jax.weights.lm import LM
from dms_jax.weights.save import save
from experiments.tasks import mini
from scripts import command

MODEL = ModelConfig(
    family="llama",
    vocab_size=len(mini.SPECIALS) + len(mini.TEXT_PIECES),
    num_layers=4,
    model_dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=384,
    tie_embeddings=True,
    max_positions=mini.LENGTH,
    bos_id=mini.BOS,
    eos_ids=(mini.EOS,),
    pad_id=mini.PAD,
)


@dataclass(frozen=True)
class PretrainConfig:
    """steps, batch_size: batches and sequences a batch. pool: how many different problems are drawn.
    slip_rate: the share of lines in the training chains with a wrong digit.
    """

    steps: Size = 3000
    batch_size: Size = 128
    learning_rate: Positive = 2e-3
    warmup_steps: Count = 100
    pool: Size = 300_000
    slip_rate: Share = 0.045
    seed: Seed = 0

    def __post_init__(self):
        check(self)


def training_pool(seed: int, count: int, slip_rate: float) -> Batch:
    """`count` encoded problems of the training side."""
    tokenizer, cores = mini.build_tokenizer(), os.cpu_count()
    return Batch(*mini.generate_pool(tokenizer, "train", seed, count, mini.LENGTH, cores, slip_rate=slip_rate))


def optimizer(config: PretrainConfig) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay to 0."""
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, config.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.01))


def next_token_loss(params, batch: Batch, model: ModelConfig):
    """Mean cross-entropy in nats over the tokens of the chain, and the share of them predicted right."""
    logits, _ = Decoder(model).apply(
        {"params": params}, batch.tokens, arange_positions(batch.tokens), causal, method="logits"
    )
    target = batch.tokens[:, 1:]
    index = jnp.arange(1, batch.tokens.shape[1])
    chain = (index >= batch.prompt_lengths[:, None]) & (index < batch.lengths[:, None])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], target)
    right = logits[:, :-1].argmax(-1) == target
    whole = jnp.mean(jnp.all(right | ~chain, axis=1))
    count = chain.sum()
    return (loss * chain).sum() / count, {"accuracy": (right * chain).sum() / count, "chains_right": whole}


@functools.partial(jax.jit, static_argnames=("config", "model"), donate_argnames="state")
def train_step(state: TrainState, batch: Batch, config: PretrainConfig, model: ModelConfig):
    """One step of next-token training."""
    (loss, terms), grads = jax.value_and_grad(next_token_loss, has_aux=True)(state.params, batch, model)
    updates, opt_state = optimizer(config).update(grads, state.opt_state, state.params)
    terms = {"loss": loss, **terms, "grad_norm": optax.tree.norm(grads)}
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), terms


def main(
    config: Path = Path("configs/mini_pretrain.yaml"),
    model: Path | None = None,
    out: Path = Path("runs/mini_pretrain"),
    steps: int | None = None,
    batch_size: int | None = None,
    pool: int | None = None,
) -> None:
    """Pretrains the mini model and writes it to OUT/base.

    Args:
      config: YAML file with the fields of PretrainConfig.
      model: YAML file with the fields of ModelConfig, of another model on the same task; default: the bundled one's.
      out: folder for checkpoints, the log and the model; a run found there is continued.
      steps: overrides the config.
      batch_size: overrides the config.
      pool: overrides the config.
    """
    overrides = {"steps": steps, "batch_size": batch_size, "pool": pool}
    fields = vars(load_yaml(PretrainConfig, config)) | {k: v for k, v in overrides.items() if v is not None}
    settings, shape = PretrainConfig(**fields), MODEL if model is None else load_yaml(ModelConfig, model)
    vocabulary = MODEL.vocab_size
    require(shape.vocab_size == vocabulary, "vocab_size", shape.vocab_size, f"the mini task has {vocabulary} tokens")
    out.mkdir(parents=True, exist_ok=True)
    mini.save_tokenizer(out / "base")
    problems = training_pool(settings.seed, settings.pool, settings.slip_rate)
    params = init(jax.random.key(settings.seed), shape)
    print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters, {len(problems.tokens):,} problems")
    start = TrainState(params, optimizer(settings).init(params), jnp.zeros((), jnp.int32))
    stream = PoolStream(problems, settings.batch_size, settings.seed)
    state = Loop(out, settings.steps).run(
        lambda step, state, batch: train_step(state, batch, config=settings, model=shape), start, stream
    )
    params = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), state.params)
    save(LM(config=shape, params=params, tokenizer=None, dms=None), out / "base")


if __name__ == "__main__":
    command.run(main)
