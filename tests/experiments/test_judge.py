"""The judge: which answer is read, which answers are equal, and that no text hangs or ends it."""

import itertools
import resource
import subprocess
import sys
import time
from fractions import Fraction

import pytest

from experiments import judge as judging
from experiments.judge import Judge, judge
from experiments.judge_text import answer_box, boxes, clean, integer
from experiments.tasks import mini


@pytest.mark.parametrize(
    "text, gold, answer, correct",
    [
        (r"so \boxed{007}", "7", "7", True),
        (r"so \boxed{7}", "007", "7", True),
        (r"\boxed{1}, no: \boxed{ 73 }.", "73", "73", True),
        (r"\boxed{73}, no: \boxed{1}", "73", "1", False),
        (r"\boxed{\frac{14}{2}}", "7", "7", True),
        (r"\boxed{x = 73}", "73", "73", True),
        (r"\boxed{1,000}", "1000", "1000", True),
        (r"\boxed{\sqrt{2}}", r"\sqrt{2}", "sqrt(2)", True),
        (r"\boxed{no idea", "73", None, False),
        (r"\boxed{}", "73", None, False),
        ("the answer is 73", "73", None, False),
        ("put it into \\boxed, please", "73", None, False),
        (r"first \boxed{73}, then \boxed{ } and \boxed{7", "73", "73", True),
        (r"\boxed 7", "7", "7", True),
        (r"\boxed \frac12", "0.5", "1/2", True),
        (r"\boxed{25.}", "25", "25", True),
        (r"\boxed{25 \pmod{1000}}", "25", "25", True),
        (r"\boxed{25 \ (\text{mod } 1000)}", "25", "25", True),
        (r"\boxed{1\,000}", "1000", "1000", True),
        (r"\boxed{10{,}080}", "10080", "10080", True),
        (r"\boxed{\textbf{(C) } 25}", "25", "25", True),
        (r"\boxed{(C) 25}", "24", "25", False),
        (r"\boxed{\textbf{(C) } 25}", r"\text{(C)}", "c", True),
        (r"\boxed{\boxed{7}}", "7", "7", True),
        (r"\boxed{\{1,2\}}", "1,2", "{1, 2}", True),
        (r"\boxed{\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}}", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}",
         "Matrix([[1/5], [-18/5]])", True),
        (r"\boxed{(b+2)(a+5)}", "(a+5)(b+2)", "a*b + 2*a + 5*b + 10", True),
        (r"\boxed{90^\circ}", "90", "90", True),
        (r"\boxed{-0}", "0", "0", True),
        (r"\boxed{1}", "-1", "1", False),
        (r"\boxed{\,}", "1", None, False),
        (r"first \boxed{1}, then \boxed{$$}", "1", "1", True),
    ],
)  # fmt: skip
def test_verdicts(text, gold, answer, correct):
    assert judge(text, gold) == (answer, correct)


FORMS = {
    "integer": (r"{n}", r"{n}.", r"{n}.0", r"{n:,}", r"\frac{{{d}}}{{2}}", r"x = {n}", r"${n}$", r"{n} \pmod{{9999}}"),
    "share": (r"\frac{{{a}}}{{{b}}}", r"\dfrac{{{a}}}{{{b}}}", r"{a}/{b}", r"{f}", r"{p}\%", r"\frac{{{a2}}}{{{b2}}}"),
    "root": (r"{k}\sqrt{{{m}}}", r"\sqrt{{{q}}}", r"\sqrt{{{m}}} \cdot {k}", r"\frac{{{km}}}{{\sqrt{{{m}}}}}"),
}


def forms(kind: str, rng) -> list[str]:
    """One value, written in all the ways of its kind."""
    n = int(rng.integers(1001, 10**6))
    b = int(rng.choice([2, 4, 5, 8, 20, 25]))
    a = int(rng.integers(1, 4 * b))
    k, m = int(rng.integers(2, 30)), int(rng.choice([2, 3, 5, 7, 11, 13]))
    share = Fraction(a, b)
    decimal, percent = (f"{float(x):.6f}".rstrip("0").rstrip(".") for x in (share, 100 * share))
    values = {
        "n": n, "d": 2 * n, "a": a, "b": b, "a2": 3 * a, "b2": 3 * b, "f": decimal, "p": percent,
        "k": k, "m": m, "q": k * k * m, "km": k * m,
    }  # fmt: skip
    return [form.format(**values) for form in FORMS[kind]]


