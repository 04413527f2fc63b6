"""Chained arithmetic modulo 1000: the task of the miniature reasoning model.

A problem is stated in text, a chain of thought works it out, and the answer is
an integer from 000 to 999 in a box, as in AIME. Prompt and chain:

    Let q = 482, m = 157, c = 309. Set d = q + m, x = d - c, f = 7 * x. Find f modulo 1000.
    d = q + m: q = 482, m = 157; 2 + 7 + 0 = 09, 8 + 5 + 0 = 13, 4 + 1 + 1 = 06; d = 639.
    x = d - c: d = 639, c = 309; 9 - 9 - 0 = 00, 3 - 0 - 0 = 03, 6 - 3 - 0 = 03; x = 330.
    f = 7 * x: x = 330; 7 * 330 = 310; f = 310.
    The answer is \\boxed{310}.

The scratch works from the lowest digit up, so that carries flow in reading order.
Each digit step ends in two digits: the carry (or borrow), then the result's digit.
`2 - 7 - 0 = 15` borrows 1 and writes 5. A product is written at once: the hard step.
Chains to train on may hold slips, one wrong digit in a few of their lines, as written
reasoning does: a model trained on them errs now and then, and votes of several chains
help. The problems that score a model have exact solutions.

Why this task: the program and the values of the variables are needed much later,
and the digit scratch, which is most of the chain, is not needed after its line.
A learned eviction can drop the scratch and keep the values; a sliding window,
which keeps whatever is recent, cannot.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm

GIVENS = 3
STEPS = (7, 8)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNK = range(4)
OPERATORS = (" = ", " + ", " - ", " * ", ", ", ": ", "; ")
WORDS = ("Let ", "Set ", "Find ", " modulo 1000", "The answer is ", "\\boxed{", "}")
STOPS = (". ", ".\n", ".", "\n", " ")
TEXT_PIECES = (*OPERATORS, *WORDS, *STOPS, *"0123456789", *LETTERS)
# The same pieces as one pattern for both regex engines; where two match, the longer comes first.
PATTERN = (
    r"[0-9a-z]| [-+*=] |[,:;] |\.[ \n]?|\n"
    r"|Let |Set |Find | modulo 1000|The answer is |\\boxed\{|\}| "
)
PIECE = re.compile(f"{PATTERN}|.", re.DOTALL)  # any other character too: not skipped in silence
CHUNK = 1024  # problems made by one call of a worker
LENGTH = 512  # tokens a sequence is padded to; the longest problem has fewer


class Problem(NamedTuple):
    """A prompt, the chain of thought that solves it, and the answer's three digits."""

    problem: str
    solution: str
    answer: str


class Encoded(NamedTuple):
    """Right-padded tokens [N, length] uint8, and lengths [N] int32, bos and eos included."""

    tokens: np.ndarray
    prompt_lengths: np.ndarray
    total_lengths: np.ndarray


class Step(NamedTuple):
    """`name = left op right`; for `*`, left is a digit."""

    name: str
    left: str
    op: str
    right: str


class Program(NamedTuple):
    """Names and values of the givens, then the steps in order."""

    givens: dict[str, int]
    steps: list[Step]


def draw_program(rng: random.Random, steps: int) -> Program:
    """Draw a program in which every given and every step feeds the last one.

    `pending` holds the variables that no step has read yet. Each step reads one
    of the two newest of them, so at most GIVENS are ever pending; once there are
    more than the steps left, a step must read two. So one is pending at the end:
    the answer. The other operand may be any earlier variable, however old, which
    is what makes values live long.
    """
    if steps < GIVENS - 1:
        raise ValueError(f"steps = {steps}: at least {GIVENS - 1} are needed to read {GIVENS} givens")
    names = rng.sample(LETTERS, GIVENS + steps)
    givens = {name: rng.randrange(1000) for name in names[:GIVENS]}
    pending, program = names[:GIVENS], []
    for done, name in enumerate(names[GIVENS:]):
        first = pending.pop(rng.choice((-1, -min(2, len(pending)))))
        must_merge = len(pending) >= steps - done
        if not must_merge and rng.random() < 0.25:
            program.append(Step(name, str(rng.randint(2, 9)), "*", first))
        else:
            earlier = pending if must_merge else names[: GIVENS + done]
            second = rng.choice([other for other in earlier if other != first])
            if second in pending:
                pending.remove(second)
            pair = (first, second) if rng.random() < 0.5 else (second, first)
            program.append(Step(name, pair[0], rng.choice("+-"), pair[1]))
        pending.append(name)
    return Program(givens, program)


