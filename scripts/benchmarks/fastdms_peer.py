"""Decode steps of FastDMS (github.com/shisa-ai/FastDMS), timed by its own engine; decode_peers runs this in a process.

FastDMS is imported from a folder that the user names. It decides by a query neuron of the weights it reads, so the
random model written for it is made to decide by token: one feature of the embedding, which nothing else writes to, is
all that the borrowed neurons read, and only token KEPT has it negative. So every head holds context / CR tokens, its
window included, all heads as many (bench_decode's differ by --spread), and evicts all that it generates.

modes: "fastdms" as it comes, which evicts once every `window` steps; "fastdms_each_step", every step, as DMS says;
"fastdms_fp8" as it comes with fp8 MLP weights, unembedding, keys and values. Where flash-attn is missing, the prompt is
read by PyTorch's SDPA; the steps timed do not use it.
"""

import faulthandler
import importlib.machinery
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
import types
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

KEPT = 1  # the only token that is not evicted; prompts are made of the others
WINDOW = 256
MODES = {
    "fastdms": {},
    "fastdms_each_step": {"FASTDMS_DMS_EXPIRY_TRITON": "1"},
    "fastdms_fp8": {"FASTDMS_FP8_WEIGHTS": "1", "FASTDMS_FP8_WEIGHT_SCOPE": "mlp_lm_head"},
}
PREFILL_SEQUENCES = 8  # prompts read at once
MAX_POSITIONS = 131072  # the engine cuts longer sequences off
WARM_UP = 16  # steps that capture graphs and grow buffers


@dataclass(frozen=True)
class Cell:
    """What one process measures.

    source: the folder of FastDMS. model: of `write_model`. steps: as long as a window. seconds: then it is given up.
    """

    source: str
    model: str
    mode: str
    batch: int
    context: int
    cr: float
    seed: int = 0
    steps: int = WINDOW
    seconds: int = 300


def write_model(model: torch.nn.Module, folder: Path) -> None:
    """The files of a transformers Llama or Qwen3 that decides by token; its weights are changed for it."""
    c = model.config
    group, D = c.num_attention_heads // c.num_key_value_heads, model.model.layers[0].self_attn.head_dim
    with torch.no_grad():
        feature = model.model.embed_tokens.weight[:, 0]
        feature.fill_(0.02)
        feature[KEPT] = -0.02
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
            neurons = layer.self_attn.q_proj.weight.view(-1, group, D, c.hidden_size)[:, 0, D - 1]
            neurons.zero_()
            neurons[:, 0] = 1
    c.max_position_embeddings = MAX_POSITIONS
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<eos>": 0}, unk_token="<eos>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    gate = {"window_size": WINDOW, "alpha_scale": 100.0, "alpha_offset": 0.0, "target_cr": 8}
    (folder / "dms_metadata.json").write_text(json.dumps(gate))


def prompt(cell: Cell, vocab: int, number: int) -> list[int]:
    """`context` tokens of which a head holds context / cr after reading them."""
    rng = random.Random(f"{cell.seed} {number}")
    tokens = [rng.randrange(KEPT + 1, vocab) for _ in range(cell.context)]
    old = cell.context - WINDOW - 1  # all but those in the window and the newest
    for place in rng.sample(range(old), max(0, round(cell.context / cell.cr) - WINDOW - 1)):
        tokens[place] = KEPT
    return tokens


def measure(cell: Cell, row: dict) -> dict:
    """The row with what one process measures of a cell, or with its error: where it stood, if it took too long."""
    env = os.environ | MODES[cell.mode] | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", __name__, json.dumps(asdict(cell))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        return row | {"error": done.stderr.strip()[-3000:]}
    return row | json.loads(done.stdout.splitlines()[-1])


def one_process(backend: str, *_: object, **__: object) -> None:
    """In place of `torch.distributed.init_process_group`, which waits for a port of localhost until it has a network.

    Machines cut off from one may lack even that; one process needs none.
    """
    group = torch.distributed.distributed_c10d.init_process_group
    group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)


def sdpa_varlen(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, **_) -> torch.Tensor:
    """What the engine calls flash-attn for, `[tokens, heads, D]`: causal attention of prompts of one length."""
    B, T = len(cu_seqlens_q) - 1, max_seqlen_q
    q, k, v = (x.reshape(B, T, -1, x.shape[-1]).transpose(1, 2) for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    out = attend(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2).reshape(B * T, -1, q.shape[-1])


def engine(cell: Cell):
    """FastDMS's engine of the model, and its parameters for greedy sampling that no token ends."""
    sys.path.insert(0, cell.source)
    if importlib.util.find_spec("flash_attn") is None:
        stand_in = types.ModuleType("flash_attn")
        stand_in.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)  # transformers asks for it
        stand_in.flash_attn_varlen_func, stand_in.flash_attn_with_kvcache = sdpa_varlen, None
        sys.modules["flash_attn"] = stand_in
    torch.distributed.init_process_group = one_process
    from fastdms import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    new = WARM_UP + cell.steps
    llm = LLM(
        cell.model,
        enforce_eager=True,  # of what is not compact: its graphs of compact decoding are another switch, on
        max_model_len=cell.context + new + 1,
        max_num_batched_tokens=cell.context * min(cell.batch, PREFILL_SEQUENCES),
        max_num_seqs=cell.batch,
        kv_cache_dtype="float8_e4m3fn" if cell.mode == "fastdms_fp8" else "auto",
        compact_kv_enabled=True,
        compact_kv_retention_mode="dms",
        compact_kv_layer_major_metadata=True,  # PyTorch 2.11 refuses how decisions are stored sequence by sequence
    )
    return llm, SamplingParams(temperature=0.0, max_tokens=new + 1, ignore_eos=True)


def step(llm) -> list:
    """One step of the engine, a prefill or a token of each sequence; the sequences."""
    sequences, is_prefill = llm.scheduler.schedule()
    tokens = llm.model_runner.call("run", sequences, is_prefill)
    llm.scheduler.postprocess(sequences, tokens, is_prefill)
    return sequences


def run(cell: Cell) -> dict:
    """The numbers of one cell; for one sequence by the engine's loop that does not look at its tokens."""
    llm, sampling = engine(cell)
    vocab = llm.model_runner.config.hf_config.vocab_size
    begun = time.perf_counter()
    for number in range(cell.batch):
        llm.add_request(prompt(cell, vocab, number), sampling)
    live = []
    while llm.scheduler.waiting:
        sequences = step(llm)
        live += [stats["live_tokens_mean"] for stats in llm.model_runner.last_compact_prefill_stats]
    torch.cuda.synchronize()
    prefilled = time.perf_counter()

    def decode(steps: int) -> float:
        start = time.perf_counter()
        if cell.batch == 1:
            llm.model_runner.call("run_compact_greedy_decode_loop", sequences, steps)
        else:
            for _ in range(steps):
                step(llm)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    decode(WARM_UP)
    seconds = decode(cell.steps)
    return {
        "seconds_per_step": seconds,
        "tokens_per_second": cell.batch / seconds,
        "live_tokens": sum(live) / len(live),
        "prefill_seconds": prefilled - begun,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


if __name__ == "__main__":
    asked = Cell(**json.loads(sys.argv[1]))
    faulthandler.dump_traceback_later(asked.seconds, exit=True)
    print(json.dumps(run(asked)), flush=True)
