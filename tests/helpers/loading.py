"""What the tests of loading share: parameters compared bit for bit, and the peak memory of a load."""

import numpy as np
from flax import traverse_util


def assert_same_bits(one, other):
    one, other = traverse_util.flatten_dict(one), traverse_util.flatten_dict(other)
    assert one.keys() == other.keys()
    for path, value in one.items():
        assert value.dtype == other[path].dtype and value.shape == other[path].shape, path
        assert np.asarray(value).tobytes() == np.asarray(other[path]).tobytes(), path


# Run as `python -c MEMORY SMALL BIG DTYPE`; prints the bytes of BIG's parameters, and the peak over them.
MEMORY = """
import gc, json, sys
import jax
import dms_jax

def rss(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

small, big, dtype = sys.argv[1:]
dms_jax.load(small, dtype=dtype, tokenizer=object())  # imports and one-time set-up
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # peak := now
before = rss("VmRSS")
lm = dms_jax.load(big, dtype=dtype, tokenizer=object())
size = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
print(json.dumps({"size": size, "ratio": (rss("VmHWM") - before) / size}))
"""
