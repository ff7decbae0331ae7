"""Joining what towers returned: each rule against NumPy."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from parallel_keras import merge, shard
from parallel_keras.shard import Shards

SHARDS = shard.shard(np.arange(5), 2)  # 3 and 2 rows
STAND_IN = Shards([None] * 3, [tf.constant(1), tf.constant(1), tf.constant(0)], tf.constant(2))


def test_scalars_are_means_by_rows() -> None:
    merged = merge.outputs([tf.constant(1.0), tf.constant(6.0)], SHARDS)
    assert merged.shape == ()
    assert float(merged) == pytest.approx((3 * 1 + 2 * 6) / 5)
    assert (
        float(merge.outputs([tf.constant(1.0), tf.constant(6.0)], SHARDS, {"output": "sum"})) == 7
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int32"])
def test_dtype_is_kept(dtype: str) -> None:
    merged = merge.outputs([tf.cast(5, dtype), tf.cast(10, dtype)], SHARDS)
    assert merged.dtype == dtype
    assert float(merged) == 7


def test_a_stand_in_counts_for_nothing() -> None:
    spec = [tf.TensorSpec([None, 1])] * 3
    join = tf.function(lambda *parts: merge.outputs(parts, STAND_IN), input_signature=spec)
    merged = join(*[tf.constant([[value]]) for value in (1.0, 2.0, np.nan)])
    np.testing.assert_array_equal(merged, [[1], [2]])
    scalars = [tf.constant(1.0), tf.constant(3.0), tf.constant(np.nan)]
    assert float(merge.outputs(scalars, STAND_IN)) == 2
    assert float(merge.live_sum(scalars, STAND_IN.shares())) == 4
    counts = [tf.constant(11), tf.constant(12), tf.constant(99)]
    assert int(merge.increments(tf.constant(10), counts, STAND_IN.shares())) == 13


def test_structure_comes_from_the_first_part() -> None:
    parts = [
        {"a": tf.constant([1, 2, 3]), "b": (None, "x")},
        {"a": tf.constant([4, 5]), "b": (None, "x")},
    ]
    merged = merge.outputs(parts, SHARDS)
    np.testing.assert_array_equal(merged["a"], [1, 2, 3, 4, 5])
    assert merged["b"] == (None, "x")


def test_pad_and_whole() -> None:
    parts = [
        {"a": tf.ones((3, 2)), "b": tf.constant([7, 8])},
        {"a": tf.ones((2, 4)), "b": tf.constant([7, 8])},
    ]
    merged = merge.outputs(parts, SHARDS, {"a": "pad", "b": "whole"})
    expected = np.zeros((5, 4))
    expected[:3, :2] = 1
    expected[3:] = 1
    np.testing.assert_array_equal(merged["a"], expected)
    np.testing.assert_array_equal(merged["b"], [7, 8])


def test_other_sizes_are_refused_by_name() -> None:
    parts = [{"boxes": tf.ones((3, 2))}, {"boxes": tf.ones((2, 4))}]
    with pytest.raises(ValueError, match=r"output boxes .*shapes=\[\(3, 2\), \(2, 4\)\].*pad"):
        merge.outputs(parts, SHARDS)


def test_other_sizes_are_refused_by_name_at_run_time() -> None:
    spec = {"boxes": tf.TensorSpec([None, None])}

    @tf.function(input_signature=[spec, spec])
    def join(one: Any, other: Any) -> Any:
        return merge.outputs([one, other], SHARDS)

    with pytest.raises(tf.errors.InvalidArgumentError, match="output boxes to have the same size"):
        join({"boxes": tf.ones((3, 2))}, {"boxes": tf.ones((2, 4))})
    np.testing.assert_array_equal(
        join({"boxes": tf.ones((3, 2))}, {"boxes": tf.ones((2, 2))})["boxes"], np.ones((5, 2))
    )


def test_first_axis_must_be_the_batch() -> None:
    with pytest.raises(ValueError, match="first axis of the output to be the batch"):
        merge.outputs([tf.ones((7, 2)), tf.ones((7, 2))], SHARDS)
    # Several rows of output for one of input are fine.
    assert merge.outputs([tf.ones((6, 2)), tf.ones((4, 2))], SHARDS).shape == (10, 2)


def test_gradients_are_added() -> None:
    assert merge.total([None, None]) is None
    one = tf.constant([1.0])
    assert merge.total([None, one]) is one
    np.testing.assert_array_equal(merge.total([one, None, one + 1]), [3])


def test_sparse_gradients_stay_sparse() -> None:
    first = tf.IndexedSlices(tf.constant([[1.0], [2.0]]), tf.constant([0, 2]), tf.constant([3, 1]))
    second = tf.IndexedSlices(tf.constant([[4.0]]), tf.constant([2]), tf.constant([3, 1]))
    merged = merge.total([first, second])
    assert isinstance(merged, tf.IndexedSlices)
    np.testing.assert_array_equal(tf.convert_to_tensor(merged), [[1], [0], [6]])
    mixed = merge.total([first, tf.ones((3, 1))])
    np.testing.assert_array_equal(mixed, [[2], [1], [3]])


def test_flags_are_increments_too() -> None:
    values = [tf.constant([False, True]), tf.constant([False, False])]
    merged = merge.increments(tf.constant([False, False]), values, SHARDS.shares())
    np.testing.assert_array_equal(merged, [False, True])


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_moving_moments(updates: int) -> None:
    """Law of total variance, for layers that are called several times in a step."""
    random = np.random.default_rng(0)
    momentum, counts, old = 0.9, [3, 2, 2], (0.3, 1.7)
    calls = [random.normal(loc=call, size=7) for call in range(updates)]

    def moved(batches: list[np.ndarray]) -> tuple[list[float], float]:
        means, variance = [old[0]], old[1]
        for batch in batches:
            means.append(means[-1] * momentum + batch.mean() * (1 - momentum))
            variance = variance * momentum + batch.var() * (1 - momentum)
        return means, variance

    cuts = np.split(np.arange(7), np.cumsum(counts)[:-1])
    towers = [moved([call[cut] for call in calls]) for cut in cuts]
    mean, variance = merge.moving_moments(
        [[tf.constant(value, tf.float64) for value in means] for means, _ in towers],
        [tf.constant(variance, tf.float64) for _, variance in towers],
        [tf.constant(count / 7) for count in counts],
        momentum,
    )
    expected_means, expected_variance = moved(calls)
    assert float(mean) == pytest.approx(expected_means[-1], rel=1e-5)
    assert float(variance) == pytest.approx(expected_variance, rel=1e-5)
