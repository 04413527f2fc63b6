"""The model card of an export: what the model is, how it was made, what was measured, how to load it elsewhere."""

from pathlib import Path

import dms_jax
from dms_jax.config import ConfigError
from dms_jax.training.config import RetrofitConfig
from dms_jax.weights.dms_keys import fastdms_metadata, nvidia_config

# format -> whose program reads it, and how
READERS = {
    "dms_jax": (
        "dms_jax, which keeps what is live on a paged cache",
        'import dms_jax\n\nlm = dms_jax.load({where})\nprint(dms_jax.generate(lm, ["..."]).text[0][0])',
    ),
    "hf": (
        "Hugging Face transformers, 4.57 or newer, by the modelling file of the folder (without `trust_remote_code` it "
        "takes the folder for a model without a gate)",
        "from transformers import pipeline\n\n"
        'pipe = pipeline("text-generation", model={where}, trust_remote_code=True)\n'
        'print(pipe("...", max_new_tokens=256)[0]["generated_text"])',
    ),
    "nvidia": (
        "NVIDIA's Model-Optimizer, experimental/dms, once its `models/qwen3/configuration_qwen3_dms.py` and "
        "`modeling_qwen3_dms.py` are copied into the folder",
        "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(\n"
        '    {where}, trust_remote_code=True, dtype="bfloat16", device_map="cuda"\n)',
    ),
    "fastdms": (
        "FastDMS, which reads `dms_metadata.json`",
        "from fastdms import LLM, SamplingParams\n\n"
        'print(LLM({where}).generate(["..."], SamplingParams(max_tokens=256))[0]["text"])',
    ),
}


def rows_of_gate(lm: dms_jax.LM) -> dict[str, str]:
    """What the gate is."""
    dms = lm.dms
    said = f"{dms.gate}, window {dms.window}, decision offset {dms.decision_offset}, per {dms.per}, sinks {dms.sinks}"
    return {"gate": said, "target compression ratio": "not known" if lm.cr is None else f"{lm.cr:g}"}


def rows_of_run(settings: RetrofitConfig, step: int, figures: dict[str, float]) -> dict[str, str]:
    """How a run of scripts.retrofit made it, and the means of its log's last lines up to the step."""
    sources = [f"{s.path} (weight {s.weight:g})" for s in settings.data] or ["the mini task's training problems"]
    lora = f"low-rank updates of {', '.join(settings.lora.targets)}, rank {settings.lora.rank}"
    achieved = kl = "not logged"
    if figures:
        achieved = f"{figures['achieved_cr']:.2f} (the window, which is never evicted, not counted)"
        kl = f"{figures['kl']:.4g} nats a token, training mask"
    return {
        "trained": {"full": "all weights", "adapter": "the gate, over frozen weights"}.get(settings.mode, lora),
        "data": "; ".join(sources),
        "steps": f"{step:,} of {settings.batch_size} x {settings.context} tokens",
        "learning rate": f"{settings.learning_rate:g} (AdamW), {settings.kl} KL to the base model",
        "achieved in training": achieved,
        "KL to the base model": kl,
    }


def why_not(lm: dms_jax.LM, reader: str) -> str:
    """Why a program cannot run the model; empty if it can."""
    said = {"nvidia": nvidia_config, "fastdms": fastdms_metadata}.get(reader)
    try:
        if said is not None:
            said(lm.config, lm.dms, lm.cr)
    except ConfigError as error:
        return str(error)
    return ""


def loading(lm: dms_jax.LM, base: str, format: str) -> str:
    """How each of the four programs loads the model from a folder of a format, by way of another export if need be."""
    where, source, parts = '"this folder"', '--model "this folder"', []
    if format == "adapter":
        where, source = f'"{base}", gate="gate.safetensors"', f'--model "{base}" --gate gate.safetensors'
    for reader, (program, code) in READERS.items():
        here = reader in ("dms_jax", format)
        reason = "" if here else why_not(lm, reader)
        if reason:
            parts.append(f"Not in {reader}: {reason}.")
            continue
        command = "" if here else f"; first `python -m scripts.export {source} --format {reader} --out OUT`"
        snippet = code.format(where=where if here else '"OUT"')
        parts.append(f"In {program}{command}:\n\n```python\n{snippet}\n```")
    return "\n\n".join(parts)


def card(base: str, lm: dms_jax.LM, rows: dict[str, str], how: str, format: str) -> str:
    """A model card in Hugging Face's format.

    Args:
      base: the model that was retrofitted.
      rows: of the table, besides those of the gate.
      how: where the figures come from, and how to get them again.
    """
    table = "\n".join(f"| {key} | {value} |" for key, value in {"base model": base, **rows_of_gate(lm), **rows}.items())
    return f"""---
base_model: {base}
library_name: {"transformers" if format in ("hf", "nvidia") else "dms_jax"}
tags: [dynamic-memory-sparsification, kv-cache]
---

# {Path(base).name} with Dynamic Memory Sparsification{"" if lm.cr is None else f", CR {lm.cr:g}"}

The model decides itself which tokens of its KV cache to drop, {lm.dms.window} tokens after the decision
([Łańcucki et al., 2025](https://arxiv.org/abs/2506.05345)). Exported by dms_jax.

| | |
| :-- | :-- |
{table}

{how}

## How to load it

{loading(lm, base, format)}
"""
