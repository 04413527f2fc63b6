"""Continues a prompt, streaming the text, and says what the KV cache cost.

examples:
  python -m scripts.generate --demo
  python -m scripts.generate --demo --problem 3 --cr 8 --temperature 1
  python -m scripts.generate --model org/name --chat --prompt "What is 6 * 7?" --max-new-tokens 512
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

import dms_jax
from dms_jax.config import require
from dms_jax.inference import generation
from dms_jax.inference.generation import GenerationConfig
from dms_jax.weights.text import encode, encode_turn, has_chat
from experiments import command
from experiments.command import MINI, metavar

DEMO_SEED = "scripts.generate"


@dataclasses.dataclass(frozen=True)
class Config:
    prompt: Annotated[str | None, metavar("TEXT")] = None
    """the text to continue; - reads it from standard input"""
    demo: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")] = False
    """a held-out problem for the mini model: the original and the retrofitted one (--cr, 4 by default) side by side"""
    problem: Annotated[int, metavar("N")] = 0
    """which problem the demo takes; default: 0"""
    model: Annotated[str, metavar("MODEL")] = MINI
    """mini (the default, bundled), a hub name, a folder in Hugging Face's format, or a .gguf file"""
    cr: Annotated[float | None, metavar("CR")] = None
    """member of a retrofitted family; default: the original model"""
    gate: Annotated[Path | None, metavar("FILE")] = None
    """adapter gate (safetensors) to lay over the model's weights"""
    policy: Annotated[str | None, metavar("NAME")] = None
    """eviction policy; default: dms where the model was retrofitted, full otherwise"""
    budget: Annotated[int | float | None, metavar("TOKENS|SHARE")] = None
    """tokens a head may keep (256), or their share of the length (0.25), for training-free policies"""
    protect_prompt: Annotated[bool | None, metavar("True|False")] = None
    """whether such a policy never evicts a token of the prompt; default: as the method has it"""
    evict_every: Annotated[int | None, metavar("STEPS")] = None
    """steps from one eviction to the next; default: as the method has it"""
    window: Annotated[int | None, metavar("TOKENS")] = None
    """overrides the window that the model was retrofitted with"""
    chat: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")] = False
    """write the prompt as a user's turn, with the tokenizer's chat template"""
    max_new_tokens: Annotated[int, metavar("TOKENS")] = 448
    """default: 448"""
    temperature: Annotated[float, metavar("T")] = 0.0
    """default: 0, greedy"""
    top_p: Annotated[float, metavar("P")] = 1.0
    """default: 1"""
    seed: Annotated[int, metavar("SEED")] = 0
    """of the sampling; default: 0"""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")] = False
    """also print how long each phase took, until the first token and in all"""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, metavar("DTYPE")] = None
    """float32, bfloat16 or float16; default: float32 on a CPU, bfloat16 elsewhere"""


