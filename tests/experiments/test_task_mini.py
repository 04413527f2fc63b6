"""The mini task: chains are re-evaluated from their text, by a parser of the test's own."""

import itertools
import json
import random
import re

import numpy as np
import pytest

from experiments import mini_job
from experiments.tasks import mini

SOME = [mini.make_problem(random.Random(seed), 6 + seed % 3) for seed in range(300)]
EXAMPLE = mini.Program(
    {"q": 482, "m": 157, "c": 309},
    [mini.Step("d", "q", "+", "m"), mini.Step("x", "d", "-", "c"), mini.Step("f", "7", "*", "x")],
)
EXAMPLE_TEXT = r"""Let q = 482, m = 157, c = 309. Set d = q + m, x = d - c, f = 7 * x. Find f modulo 1000.
d = q + m: q = 482, m = 157; 2 + 7 + 0 = 09, 8 + 5 + 0 = 13, 4 + 1 + 1 = 06; d = 639.
x = d - c: d = 639, c = 309; 9 - 9 - 0 = 00, 3 - 0 - 0 = 03, 6 - 3 - 0 = 03; x = 330.
f = 7 * x: x = 330; 7 * 330 = 310; f = 310.
The answer is \boxed{310}."""


@pytest.fixture(scope="module")
def tokenizer():
    return mini.build_tokenizer()


def parse_prompt(text):
    """Givens {name: value} and steps [(name, left, op, right)] of a prompt."""
    match = re.fullmatch(r"Let (.+?)\. Set (.+?)\. Find ([a-z]) modulo 1000\.\n", text)
    givens = {}
    for part in match[1].split(", "):
        name, value = re.fullmatch(r"([a-z]) = (\d{3})", part).groups()
        givens[name] = int(value)
    steps = [re.fullmatch(r"([a-z]) = (\w) ([-+*]) ([a-z])", part).groups() for part in match[2].split(", ")]
    assert match[3] == steps[-1][0]
    return givens, steps


def evaluate(givens, steps):
    """Every variable's value, by plain integer arithmetic."""
    values = dict(givens)
    for name, left, op, right in steps:
        assert name not in values and left != right
        x = int(left) if op == "*" else values[left]
        values[name] = {"+": x + values[right], "-": x - values[right], "*": x * values[right]}[op] % 1000
    return values


def check_scratch(text, op, left, right, result):
    """Each digit step is right, takes the right digits, and passes its carry on; a product is written at once."""
    if op == "*":
        assert text == f"{left} * {right:03d} = {result:03d}" and result == left * right % 1000
        return
    carry, parts = 0, text.split(", ")
    assert len(parts) == 3
    for place, part in enumerate(parts):
        x, y, carried, out, digit = map(int, re.fullmatch(rf"(\d) [{op}] (\d) [-+] (\d) = (\d)(\d)", part).groups())
        assert x == left // 10**place % 10
        assert y == right // 10**place % 10 and carried == carry
        if op == "-":
            assert x - y - carried == digit - 10 * out and out in (0, 1)
        else:
            assert x + y + carried == 10 * out + digit
        assert digit == result // 10**place % 10
        carry = out


def test_the_documented_example_is_what_is_written():
    chain, answer = mini.write_chain(EXAMPLE)
    assert mini.write_prompt(EXAMPLE) + chain == EXAMPLE_TEXT and answer == "310"
    assert mini.digit_steps("-", 2, 7)[0].startswith("2 - 7 - 0 = 15, ")


def test_chains_evaluate_to_what_they_say():
    for problem in SOME:
        givens, steps = parse_prompt(problem.problem)
        values = evaluate(givens, steps)
        *lines, last = problem.solution.split("\n")
        for line, (name, left, op, right) in zip(lines, steps, strict=True):
            head, copies, scratch, result = re.fullmatch(r"(.+): (.+); (.+); (.+)\.", line).groups()
            operands = [right] if op == "*" else [left, right]
            assert head == f"{name} = {left} {op} {right}"
            assert copies == ", ".join(f"{operand} = {values[operand]:03d}" for operand in operands)
            check_scratch(scratch, op, int(left) if op == "*" else values[left], values[right], values[name])
            assert result == f"{name} = {values[name]:03d}"
        assert problem.answer == f"{values[steps[-1][0]]:03d}"
        assert last == rf"The answer is \boxed{{{problem.answer}}}."


