"""Batches addressed by step."""

import numpy as np
import pytest

from dms_jax.data import Batch, batch_at


def pool(n: int) -> Batch:
    """Row r holds r in every field, so that fields that were shuffled apart show."""
    rows = np.arange(n)
    return Batch(np.repeat(rows[:, None], 3, 1).astype(np.uint8), rows + 100, rows + 200)


def rows_of(batch: Batch) -> list[int]:
    assert batch.tokens.dtype == batch.lengths.dtype == batch.prompt_lengths.dtype == np.int32
    first = batch.tokens[:, 0]
    np.testing.assert_array_equal(batch.tokens, np.repeat(first[:, None], 3, 1))
    np.testing.assert_array_equal(batch.prompt_lengths, first + 100)
    np.testing.assert_array_equal(batch.lengths, first + 200)
    return first.tolist()


def epoch(n, size, number, seed=0):
    steps = range(number * (n // size), (number + 1) * (n // size))
    return [row for step in steps for row in rows_of(batch_at(pool(n), step, size, seed))]


def test_every_epoch_is_a_permutation_of_its_own():
    epochs = [epoch(12, 4, number) for number in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(12)) != order
    assert epochs[0] != epochs[1] != epochs[2]
    assert epoch(12, 4, 0, seed=1) != epochs[0]


def test_a_remainder_is_left_out_of_its_epoch_only():
    epochs = [epoch(14, 4, number) for number in range(20)]
    for order in epochs:
        assert len(order) == len(set(order)) == 12
    assert set().union(*epochs) == set(range(14))


def test_a_batch_is_a_function_of_its_step():
    """Asked for in any order, as by a resumed run."""
    whole = [rows_of(batch_at(pool(9), step, 2, 5)) for step in range(10)]
    for step in (9, 3, 3, 0):
        assert rows_of(batch_at(pool(9), step, 2, 5)) == whole[step]


def test_too_small_a_pool():
    with pytest.raises(ValueError, match=r"batch_size=5: the pool holds only 4 sequences"):
        batch_at(pool(4), 0, 5, 0)
    assert sorted(rows_of(batch_at(pool(4), 7, 4, 0))) == [0, 1, 2, 3]
