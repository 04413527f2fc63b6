"""Runs in the sandbox, on the standard library alone: opens private tests, a pickle that could run anything.

The standard input holds base64 of zlib of a pickle of JSON; the standard output gets the JSON.
"""

import base64
import pickle
import sys
import zlib

sys.stdout.write(pickle.loads(zlib.decompress(base64.b64decode(sys.stdin.read()))))
