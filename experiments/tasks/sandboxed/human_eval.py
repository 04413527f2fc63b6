"""Runs in the sandbox, on the standard library alone: a program, then the function that checks it.

The standard input holds {"code", "test", "entry_point", "token"}. The token is printed last, once all has passed: a
program that ends the process early has not said it.
"""

import json
import os
import sys

task = json.load(sys.stdin)
namespace = {"__name__": "solution"}
exec(compile(task["code"], "solution.py", "exec"), namespace)
exec(compile(task["test"], "test.py", "exec"), namespace)
namespace["check"](namespace[task["entry_point"]])
sys.stdout.flush()
os.write(1, f"\n{task['token']}".encode())
os._exit(0)
