"""Runs in the sandbox, on the standard library alone: a program on inputs, one process for each.

The standard input holds {"code", "inputs", "function", "seconds"}, the standard output gets a list of [status, output]:
how each process ended, and what it printed or, where a function is named, what that returned, as JSON. It ends with
the first that fails. The right outputs are not here: they are compared outside.
"""

import json
import subprocess
import sys

# Names that solutions on contest sites use without importing them; builtins last, which some modules hide.
PRELUDE = """
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
from typing import *
from collections import *
from copy import *
from functools import *
from heapq import *
from itertools import *
from math import *
from bisect import *
from string import *
from builtins import *
sys.setrecursionlimit(50_000)
"""
CALL = """
import json, os, sys
answer = os.dup(1)
os.dup2(2, 1)
job = json.load(sys.stdin)
space = {"__name__": "solution"}
exec(compile(job["code"], "solution.py", "exec"), space)
owner = space["Solution"]() if "Solution" in space else None
function = getattr(owner, job["function"]) if owner is not None else space[job["function"]]
value = function(*(json.loads(line) for line in job["input"].splitlines() if line.strip()))
with os.fdopen(answer, "w") as file:
    json.dump(value, file)
"""


def run(task: dict, given: str) -> list:
    """How the program ends on one input."""
    if task["function"]:
        job = {"code": PRELUDE + task["code"], "function": task["function"], "input": given}
        program, given = CALL, json.dumps(job)
    else:
        program = PRELUDE + task["code"]
    with open("main.py", "w") as file:
        file.write(program)
    with open("output", "w+b") as output, open("errors", "w+b") as errors:
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-B", "main.py"],
                input=given.encode(), stdout=output, stderr=errors, timeout=task["seconds"], check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return ["timeout", ""]
        output.seek(0)
        errors.seek(0)
        if done.returncode:
            lines = errors.read().decode("utf-8", "replace").strip().splitlines()
            return [lines[-1].split(":")[0][:100] if lines else f"exit status {done.returncode}", ""]
        return ["ok", output.read().decode("utf-8", "replace")]


task = json.load(sys.stdin)
results = []
for given in task["inputs"]:
    results.append(run(task, given))
    if results[-1][0] != "ok":
        break
json.dump(results, sys.stdout)
