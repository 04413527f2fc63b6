"""Tables of whole jobs: generate beside its steps, an experiment of many problems, and the start of a command."""

import json

from paper_figures.rows import device, markdown
from paper_figures.style import RESULTS

ALONE = "job_qwen2.5_coder_0.5b.json"  # generate's tokens per second with the weights of a file
PROGRAMS = {
    "job_gsm8k": "compiled one after another",
    "job_gsm8k_cold": "compiled side by side",
    "job_gsm8k_warm": "kept from the job before",
}


def recorded(name: str) -> dict:
    return json.loads((RESULTS / "h100" / name).read_text())


def job() -> str:
    """Tokens per second of a whole generate and of its decode steps."""
    runs = recorded("job_qwen2.5_0.5b.json")["runs"]
    runs.append(recorded(ALONE))
    rows = [
        [
            "of a file" if run["settings"]["model"].endswith(".gguf") else "random",
            f"{run['settings']['top_p']:g}",
            str(run["settings"]["steps"]),
            f"{run['tokens_per_second']:,.0f}",
            f"{run['step_tokens_per_second']:,.0f}",
            f"{run['job_over_step']:.2f}",
            f"{1e3 * run['step_seconds']:.2f}",
            f"{1e3 * run['prefill_seconds']:.0f}",
            f"{run['phases']['first call']:.0f}",
        ]
        for run in runs
    ]
    s, about = runs[0]["settings"], runs[0]["environment"]
    note = (
        f"Qwen2.5-0.5B's shape, {s['dtype']}, {s['prompts']} prompts of {s['prompt_length']} tokens, "
        f"{s['max_new_tokens']} new tokens, {s['max_num_seqs']} sequences, temperature {s['temperature']:g}; medians "
        f"of {s['rounds']} calls. {about['device']}, jax {about['jax']}; `{about['command']}`."
    )
    header = [
        "weights",
        "top-p",
        "steps a chunk",
        "job, tokens/s",
        "steps alone",
        "ratio",
        "ms a step",
        "ms prefill",
        "s first call",
    ]
    return f"{markdown(header, rows)}\n\n{note}"


def gsm8k_job() -> str:
    """An experiment from its start to its last chain, and from its first decode steps on beside generate alone."""
    alone = recorded(ALONE)["tokens_per_second"]
    runs = {name: recorded(f"{name}.json") for name in PROGRAMS if (RESULTS / "h100" / f"{name}.json").exists()}
    rows = []
    for name, run in runs.items():
        seconds, from_first = run["seconds"], run.get("tokens_per_second_from_first_chunk")
        rows.append(
            [
                PROGRAMS[name],
                f"{run['new_tokens']:,}",
                f"{seconds['loading']:.0f}",
                f"{seconds['sampling']:.0f}",
                f"{run['new_tokens'] / seconds['sampling']:,.0f}",
                f"{from_first:,.0f}" if from_first else "",
                f"{(from_first or run['new_tokens'] / seconds['sampling']) / alone:.0%}",
                f"{run['gpu_busy']['share']:.0%}",
            ]
        )
    header = ["programs", "tokens", "s loading", "s sampling", "tokens/s", "from the first chunk", "of generate"]
    last, config = list(runs.values())[-1], list(runs.values())[-1]["config"]
    note = (
        f"GSM8K, {last['problems']:,} problems, {max(config['chains'])} chains of at most {config['max_length']} "
        f"tokens, {config['batch_size']} sequences. {device(last)} GPU at work: {last['gpu_busy']['of']}."
    )
    return f"{markdown([*header, 'GPU at work'], rows)}\n\n{note}"


def start() -> str:
    """The first and the second start of `scripts.generate`."""
    record = recorded("start.json")
    rows = [
        [name, *(f"{run[key]:.1f}" for key in ("model loaded", "first token", "compiling")), str(run["kept"])]
        for name, run in record["starts"].items()
    ]
    header = ["start", "s to the model", "s to the first token", "s compiling, all threads", "programs kept"]
    note = f"Qwen2.5-Coder-0.5B. {device(record)} {record['environment']['cpu_count']} cores."
    return f"{markdown(header, rows)}\n\n{note}"
