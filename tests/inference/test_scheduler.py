"""The scheduler alone, without JAX: what is read, started and preempted, in numbers of tokens."""

import numpy as np
import pytest

from dms_jax.config import ConfigError
from dms_jax.inference.scheduler import Chain, EngineConfig, Job, PoolError, Scheduler

HEADS = (2, 3)


def job(length: int, chains: int = 1, max_new: int = 8, name=None) -> Job:
    return Job([1] * length, np.zeros((chains, 2), np.uint32), max_new, name)


def scheduler(jobs, **options) -> Scheduler:
    return Scheduler(jobs, EngineConfig(**{"max_num_seqs": 4, "steps": 2, **options}), 1024, HEADS)


def read(made: Scheduler) -> list:
    batch = made.next_prompts()
    for row, prompt in batch:
        made.prompt_read(row, prompt)
    return batch


def start(made: Scheduler) -> list:
    copies = made.next_copies()
    made.chains_started(copies)
    return copies


def test_prompts_of_one_bucket_are_read_together_and_copied_to_rows_in_order():
    made = scheduler([job(9), job(60), job(70), job(5)])
    first = read(made)
    assert [len(prompt.job.prompt) for _, prompt in first] == [9, 60], "70 is of another bucket"
    copies = start(made)
    assert [(copy.target, copy.moved) for copy in copies] == [(0, True), (1, True)]
    assert [len(prompt.job.prompt) for _, prompt in read(made)] == [70]
    assert [copy.target for copy in start(made)] == [2]
    assert (made.live[:3, 0, 0] == [9, 60, 70]).all() and made.live.shape == (len(made.rows), *HEADS)


def test_a_prompt_is_read_once_for_all_its_chains():
    made = scheduler([job(9, chains=6), job(9)])
    assert len(read(made)) == 1, "four rows are free, and the first prompt fills them"
    assert [copy.moved for copy in start(made)] == [False] * 4
    assert not read(made) and not start(made)
    made.released([1, 2])
    assert [(copy.number, copy.target, copy.moved) for copy in start(made)] == [(4, 1, False), (5, 2, True)]


def test_prefill_tokens_bound_a_batch():
    made = scheduler([job(60) for _ in range(9)], max_num_seqs=8, prefill_tokens=192, prefill_chunk=64)
    assert len(read(made)) == 3


def test_jobs_come_from_a_generator_as_rows_become_free():
    asked = []

    def jobs():
        for n in range(50):
            asked.append(n)
            yield job(5, name=n)

    made = scheduler(jobs())
    for _ in range(2):
        read(made)
        start(made)
    assert len(made.running) == 4 and len(asked) <= 6


def test_what_does_not_fit_waits_and_the_youngest_is_preempted():
    made = scheduler([job(9), job(9), job(9)])
    read(made)
    start(made)
    made.fits = lambda live: False
    assert made.make_room([0], stuck=False) is None, "others still move"
    victim = made.make_room([0], stuck=True)
    assert victim == 2 and isinstance(made.rows[victim], Chain)
    made.released([victim])
    assert not made.next_prompts(), "it waits until another chain ends"
    made.resume()
    assert [prompt.waiting for _, prompt in made.next_prompts()] == [[0]]


def test_a_sequence_that_can_never_fit_raises_its_length():
    made = scheduler([job(9, max_new=7)])
    read(made)
    start(made)
    made.fits = lambda live: False
    with pytest.raises(PoolError, match="16"):
        made.make_room([0], stuck=True)


def test_without_room_for_copies_one_chain_goes_on_alone():
    made = scheduler([job(9, chains=3)])
    read(made)
    made.fits = lambda live: False
    assert [(copy.number, copy.moved) for copy in start(made)] == [(0, True)]
    assert made.parked == [] and not made.idle()


def test_a_job_longer_than_the_cache_is_refused():
    with pytest.raises(ConfigError, match="capacity=1024: a job may make 1108 tokens"):
        scheduler([job(1100)])
