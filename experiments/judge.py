"""The judge of mathematical answers: what a chain answered, and whether it is right.

A chain answers in its last `\\boxed{...}`; a chain without one is wrong. Plain integers are compared here. All other
answers go to `experiments.judge_worker` in processes of their own, whose memory and time are limited: an answer that
takes more of either is compared as a text, and its process is replaced. So no text hangs a run or ends it.
"""

import atexit
import functools
import json
import queue
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from experiments.judge_text import answer_box, integer, plain, readings

SECONDS = 10.0  # for one answer
MEMORY = 2 << 30  # bytes of a worker
WORKERS = 2
NOTHING = ("", "nan", "none", "null", "n/a")  # what a missing answer becomes as a text
LONGEST = 10_000  # characters of an answer that is read as mathematics
ROOT = Path(__file__).resolve().parents[1]


class JudgeError(RuntimeError):
    """The judge's process does not start; the message says why."""


class Verdict(NamedTuple):
    """What a chain answered, in a form in which equal answers are equal strings, and whether it is right."""

    answer: str | None
    correct: bool


class _Worker:
    """A running `experiments.judge_worker`."""

    def __init__(self, seconds: float, memory: int):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.judge_worker", str(seconds), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            text=True,
            start_new_session=True,  # Ctrl-C ends a run, not the verdict on a chain that is still saved
        )
        if self.process.stdout.readline() != "ready\n":
            said = self.process.stderr.read().strip().splitlines()
            self.close()
            reason = said[-1] if said else "it said nothing"
            hint = ": pip install 'dms_jax[experiments]'" if "math_verify" in reason else ""
            raise JudgeError(f"the judge does not start ({reason}){hint}")

    def ask(self, request: dict) -> dict | None:
        """The reply; None if the process ended over the request."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            return None
        return json.loads(line) if line.endswith("\n") else None

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Judge:
    """Some workers, started when they are first needed; threads may ask at the same time."""

    def __init__(self, workers: int = WORKERS, seconds: float = SECONDS, memory: int = MEMORY):
        self.limits = (seconds, memory)
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)

    def verdict(self, text: str, gold: str) -> Verdict:
        """The verdict on a chain's text, given the right answer (a number or LaTeX)."""
        box = answer_box(text)
        return Verdict(None, False) if box is None else self.compare(box, gold)

    def compare(self, box: str, gold: str) -> Verdict:
        """The verdict on the content of a box."""
        given, right = readings(box), readings(gold)[0]
        numbers = integer(given[0]), integer(right)
        if None not in numbers:
            return Verdict(numbers[0], numbers[0] == numbers[1])
        return self.verify(given, right)

    def verify(self, given: list[str], right: str) -> Verdict:
        """What math-verify says; where it says nothing, equal texts are equal answers."""
        reply = self._ask({"gold": right, "readings": given}) if len(given[0]) <= LONGEST else None
        if reply and "error" not in reply:
            return Verdict(reply["answer"], reply["correct"])
        return Verdict(plain(given[0]), plain(given[0]) == plain(right))

    def readable(self, gold: str) -> bool:
        """Whether a right answer can be read, so that a chain can be right."""
        answer = readings(gold)[0]
        if answer.lower() in NOTHING or integer(answer) is not None:
            return answer.lower() not in NOTHING
        reply = self._ask({"gold": answer}) if len(answer) <= LONGEST else None
        return bool(reply and reply.get("answer"))

    def _ask(self, request: dict) -> dict | None:
        worker, reply = self._idle.get(), None
        try:
            worker = worker or _Worker(*self.limits)
            reply = worker.ask(request)
        finally:
            if worker and reply is None:
                worker.close()
            self._idle.put(worker if reply else None)
        return reply

    def close(self) -> None:
        """Ends the processes; the next question starts new ones."""
        for _ in range(self._idle.qsize()):
            if worker := self._idle.get():
                worker.close()
            self._idle.put(None)


@functools.cache
def shared() -> Judge:
    """The judge of this process, which ends with it."""
    judge = Judge()
    atexit.register(judge.close)
    return judge


def judge(text: str, gold: str) -> Verdict:
    """The verdict of the shared judge."""
    return shared().verdict(text, gold)
