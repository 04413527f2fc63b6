"""Run in a process of its own by test_engine.py: the same chains on meshes of virtual CPU devices. Prints JSON."""

import dataclasses
import json
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax  # noqa: E402

from dms_jax.config import DMSConfig  # noqa: E402
from dms_jax.inference import generation  # noqa: E402
from dms_jax.inference.scheduler import EngineConfig  # noqa: E402
from dms_jax.policies import KeyDiff  # noqa: E402
from tests.helpers.models import random_lm, tiny  # noqa: E402

PROMPTS = [[5, 6, 7], [1], [9] * 12, [4, 8], [2] * 20]


def main() -> None:
    lm = random_lm(tiny(), DMSConfig(window=3, scale=3.0, logit_bias=0.3, gate="adapter"))
    lm = dataclasses.replace(lm, cr=2.0)
    out = {}
    for policy, mesh in (("dms", (2, 2)), (KeyDiff(8, evict_every=4), (1, 2))):
        runs = out[str(policy)] = {}
        for devices, pages in ((None, 400), (mesh, 20)):  # those of a mesh grow
            result = generation.generate(
                lm, PROMPTS, 16, policy=policy, temperature=1.0, chains=2, seed=4, stop=[3, 11, 30], page_size=4,
                devices=devices, engine=EngineConfig(max_num_seqs=3, steps=8, pages=pages),
            )  # fmt: skip
            runs[str(devices)] = {"tokens": result.tokens, "reads": result.kv_reads.tolist()}
    print(json.dumps({"devices": len(jax.devices()), "runs": out}))


if __name__ == "__main__":
    main()