def test_slips_are_one_wrong_digit_that_the_chain_builds_on():
    exact, slipped = (list(itertools.islice(mini.problems("train", 0, slip_rate=r), 400)) for r in (0.0, 0.1))
    assert [p.problem for p in exact] == [p.problem for p in slipped]
    wrong, total = 0, 0
    for problem in slipped:
        values, steps = parse_prompt(problem.problem)
        for line, (name, left, op, right) in zip(problem.solution.split("\n"), steps, strict=False):
            copies = [int(v) for v in re.findall(r" = (\d{3})[,;]", line.split(": ", 1)[1].split("; ")[0] + ";")]
            assert copies == [values[v] for v in ([right] if op == "*" else [left, right])]
            said = int(re.fullmatch(r".* = (\d{3})\.", line)[1])
            truth = evaluate(values, [(name, left, op, right)])[name]
            assert sum(a != b for a, b in zip(f"{said:03d}", f"{truth:03d}", strict=True)) <= 1
            values[name] = said
            wrong, total = wrong + (said != truth), total + 1
        assert problem.answer == f"{said:03d}"
    assert 0.08 < wrong / total < 0.12


def test_every_variable_feeds_the_answer_and_many_are_read_late():
    waits = []
    for problem in SOME:
        givens, steps = parse_prompt(problem.problem)
        born = {**dict.fromkeys(givens, -1), **{step[0]: i for i, step in enumerate(steps)}}
        last_read = {v: i for i, (_, *operands) in enumerate(steps) for v in operands if v in born}
        assert set(last_read) == set(born) - {steps[-1][0]}
        waits += [last_read[name] - born[name] for name in last_read]
        assert 6 <= len(steps) <= 8 and all(2 <= int(s[1]) <= 9 for s in steps if s[2] == "*")
    assert 0.25 < np.mean(np.array(waits) >= 3) < 0.6


@pytest.mark.parametrize("steps", [2, 3, 12])
def test_other_numbers_of_steps(steps):
    for seed in range(50):
        problem = mini.make_problem(random.Random(seed), steps)
        givens, program = parse_prompt(problem.problem)
        read = {operand for step in program for operand in step[1:]}
        assert set(givens) <= read and len(program) == steps
    with pytest.raises(ValueError, match="steps = 1"):
        mini.make_problem(random.Random(0), 1)


def test_splits_are_disjoint_and_one_in_sixteen():
    share = np.mean([mini.split_of(problem.problem) == "test" for problem in SOME])
    assert 0.02 < share < 0.12
    same_seed = {s: {p.problem for p in itertools.islice(mini.problems(s, 5), 200)} for s in ("train", "test")}
    assert not same_seed["train"] & same_seed["test"]
    assert all(mini.split_of(text) == split for split, texts in same_seed.items() for text in texts)
    with pytest.raises(ValueError, match="'dev'"):
        next(mini.problems("dev", 0))


def test_problems_are_deterministic():
    first, again, other = (list(itertools.islice(mini.problems("test", s), 20)) for s in (3, 3, 4))
    assert first == again and not set(first) & set(other)
    assert {p.problem.count("=") - 3 for p in itertools.islice(mini.problems("train", 0), 60)} == {7, 8}


