"""Recall in the mini model's own vocabulary, which knows no English: its chains of arithmetic are the haystack.

mini_copy, for a needle in a haystack: prompt and chain are given up to the point where a value must be copied
that was written long ago; everything since, mostly digit scratch, is the haystack. Of each problem the copy that
reaches back furthest is asked for. The model writes three digits.

    ... f = 7 * x: x = 330; 7 * 330 = 310; f = 310.          q = 482 was set in the first line of the prompt
    b = f + q: f = 310, q =                                  -> 482

mini_chain, for variable tracking: the model can name no variables that share a value, since its only form is its
own task. So it solves that, which is tracking each variable through the program, and the answers looked for are the
right values of all computed variables as the chain must state them, `f = 310.`
"""

from experiments.tasks import mini
from experiments.tasks.aime import mini_problems
from experiments.tasks.ruler import Draft, Encode, Sample

NEW_TOKENS = {"mini_copy": 3, "mini_chain": 448}


def values_of(problem: mini.Problem) -> dict[str, str]:
    """The value that each variable is given: the givens from the prompt, the others from the ends of the lines."""
    givens = problem.problem.removeprefix("Let ").split(". ")[0].split(", ")
    ends = [line.rsplit("; ", 1)[1].removesuffix(".") for line in _lines(problem)]
    return dict(pair.split(" = ") for pair in (*givens, *ends))


def _lines(problem: mini.Problem) -> list[str]:
    """The chain's lines without the last, which gives the answer."""
    return problem.solution.split("\n")[:-1]


def furthest_copy(problem: mini.Problem) -> Draft:
    """The question for the copied value whose last mention lies furthest back, in characters."""
    best, furthest, written = None, -1, problem.problem
    for line in _lines(problem):
        head, rest = line.split(": ", 1)
        done = f"{head}: "
        for copy in rest.split("; ", 1)[0].split(", "):
            name, value = copy.split(" = ")
            distance = len(written) + len(done) - written.rindex(copy)
            if distance > furthest:
                best, furthest = Draft(written, f"{done}{name} = ", (value,), copy), distance
            done += f"{copy}, "
        written += f"{line}\n"
    return best


def whole_chain(problem: mini.Problem) -> Draft:
    """The problem itself; every computed variable's value is an answer."""
    values = values_of(problem)
    computed = [line.split(" = ", 1)[0] for line in _lines(problem)]
    answers = tuple(f"{name} = {values[name]}." for name in computed)
    return Draft(problem.problem, "", answers, problem.problem)


DRAFTS = {"mini_copy": furthest_copy, "mini_chain": whole_chain}


def samples(name: str, count: int, encode: Encode) -> list[Sample]:
    """The first `count` held-out problems of the main job, as questions of the task `name`."""
    made = []
    for number, problem in enumerate(mini_problems(count)):
        draft = DRAFTS[name](problem)
        tokens = len(encode(draft.prompt, draft.prefix)) + NEW_TOKENS[name]
        position = len(encode(draft.prompt[: draft.prompt.rindex(draft.first)], ""))
        made.append(Sample(f"{name}-{number}", draft.prompt, draft.prefix, draft.answers, position, tokens))
    return made