class Phases:
    """Seconds since the start of the command: the model loaded, its programs compiled, the first token, the last.

    Compiling is tracing, lowering, and compiling or fetching from the folder that keeps programs.
    """

    def __init__(self, start: float):
        import jax

        self.start, self.compiling, self.kept = start, 0.0, 0
        self.ends: dict[str, float] = {}
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_duration(self, event: str, seconds: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            self.compiling += seconds

    def _on_event(self, event: str, **_) -> None:
        self.kept += event == "/jax/compilation_cache/cache_hits"

    def end(self, phase: str) -> None:
        """A phase has ended, if it had not yet."""
        self.ends.setdefault(phase, time.monotonic() - self.start)

    def __str__(self) -> str:
        lines = [f"{phase:<13} {seconds:>6.1f} s after the start" for phase, seconds in self.ends.items()]
        return "\n".join(
            [*lines, f"{'compiling':<13} {self.compiling:>6.1f} s in all threads, {self.kept} programs were kept"]
        )


class TextStream:
    """Turns token ids into text as they come: what is passed to `write` adds up to the decoded whole."""

    def __init__(self, tokenizer, write: Callable[[str], None]):
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.shown = ""

    def push(self, ids: list[int], last: bool = False) -> None:
        """More tokens; `last` writes out even what an unfinished character may follow."""
        self.ids += ids
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not last and text.endswith("\ufffd"):
            return  # a character whose bytes are spread over tokens
        self.write(text[len(self.shown) :])
        self.shown = text


def load(config: Config, cr: float | None, text: str):
    """The model, and the DMSConfig with the window asked for. What `text` takes is compiled while weights are read."""

    def prepare(lm):
        generation.prepare(lm, [prompt_ids(config, lm, text)], settings(config, config.policy, own_dms(config, cr, lm)))

    dtype = config.dtype or command.default_dtype()
    lm = dms_jax.load(config.model, dtype=dtype, gate=config.gate, cr=cr, meanwhile=prepare)
    require(lm.tokenizer is not None, "model", config.model, "has no tokenizer")
    return lm, own_dms(config, cr, lm)


def own_dms(config: Config, cr: float | None, lm):
    """The model's DMSConfig with the window asked for."""
    if config.window is None or (cr is None and config.demo):
        return lm.dms
    require(lm.dms is not None, "window", config.window, "this model was never retrofitted")
    return dataclasses.replace(lm.dms, window=config.window)


def settings(config: Config, policy: str | None, dms) -> GenerationConfig:
    """How a prompt is continued."""
    names = ("max_new_tokens", "temperature", "top_p", "seed", "budget", "protect_prompt", "evict_every")
    return GenerationConfig(policy=policy, dms=dms, **{name: getattr(config, name) for name in names})


def prompt_ids(config: Config, lm, text: str) -> list[int]:
    """Token ids of the prompt. The mini model's problems end in a newline, which is added where it is missing."""
    if config.chat:
        require(has_chat(lm.tokenizer), "chat", True, "the tokenizer has no chat template")
        return encode_turn(lm.tokenizer, text)
    if config.model == MINI and not text.endswith("\n"):
        text += "\n"
    return encode(lm.tokenizer, text)


def figures(out, prompt: int) -> str:
    """The cache's figures of a chain, beside those of a full cache over the same tokens."""
    made = len(out.tokens[0][0])
    reads = sum(range(prompt + 1, prompt + made))  # the first token comes out of the prompt's own pass
    peak = prompt + made - 1
    return (
        f"{prompt} prompt tokens, {made} new tokens\n"
        f"KV reads      {out.kv_reads[0, 0]:>10,.0f}   (full cache: {reads:,})\n"
        f"prompt reads  {out.prefill_reads[0, 0]:>10,.0f}   (full cache: {prompt * (prompt + 1) // 2:,})\n"
        f"peak tokens   {out.peak_tokens[0, 0]:>10,.1f}   (full cache: {peak:,})\n"
        f"achieved CR   {out.achieved_cr[0, 0]:>10.2f}"
    )


def write(text: str) -> None:
    print(text, end="", flush=True)


def stream(config: Config, lm, dms, text: str, policy: str | None, phases: Phases | None = None) -> str:
    """Generates to the terminal; returns the new text."""
    ids = prompt_ids(config, lm, text)
    shown = TextStream(lm.tokenizer, write)

    def on_tokens(_prompt, _chain, new: list[int]) -> None:
        shown.push(new)
        if phases:
            phases.end("first token")

    out = dms_jax.generate(lm, [ids], config=settings(config, policy, dms), on_tokens=on_tokens)
    shown.push([], last=True)
    print(f"\n\n{figures(out, len(ids))}")
    if phases:
        phases.end("last token")
        print(phases)
    return shown.shown


def demo(config: Config) -> None:
    """A held-out problem, its right answer, and the chains of the original and of a retrofitted model."""
    from experiments.judge import judge
    from experiments.tasks import mini

    drawn = mini.problems("test", DEMO_SEED)
    problem = next(itertools.islice(drawn, config.problem, None))
    print(f"held-out problem {config.problem}:\n{problem.problem}")
    for cr in (None, config.cr or 4.0):
        title = "original model, full cache" if cr is None else f"DMS, retrofitted for CR {cr:g}"
        print(f"--- {title} ---")
        lm, dms = load(config, cr, problem.problem)
        text = stream(config, lm, dms, problem.problem, None if cr is None else config.policy)
        verdict = judge(text, problem.answer)
        given = (
            "no answer" if verdict.answer is None else f"{verdict.answer} is {'right' if verdict.correct else 'wrong'}"
        )
        print(f"answer        {given}\n")
    print(f"the right answer is {problem.answer}")


def execute(config: Config, _console: Console, start: float) -> int:
    require(config.demo != (config.prompt is not None), "prompt", config.prompt, "give --prompt or --demo")
    if config.demo:
        require(config.model == MINI, "model", config.model, "the demo is for the mini model")
        require(config.problem >= 0, "problem", config.problem, "must not be negative")
        demo(config)
        return 0
    phases = Phases(start) if config.verbose else None
    text = sys.stdin.read() if config.prompt == "-" else config.prompt or ""
    lm, dms = load(config, config.cr, text)
    if phases:
        phases.end("model loaded")
    stream(config, lm, dms, text, config.policy, phases)
    return 0


def main(arguments: list[str] | None = None) -> int:
    return command.main(Config, execute, __doc__, "scripts.generate", arguments)


if __name__ == "__main__":
    sys.exit(main())