def test_tokenizer_is_lossless_and_never_unknown(tokenizer):
    assert tokenizer.get_vocab_size() < 96
    assert [tokenizer.token_to_id(s) for s in ("<pad>", "<bos>", "<eos>", "<unk>")] == [0, 1, 2, 3]
    for problem in SOME:
        text = problem.problem + problem.solution
        ids = tokenizer.encode(text).ids
        assert ids[0] == mini.BOS and mini.UNK not in ids
        assert tokenizer.decode(ids) == text
        parts = [tokenizer.encode(part, add_special_tokens=False).ids for part in problem[:2]]
        assert ids[1:] == parts[0] + parts[1]  # no token crosses from prompt to chain


def test_tokenizer_pieces_and_free_spacing(tokenizer):
    assert tokenizer.encode("Set d = q + m, ").tokens == ["<bos>", "Set ", "d", " = ", "q", " + ", "m", ", "]
    assert tokenizer.encode(r"\boxed{042}.").tokens == ["<bos>", "\\boxed{", "0", "4", "2", "}", "."]
    loose = "Let q=482,m =  157 , c= 309. Set d =q+m,x=d-c, f = 7*x. Find  f modulo 1000.\n"
    assert tokenizer.encode(loose).ids == tokenizer.encode(mini.write_prompt(EXAMPLE)).ids
    assert tokenizer.encode("d = Q").tokens[-1] == "<unk>"


def test_auto_tokenizer_loads_the_saved_folder(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    mini.save_tokenizer(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    specials = (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id)
    assert specials == (0, 1, 2, 3) and len(loaded) == tokenizer.get_vocab_size()
    for problem in SOME[:50]:
        text = problem.problem + problem.solution
        assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
        assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text


def test_encode_training_equals_the_tokenizer(tokenizer):
    encoded = mini.encode_training(tokenizer, SOME, 512)
    assert encoded.tokens.shape == (len(SOME), 512) and encoded.tokens.dtype == np.uint8
    for row, prompt_length, total_length, problem in zip(*encoded, SOME, strict=True):
        expected = tokenizer.encode(problem.problem + problem.solution).ids + [mini.EOS]
        assert row[:total_length].tolist() == expected and not row[total_length:].any()
        assert row[:prompt_length].tolist() == tokenizer.encode(problem.problem).ids
    with pytest.raises(ValueError, match="length = 64"):
        mini.encode_training(tokenizer, SOME, 64)
    with pytest.raises(KeyError):
        mini.encode_training(tokenizer, [mini.Problem("Let Q = 1", "", "")], 64)


def test_pool_is_the_same_for_any_number_of_processes(tokenizer):
    alone = mini.generate_pool(tokenizer, "train", 7, 1500, 512)
    helped = mini.generate_pool(tokenizer, "train", 7, 1500, 512, processes=2)
    for left, right in zip(alone, helped, strict=True):
        np.testing.assert_array_equal(left, right)
    fewer, other = (mini.generate_pool(tokenizer, "train", seed, 40, 512) for seed in (7, 8))
    np.testing.assert_array_equal(fewer.tokens, alone.tokens[:40])
    assert not {row.tobytes() for row in other.tokens} & {row.tobytes() for row in alone.tokens}
    for row, length in zip(alone.tokens[:200], alone.prompt_lengths[:200], strict=True):
        assert mini.split_of(tokenizer.decode(row[:length].tolist())) == "train"


def test_pool_drops_repeated_prompts(tokenizer, monkeypatch):
    monkeypatch.setattr(mini, "CHUNK", 8)
    genuine = mini._chunk
    monkeypatch.setattr(mini, "_chunk", lambda *args: genuine(*args[:-1], args[-1] // 2))  # each chunk twice
    pool = mini.generate_pool(tokenizer, "train", 0, 30, 512)
    assert len({row.tobytes() for row in pool.tokens}) == 30 and pool.total_lengths.all()


def test_shipped_runs_are_of_the_bundled_family():
    """They are shown beside a user's own run of the mini model: no other model, and no other gates."""
    runs = [json.loads(path.read_text()) for path in mini_job.SHIPPED.glob("*.json")]
    assert runs and not [run["command"] for run in runs if "--model" in run["command"] or "--gate" in run["command"]]
