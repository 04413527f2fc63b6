"""RULER's tasks against their description: structure, places, answers, lengths, metric, repeatability."""

import random
import re

import pytest

from dms_jax.config import ConfigError
from experiments.tasks import mini, mini_recall, niah, ruler
from experiments.tasks import variable_tracking as vt

ESSAY = [word for n in range(400) for word in f"Sentence number {n} says little. Does it?".split()]
LENGTH = 1024


def words(prompt, prefix):
    """A tokenizer of words."""
    return (prompt + prefix).split()


def niah_samples(name, count=4, length=LENGTH, seed=42):
    return ruler.samples(niah.form(name, length, ESSAY), count, length, seed, words)


def vt_samples(name, count=4, length=LENGTH, seed=42):
    return ruler.samples(vt.form(name, length, words, ESSAY), count, length, seed, words)


# ---- what all share


@pytest.mark.parametrize("name", [*niah.TASKS, *vt.TASKS])
def test_length_is_kept_filled_and_counted(name):
    make = niah_samples if name in niah.TASKS else vt_samples
    for sample in make(name):
        new = niah.NEW_TOKENS if name in niah.TASKS else vt.NEW_TOKENS
        assert sample.length == len(words(sample.prompt, sample.prefix)) + new <= LENGTH
        assert sample.length > LENGTH - 40, "room for another line"


@pytest.mark.parametrize("make, name", [(niah_samples, "niah_multiquery"), (vt_samples, "vt_essay")])
def test_samples_are_repeatable_and_each_by_itself(make, name):
    many = make(name, 4)
    assert make(name, 4) == many and make(name, 2) == many[:2]
    assert len({s.prompt for s in many}) == 4
    assert make(name, 1, seed=43)[0].answers != many[0].answers


def test_too_short_a_length_is_an_error_that_names_the_task():
    with pytest.raises(ConfigError, match=r"length=150: too short for niah_single_1"):
        niah_samples("niah_single_1", length=150)


def test_a_sample_that_comes_out_longer_shrinks():
    """The trial has one token a unit; number 0 has 20 more, so it loses whole steps of 8 units."""

    def draw(rng, units):
        return ruler.Draft("x " * (units + (0 if trial else 20)), "", ("x",), "x")

    trial = True
    form = ruler.Form("t", draw, least=1, step=8, new_tokens=10)

    def encode(prompt, prefix):
        nonlocal trial
        if len(prompt.split()) >= 90:
            trial = False  # the search has looked at its largest size
        return prompt.split()

    (sample,) = ruler.samples(form, 1, 100, 0, encode)
    assert sample.length in range(100 - 8 + 1, 101) and sample.length == len(sample.prompt.split()) + 10