def write_prompt(program: Program) -> str:
    """The program as a question."""
    givens = ", ".join(f"{name} = {value:03d}" for name, value in program.givens.items())
    steps = ", ".join(f"{s.name} = {s.left} {s.op} {s.right}" for s in program.steps)
    return f"Let {givens}. Set {steps}. Find {program.steps[-1].name} modulo 1000.\n"


def digit_steps(op: str, left: int, right: int, slips: tuple[int, int, int] = (0, 0, 0)) -> tuple[str, int]:
    """The scratch of one operation, lowest digit first, and its result modulo 1000.

    A product is written at once, without scratch. `slips` are added to the digits, lowest first, as they are written.
    """
    if op == "*":
        exact = left * right
        result = sum((exact // 10**n + slip) % 10 * 10**n for n, slip in enumerate(slips))
        return f"{left} * {right:03d} = {result:03d}", result
    parts, carry, result = [], 0, 0
    for place, slip in zip((1, 10, 100), slips, strict=True):
        x, y = left // place % 10, right // place % 10
        if op == "-":
            total = x - y - carry
            text, carry, digit = f"{x} - {y} - {carry}", int(total < 0), total % 10
        else:
            total = x + y + carry
            text, (carry, digit) = f"{x} + {y} + {carry}", divmod(total, 10)
        digit = (digit + slip) % 10
        parts.append(f"{text} = {carry}{digit}")
        result += digit * place
    return ", ".join(parts), result


def draw_slips(rng: random.Random, rate: float) -> tuple[int, int, int]:
    """With probability `rate` one wrong digit, else none."""
    slips = [0, 0, 0]
    if rng.random() < rate:
        slips[rng.randrange(3)] = rng.randint(1, 9)
    return tuple(slips)


def write_chain(program: Program, rng: random.Random | None = None, slip_rate: float = 0.0) -> tuple[str, str]:
    """The chain of thought, a line per step, and the three digits it arrives at.

    With a `slip_rate` a line goes wrong in one digit with that probability, and the rest builds on it.
    """
    values, lines = dict(program.givens), []
    for name, left, op, right in program.steps:
        copies = f"{right} = {values[right]:03d}"
        if op != "*":
            copies = f"{left} = {values[left]:03d}, {copies}"
        slips = draw_slips(rng, slip_rate) if slip_rate else (0, 0, 0)
        scratch, result = digit_steps(op, int(left) if op == "*" else values[left], values[right], slips)
        values[name] = result
        lines.append(f"{name} = {left} {op} {right}: {copies}; {scratch}; {name} = {result:03d}.\n")
    answer = f"{result:03d}"
    return "".join(lines) + f"The answer is \\boxed{{{answer}}}.", answer


def make_problem(rng: random.Random, steps: int) -> Problem:
    """One problem with `steps` computed variables, of either split."""
    program = draw_program(rng, steps)
    return Problem(write_prompt(program), *write_chain(program))


def split_of(problem_text: str) -> str:
    """One text in 16 is test, by its hash: whatever the seeds, the splits are disjoint."""
    return "test" if hashlib.sha256(problem_text.encode()).digest()[0] < 16 else "train"


def problems(split: str, seed: int | str, steps: tuple[int, int] = STEPS, slip_rate: float = 0.0) -> Iterator[Problem]:
    """Endless problems of one split, the same for the same arguments; the prompts do not depend on `slip_rate`."""
    if split not in ("train", "test"):
        raise ValueError(f"split = {split!r}: expected 'train' or 'test'")
    rng, slip_rng = random.Random(str(seed)), random.Random(f"{seed} slips")
    while True:
        program = draw_program(rng, rng.randint(*steps))
        prompt = write_prompt(program)
        if split_of(prompt) == split:  # the chain, which costs more, only for those kept
            yield Problem(prompt, *write_chain(program, slip_rng, slip_rate))


def build_tokenizer() -> Tokenizer:
    """Digits and letters a token each, operators with their spaces, fixed phrases whole.

    Decoding gives the text back exactly. Spaces around operators and punctuation
    are first brought to the task's own style, so that `d=q+m` is understood too.
    """
    vocabulary = {piece: index for index, piece in enumerate((*SPECIALS, *TEXT_PIECES))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tidy = [normalizers.Replace(Regex(f" *[{op.strip()}] *"), op) for op in OPERATORS]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex("  +"), " "), *tidy])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", BOS)])
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def save_tokenizer(folder: str | Path) -> None:
    """Write the tokenizer so that transformers' AutoTokenizer loads it, offline and without torch."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{special[1:-1]}_token": special for special in SPECIALS},
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode_training(tokenizer: Tokenizer, examples: Iterable[Problem], length: int) -> Encoded:
    """`<bos> prompt chain <eos>` per problem, padded on the right to `length`.

    Splits in Python, with the tokenizer's own pattern and vocabulary: the texts are
    in the task's style already, and `encode_batch` takes several times as long. A test
    holds the two equal. A text that is out of style raises KeyError.
    """
    examples = list(examples)
    vocabulary = tokenizer.get_vocab()
    tokens = np.full((len(examples), length), PAD, np.uint8)
    prompt_lengths, total_lengths = np.zeros((2, len(examples)), np.int32)
    for row, example in enumerate(examples):
        prompt, chain = PIECE.findall(example.problem), PIECE.findall(example.solution)
        ids = [BOS, *(vocabulary[piece] for piece in prompt + chain), EOS]
        if len(ids) > length:
            raise ValueError(f"a problem takes {len(ids)} tokens, more than length = {length}")
        tokens[row, : len(ids)] = ids
        prompt_lengths[row], total_lengths[row] = 1 + len(prompt), len(ids)
    return Encoded(tokens, prompt_lengths, total_lengths)


def generate_pool(
    tokenizer: Tokenizer,
    split: str,
    seed: int,
    count: int,
    length: int,
    processes: int = 1,
    steps: tuple[int, int] = STEPS,
    slip_rate: float = 0.0,
) -> Encoded:
    """`count` encoded problems of one split, no prompt twice.

    Work is cut in chunks of fixed size, each with its own seed and taken in order,
    so the pool does not depend on the number of processes, and a smaller pool is
    the beginning of a larger one.
    """
    pool = Encoded(np.zeros((count, length), np.uint8), *np.zeros((2, count), np.int32))
    job = functools.partial(_chunk, tokenizer, split, seed, steps, slip_rate, length)
    # spawn: a forked child of a process with threads, as JAX's has, may hang
    workers = multiprocessing.get_context("spawn").Pool(processes) if processes > 1 else None
    seen, filled, chunk = set(), 0, 0
    with workers or contextlib.nullcontext(), tqdm(total=count, desc=f"{split} problems", delay=3) as bar:
        while filled < count:  # more than once only if prompts repeat
            numbers = range(chunk, chunk + -(-(count - filled) // CHUNK))
            chunk = numbers.stop
            for keys, part in workers.imap(job, numbers) if workers else map(job, numbers):
                fresh = [row for row, key in enumerate(keys) if not (key in seen or seen.add(key))]
                fresh = fresh[: count - filled]
                for whole, piece in zip(pool, part, strict=True):
                    whole[filled : filled + len(fresh)] = piece[fresh]
                filled += len(fresh)
                bar.update(len(fresh))
    return pool


def _chunk(tokenizer, split, seed, steps, slip_rate, length, number) -> tuple[list[bytes], Encoded]:
    """Chunk `number` of a pool, with a key of each prompt to find repeats by."""
    part = list(itertools.islice(problems(split, f"{seed}/{number}", steps, slip_rate), CHUNK))
    keys = [hashlib.sha256(problem.problem.encode()).digest()[:8] for problem in part]
    return keys, encode_training(tokenizer, part, length)