@pytest.mark.parametrize("kind", FORMS)
def test_a_value_is_one_answer_whatever_its_form(kind, rng):
    for _ in range(10):
        written = forms(kind, rng)
        right = [judge(rf"so \boxed{{{form}}}", gold) for form, gold in itertools.product(written, written)]
        assert {v.correct for v in right} == {True}, written
        for gold in written:  # the right ones of a vote are one answer
            assert len({judge(rf"\boxed{{{form}}}", gold).answer for form in written}) == 1, written
        wrong = [judge(rf"\boxed{{{form}}}", "-77777") for form in written]
        assert {v.correct for v in wrong} == {False} and len({v.answer for v in wrong}) == 1, (written, wrong)


def test_the_forms_that_split_votes_before():
    for same in (("25", "25.0", "5^2"), (r"\frac12", "0.5", r"50\%"), (r"\sqrt8", r"2\sqrt2")):
        for gold in (*same, "-3"):
            assert len({judge(rf"\boxed{{{form}}}", gold).answer for form in same}) == 1


@pytest.mark.parametrize(
    "box, gold, right",
    [
        ("0<x<2", "1<x<2", False), ("2 > x > 1", "1<x<2", True), ("(0,2)", "1<x<2", False), ("(1,2)", "1<x<2", True),
        ("x - y = 0", "2x - y + 3 = 0", False), ("0", "2x - y + 3 = 0", False), ("y = 2x+3", "2x - y + 3 = 0", True),
        ("4x - 2y + 6 = 0", "2x - y + 3 = 0", True), ("x - y = 5", "x + y = 5", False), ("x+1 = 5", "5", True),
        ("x^2 = 0", "x = 0", False), ("5 < x < \\infty", "5 < x", True),
        ("x = y = 3", "3", True), ("2 + 3 = 5", "5", True), ("f(x) = x+1", "1+x", True),
    ],
)  # fmt: skip
def test_of_a_relation_no_side_is_the_answer(box, gold, right):
    """Only what a name or a number comes to is: a right side of 0 is that of many equations."""
    given, gold_itself = judge(rf"\boxed{{{box}}}", gold), judge(rf"\boxed{{{gold}}}", gold)
    assert given.correct == right and gold_itself.correct and (given.answer == gold_itself.answer) == right


def test_votes_for_one_relation_are_one_answer():
    for same in (("0.5<x", r"x > \frac12"), ("1 < x < 2", "2 > x > 1"), ("2+3 = 5", "5", "x = 5")):
        assert len({judge(rf"\boxed{{{form}}}", "-77777").answer for form in same}) == 1


@pytest.mark.parametrize(
    "box, gold",
    [("1/2^{99}", "1/2^{98}"), ("0.00000001", "0.00000002"), ("10^{-12}", "0"), ("0.000067", ".0000672"),
     (r"\sqrt{2} \cdot 10^{-20}", r"\sqrt{3} \cdot 10^{-20}"), ("3.14159", r"\pi"), ("-\\infty", "\\infty")],
)  # fmt: skip
def test_near_values_are_not_equal(box, gold):
    assert not judge(rf"\boxed{{{box}}}", gold).correct and not judge(rf"\boxed{{{gold}}}", box).correct
    assert judge(rf"\boxed{{{box}}}", box).correct and judge(rf"\boxed{{{gold}}}", gold).correct


def test_rounded_decimals_are_the_number():
    assert judge(r"\boxed{0.333333}", "1/3").correct and not judge(r"\boxed{0.3333}", "1/3").correct
    assert judge(r"\boxed{3.141593}", r"\pi").correct


def test_plain_integers_are_judged_as_math_verify_does():
    numbers = ["0", "00", "000", "7", "007", "70", "073", "73", "100", "999", "0999", "1000", "7.", "7.0", "1,000"]
    for box, gold in itertools.product(numbers, repeat=2):
        assert judging.shared().compare(box, gold) == judging.shared().verify([clean(box)], clean(gold)), (box, gold)


def test_the_right_chain_of_the_mini_task_is_judged_right():
    problem = next(mini.problems("test", 0))
    assert judge(problem.solution, problem.answer) == (str(int(problem.answer)), True)


# ---- what counts


@pytest.mark.parametrize(
    "text, box",
    [
        ("It is \\boxed{5}.\n\nProblem: What is 4 + 5?\nSolution: \\boxed{9}", "5"),
        ("\\boxed{5}\n**Problem 2:** more\n\\boxed{9}", "5"),
        ("\\boxed{5}\nQ: more\nA: \\boxed{9}", "5"),
        ("\\boxed{5}\nHuman: thanks\n\\boxed{9}", "5"),
        ("Problem: what they ask is \\boxed{5}, no, \\boxed{9}", "9"),  # before any answer: the problem stated again
        ("\\boxed{5}. The problem is hard: \\boxed{9}", "9"),
        ("<think>\\boxed{5}\nProblem: again\n\\boxed{6}</think>It is \\boxed{7}.\nQuestion: \\boxed{8}", "7"),
        ("<think>\\boxed{5}\nProblem: again\n\\boxed{6}</think>", "6"),
    ],
)
def test_what_follows_the_answer_does_not_count(text, box):
    assert answer_box(text) == box