@pytest.mark.parametrize("length", [1024, 4096])
def test_an_essay_fills_its_length_also_where_samples_differ_in_tokens(length):
    """Needles of unequal length: with a token for every four characters no two samples are alike."""

    def fourths(prompt, prefix):
        return range(len(prompt + prefix) // 4)

    made = ruler.samples(niah.form("niah_multiquery", length, ESSAY), 12, length, 42, fourths)
    lengths = [sample.length for sample in made]
    assert len(set(lengths)) > 1 and max(lengths) <= length
    assert min(lengths) > length - (60 if length < ruler.SHORT else 900), "25 words, or 500"


@pytest.mark.parametrize("best", [3, 4, 7, 100, 1000])
def test_largest(best):
    assert ruler.largest(lambda n: n <= best, 3) == best
    assert ruler.largest(lambda n: False, 3) == 2


def test_inserted():
    assert ruler.inserted("abc", "XY", (1, 2)) == list("aXbYc")
    assert ruler.inserted("ab", "XY", (0, 0)) == list("XYab")
    assert ruler.inserted("ab", "X", (2,)) == list("abX")


def test_depths_are_40_evenly_spaced_percentages():
    assert len(ruler.DEPTHS) == 40 and ruler.DEPTHS[0] == 0 and ruler.DEPTHS[-1] == 100
    steps = {b - a for a, b in zip(ruler.DEPTHS, ruler.DEPTHS[1:], strict=False)}
    assert steps == {2, 3}


def test_a_short_essay_is_repeated():
    sentences = ruler.essay_sentences(["One", "two.", "Three!"], 7)
    assert sentences == ["One two.", "Three!", "One two.", "Three!", "One"]


def test_metric():
    assert ruler.share_found("it is ABC and 12", ("abc", "12", "13")) == pytest.approx(2 / 3)


def test_bad_text_files(tmp_path):
    with pytest.raises(ConfigError, match="none.txt.*no such file"):
        ruler.read_text(tmp_path / "none.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="a.txt.*UTF-8"):
        ruler.read_text(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(ConfigError, match="b.txt.*empty"):
        ruler.read_text(tmp_path / "b.txt")


# ---- needles

FORMS = {
    "words": r"[^\W\d]+(?:[-'][^\W\d]+)*-[^\W\d]+(?:[-'][^\W\d]+)*",
    "numbers": r"[1-9]\d{6}",
    "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
}


@pytest.mark.parametrize("name", niah.TASKS)
def test_needles(name):
    task = niah.TASKS[name]
    for sample in niah_samples(name):
        head, context, question = re.fullmatch(r"(.*?)\n(.*)\n(.*)", sample.prompt, re.DOTALL).groups()
        found = re.findall(rf"One of the special magic {task.value} for (\S+) is: (\S+)\.", context)
        assert all(re.fullmatch(FORMS[task.key], key) for key, _ in found)
        assert all(re.fullmatch(FORMS[task.value], value) for _, value in found)
        asked = re.search(r" for (.*) mentioned in the provided text", question)[1]
        keys = re.split(r",? and |, ", asked)
        assert len(keys) == task.queries
        assert sample.answers == tuple(
            v for k in keys for v in sorted((v for key, v in found if key == k), key=order(sample))
        )
        assert len(sample.answers) == task.queries * task.values
        distractors = len(found) - task.needles
        assert distractors == 0 if task.haystack != "needle" else distractors > 10
        assert len({value for _, value in found}) == len(found), "an answer would be ambiguous"
        assert sample.position == len(words(sample.prompt[: sample.prompt.index(needle_of(task, keys[0], sample))], ""))
        plural = task.queries * task.values > 1
        assert head.startswith("Some special magic" if plural else "A special magic ")
        assert question.startswith("What are all the" if plural else "What is the special magic ")
        assert sample.prefix.startswith(" The special magic ") and sample.prefix.endswith(" are" if plural else " is")
        kind = task.value if plural else task.value[:-1]
        assert f"quiz you about the {kind} afterwards." in head and f"magic {kind} for {asked} " in sample.prefix


def order(sample):
    return sample.answers.index


def needle_of(task, key, sample):
    return f"One of the special magic {task.value} for {key} is: {sample.answers[0]}."


def test_the_whole_text_of_one_sample():
    task = niah.Niah("noise")
    draft = niah.question(task, (), random.Random(0), 3)
    (key,) = re.findall(r"numbers for (\S+) is", draft.prompt)
    lines = draft.prompt.split("\n")
    assert lines.count(ruler.NOISE) == 3 and draft.first in lines[1:-1]
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert lines[-1] == f"What is the special magic number for {key} mentioned in the provided text?"
    assert draft.prefix == f" The special magic number for {key} mentioned in the provided text is"


def test_essay_needles_stand_between_sentences():
    sample = niah_samples("niah_multivalue", 1)[0]
    context = sample.prompt.split("\n")[1]
    without = re.sub(r" ?One of the special magic numbers for \S+ is: \d+\.", "", context).strip()
    assert " ".join(ESSAY).startswith(without)
    before = re.findall(r"(\S) One of the special", context)
    assert len(before) >= 3 and set(before) <= {".", "?"}, "one may stand at the very beginning"


@pytest.mark.parametrize("keys, text", [("a", "a"), ("ab", "a, and b"), ("abc", "a, b, and c")])
def test_query(keys, text):
    assert niah.enumerate_query(list(keys)) == text


def test_bad_tasks():
    with pytest.raises(ConfigError, match="task='niah_single_2': needs a text.*--data"):
        niah.form("niah_single_2", LENGTH)
    with pytest.raises(ConfigError, match="task='vt_essay': needs a text.*--data"):
        vt.form("vt_essay", LENGTH, words)
    with pytest.raises(ConfigError, match="task='nonsense'"):
        niah.form("nonsense", LENGTH)
    with pytest.raises(ConfigError, match="an essay takes 40 needles"):
        niah.Niah("essay", keys=41)
    with pytest.raises(ConfigError, match="worked example"):
        vt.form("vt", LENGTH, lambda prompt, prefix: prompt)  # a token for each character


# ---- variable tracking


def assigned(text):
    """name -> value, following the assignments in the order in which they stand."""
    values = {}
    for name, source in re.findall(r"VAR ([A-Z]+) = (?:VAR )?([A-Z]+|\d+)", text):
        values[name] = values[source] if source in values else int(source)
    return values


@pytest.mark.parametrize("name", vt.TASKS)
def test_variable_tracking(name):
    task = vt.TASKS[name]
    for sample in vt_samples(name):
        example, question = sample.prompt.split("Memorize and track")[1:]
        value = int(re.search(r"assigned the value (\d+) in the text above\.$", question)[1])
        values = assigned(question)
        assert len(values) == task.chains * (task.hops + 1) and set(map(len, values)) == {5}
        assert sample.answers == tuple(n for n, v in values.items() if v == value) and len(sample.answers) == 5
        assert len(set(values.values())) == task.chains and all(10_000 <= v < 99_999 for v in values.values())
        assert sample.prefix.endswith(f"5 variables are assigned the value {value}, they are: ")
        # The worked example, closed with its answers.
        shown = assigned(example.split("\nQuestion")[0])
        assert set(map(len, shown)) == {3}
        other = int(re.search(r"assigned the value (\d+) in the text above\.", example)[1])
        answer = " ".join(n for n, v in shown.items() if v == other)
        assert example.endswith(f"they are: {answer}\n") and len(words(example, "")) <= vt.EXAMPLE_TOKENS
        if task.haystack == "noise":
            assert re.search(r"VAR [A-Z]{5} = VAR [A-Z]{5} \n", question), "a copy ends in a space"


def test_the_example_changes_its_names_and_value_but_not_its_places():
    one, two = (s.prompt.split("Memorize and track")[1] for s in vt_samples("vt", 2))
    assert one != two and set(assigned(one)).isdisjoint(assigned(two))
    blank = [re.sub(r"\b(?:[A-Z]{3}|\d{5})\b(?! =)|[A-Z]{3}(?= =)", "_", text) for text in (one, two)]
    assert blank[0].replace("VAR", "_") == blank[1].replace("VAR", "_")


def test_two_chains_are_interleaved_in_order():
    chains = [vt.Chain(("AAAAA", "BBBBB", "CCCCC"), 11111), vt.Chain(("DDDDD", "EEEEE", "FFFFF"), 22222)]
    mixed = set()
    for seed in range(20):
        for task in (vt.Tracking("essay", 2, 2), vt.Tracking("noise", 2, 2)):
            text = vt.hide(task, ESSAY, chains, random.Random(seed), 30)
            names = re.findall(r"VAR ([A-F]{5}) = ", text)
            assert [n for n in names if n < "D"] == list(chains[0].names)
            assert [n for n in names if n >= "D"] == list(chains[1].names)
            mixed.add(tuple(names))
    assert len(mixed) > 10
    assert re.search(
        r"VAR EEEEE = VAR DDDDD\.(?: |$)", vt.hide(vt.Tracking("essay", 2, 2), ESSAY, chains, random.Random(0), 30)
    )


# ---- the mini model's stand-ins


def test_mini_copy_asks_for_the_value_last_mentioned_longest_ago():
    tokenizer = mini.build_tokenizer()
    vocabulary = tokenizer.get_vocab()

    def encode(prompt, prefix):
        return tokenizer.encode(prompt + prefix).ids

    problems = mini_recall.mini_problems(12)
    for problem, sample in zip(problems, mini_recall.samples("mini_copy", 12, encode), strict=True):
        whole = problem.problem + problem.solution
        given = sample.prompt + sample.prefix
        assert whole.startswith(given + sample.answers[0]) and mini.UNK not in encode(given, "")
        assert encode(given, "")[-1] == vocabulary[" = "], "the answer begins a new token"
        name = sample.prefix.split()[-2]
        assert mini_recall.values_of(problem)[name] == sample.answers[0]
        back = len(given) - sample.prompt.rindex(f"{name} = {sample.answers[0]}")
        copies = [(m.start(), m[0]) for m in re.finditer(r"[a-z] = \d{3}(?=[,;] )", whole[len(problem.problem) :])]
        start = len(problem.problem)
        others = [start + at + 4 - whole.rindex(text, 0, start + at) for at, text in copies]
        assert back == max(others)
        assert len(encode(sample.prompt, "")) > sample.position


def test_mini_chain_looks_for_every_computed_value():
    encode = mini.build_tokenizer().encode
    samples = mini_recall.samples("mini_chain", 5, lambda prompt, prefix: encode(prompt + prefix).ids)
    for problem, sample in zip(mini_recall.mini_problems(5), samples, strict=True):
        assert sample.prompt == problem.problem and len(sample.answers) in (7, 8)
        assert ruler.share_found(problem.solution, sample.answers) == 1
        lines = problem.solution.split("\n")
        assert ruler.share_found("\n".join(lines[:3]), sample.answers) == 3 / len(sample.answers)
