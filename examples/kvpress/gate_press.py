"""An adapter gate of dms_jax as a press of kvpress: evicted keys are masked in decoding, so that nothing is freed.

It needs neither JAX nor dms_jax, but `pip install -r examples/kvpress/requirements.txt` in an environment of its own, a
base model in Hugging Face's format and a gate's file from `python -m scripts.export --format adapter`:

  python examples/kvpress/gate_press.py BASE gate.safetensors "A prompt"

kvpress reads a prompt densely; from the first generated token on, what is visible is what DMS says. A borrowed query
neuron cannot be a press, since a press does not change queries.
"""

import json
import sys
from dataclasses import dataclass, field

import torch
from kvpress.presses.base_press import BasePress, is_prefilling
from safetensors import safe_open
from torch import nn


@dataclass
class GatePress(BasePress):
    """Masks the keys that the gate marks, `window` tokens after each.

    file: a gate's file of dms_jax, whose metadata say how to read it.
    """

    file: str
    config: dict = field(init=False, repr=False)
    tensors: dict[str, torch.Tensor] = field(init=False, repr=False)
    marked: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False)  # layer -> alpha [B, K, S]

    def __post_init__(self):
        with safe_open(self.file, framework="pt") as opened:
            self.config = json.loads(opened.metadata()["dms"])
            self.tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        if self.config["dms_decision_offset"] > self.config["dms_window_size"]:
            raise ValueError("with offset w + 1 a key is masked only while its own query is computed")

    def decisions(self, module: nn.Module, normed: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """alpha `[B, K, T]` from the input of attention `[B, T, E]`, whose norm is undone: both norms have one eps."""
        prefix = f"model.layers.{module.layer_idx}.self_attn.dms_proj_alpha"
        weight, scale = (self.tensors[prefix + end].to(normed) for end in (".weight", "_norm.weight"))
        x = normed / layer.input_layernorm.weight * scale
        logit = self.config["dms_alpha_scale"] * (x @ weight.T).float() - self.config["dms_initial_alpha_offset"]
        marked = (logit > 0).transpose(1, 2)
        return marked[:, :1].expand_as(marked) if self.config["dms_alpha_per"] == "layer" else marked

    def post_init_from_model(self, model):
        self.layers = model.model.layers

    def forward_hook(self, module: nn.Module, input: list[torch.Tensor], kwargs: dict, output: list):
        """After a layer's attention: says which keys the next query may not read."""
        normed, n = kwargs["hidden_states"], module.layer_idx
        marked = self.decisions(module, normed, self.layers[n])
        if not is_prefilling(kwargs["cache_position"], normed.shape[1]):
            marked = torch.cat([self.marked[n], marked], dim=-1)
        self.marked[n] = marked
        offset, seen = self.config["dms_decision_offset"], marked.shape[-1]
        position = torch.arange(max(seen - offset, 0), device=marked.device)  # of tokens whose decision is known
        old = (seen - position > self.config["dms_window_size"]) & (position >= self.config["dms_sinks"])
        module.masked_key_indices = list(torch.where(marked[..., offset:] & old))
        return output


def main(base: str, gate: str, prompt: str, new: int = 64) -> str:
    """The greedy continuation of a prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    press = GatePress(gate)
    ids = tokenizer(prompt, return_tensors="pt")
    with press(model):
        out = model.generate(**ids, max_new_tokens=new, do_sample=False)
    marked = torch.stack([alpha.float().mean() for alpha in press.marked.values()]).mean()
    print(f"{marked:.0%} of the tokens marked")
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :])


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