def test_boxes_are_found_in_order():
    text = r"\boxed{1} \boxed{\frac{1}{2}} \boxed{} \boxed 3 \\boxed{4} \boxed{a \{ b} } \boxed{5"
    assert [box.content for box in boxes(text)] == ["1", r"\frac{1}{2}", "3", "4", r"a \{ b"]
    assert all(text[box.start] == "\\" for box in boxes(text))


def test_integers_of_any_length():
    digits = "7" * 5_000
    assert integer(digits) == digits and integer(f"-00{digits}.00") == f"-{digits}" and integer("7.5") is None
    assert judge(rf"\boxed{{{digits}}}", "7") == (digits, False)
    assert judge(rf"\boxed{{{digits}}}", digits) == (digits, True)
    assert not judge(rf"\boxed{{{digits} + 1}}", digits).correct
    assert judge(rf"\boxed{{{digits} + 0}}", digits).correct


# ---- limits

LONG = [
    "\\boxed{" * 50_000,
    "\\boxed{" * 5_000 + "1" + "}" * 5_000,
    "\\boxed{1}" + "\n> " * 100_000,
    "\\boxed{" + " " * 300_000 + "}",
    "\\boxed{" + "(mod " * 50_000 + "}",
    "\\boxed{" + "1," * 100_000 + "x}",
    "```\n" * 50_000,
]


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_long_texts_take_little_time(text):
    begun = time.monotonic()
    judge(text, "7")
    assert time.monotonic() - begun < 5


def test_what_takes_too_long_is_compared_as_a_text():
    impatient = Judge(workers=1, seconds=1.0)
    begun = time.monotonic()
    assert impatient.verdict(r"\boxed{2^{2^{100}}}", "7") == ("2^{2^{100}}", False)
    assert impatient.verdict(r"\boxed{9!!!!!!}", "9!!!!!!") == ("9!!!!!!", True)
    assert time.monotonic() - begun < 60
    assert impatient.verdict(r"\boxed{\frac{14}{2}}", "7") == ("7", True), "the next is judged by a new process"
    impatient.close()
    assert impatient.verdict(r"\boxed{\frac{14}{2}}", "7") == ("7", True), "also after closing"
    impatient.close()


def test_ctrl_c_does_not_change_a_verdict():
    """A terminal sends it to the whole process group; a chain that is being judged then is saved."""
    program = (
        "import os, signal, time; from experiments.judge import judge;"
        r"judge(r'\boxed{\frac{14}{2}}', '7'); signal.signal(signal.SIGINT, signal.SIG_IGN);"
        r"os.killpg(0, signal.SIGINT); time.sleep(0.5); print(judge(r'\boxed{\frac{14}{2}}', '7').correct)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, cwd=judging.ROOT, start_new_session=True
    )
    assert done.stdout == b"True\n", done.stderr


def test_memory_is_limited():
    worker = judging._Worker(seconds=10.0, memory=1 << 30)
    assert resource.prlimit(worker.process.pid, resource.RLIMIT_AS) == (1 << 30, 1 << 30)
    worker.close()


def test_odd_characters_and_random_texts(rng):
    pieces = ["\\frac", "{", "}", "\\sqrt", "^", "_", "7", "x", "\\boxed{", "\x00", "\ud800", "\\\\", *"%&(),"]
    for _ in range(40):
        text = "".join(rng.choice(pieces) for _ in range(rng.integers(1, 12)))
        verdict = judge(f"\\boxed{{{text}}}", "12345")
        assert not verdict.correct


def test_threads_share_the_workers():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: judge(rf"\boxed{{\frac{{{2 * n}}}{{2}}}}", str(n)), range(64)))
    assert found == [(str(n), True) for n in range(64)]


def test_a_worker_that_does_not_start_says_why(monkeypatch):
    monkeypatch.setattr(judging, "ROOT", "/")
    with pytest.raises(judging.JudgeError, match="does not start .*experiments"):
        Judge(1).verdict(r"\boxed{\frac12}", "1")


@pytest.mark.parametrize("gold", ["NaN", "None", "null", "", " ", "#### 7", "@@", "inf 7 ("])
def test_unreadable_answers(gold):
    assert not judging.shared().readable(gold)


@pytest.mark.parametrize("gold", ["7", "-7", "1,000", r"\frac{3}{4}", r"\text{east}", r"(2,\infty)", "9" * 5_000])
def test_readable_answers(gold):
    assert judging.shared().readable(gold)
