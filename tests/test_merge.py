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


SHARES = (np.array([3, 2, 2]) / 7).tolist()


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_mean_is_numpys(dtype: str) -> None:
    """In its own precision, imaginary parts included."""
    random = np.random.default_rng(0)
    values = random.normal(size=(3, 4)).astype(dtype)
    if "complex" in dtype:
        values += 1j * random.normal(size=(3, 4))
    merged = merge.mean([tf.constant(value) for value in values], tf.constant(SHARES, tf.float64))
    rtol = 1e-14 if dtype in ("float64", "complex128") else 1e-6
    np.testing.assert_allclose(merged, np.average(values, axis=0, weights=SHARES), rtol=rtol)


def test_mean_of_half_precision_is_rounded_once() -> None:
    values = np.random.default_rng(1).normal(size=(3, 999)).astype("float16")
    merged = merge.mean([tf.constant(value) for value in values], SHARES)
    expected = np.average(values.astype("float64"), axis=0, weights=SHARES).astype("float16")
    # float32 may fall on the other side of a tie, by one unit in the last place.
    np.testing.assert_array_max_ulp(merged.numpy(), expected, maxulp=1)
    assert np.mean(merged.numpy() == expected) > 0.99


@pytest.mark.parametrize(("dtype", "value"), [("int32", 2**24 + 1), ("int64", 2**40 + 1)])
def test_mean_of_equal_integers_is_that_integer(dtype: str, value: int) -> None:
    """Such as a step counter that a model returns."""
    assert int(merge.outputs([tf.constant(value, dtype)] * 2, SHARDS)) == value


def test_mean_of_integers_is_rounded() -> None:
    assert int(merge.mean([tf.constant(1), tf.constant(2)], [0.4, 0.6])) == 2
    assert int(merge.mean([tf.constant(1), tf.constant(2)], [0.6, 0.4])) == 1


def test_one_tower_keeps_its_own() -> None:
    """The very tensors: nothing is computed."""
    one, batch = tf.constant(0.1), tf.ones((3, 2))
    for merged in (
        merge.mean([one], []),
        merge.live_sum([one], []),
        merge.total([one]),
        merge.increments(tf.constant(9.0), [one], []),
        merge.moving_moments([[batch, one]], [one], [], 0.9)[0],
        merge.moving_moments([[batch, one]], [one], [], 0.9)[1],
    ):
        assert merged is one
    assert merge.outputs([batch], Shards([batch], [3], 3)) is batch


@pytest.mark.parametrize(
    ("rule", "expected"), [(None, 3.0), ("mean", 3.0), ("pad", 3.0), ("sum", 7.0), ("whole", 1.0)]
)
def test_rules_for_scalars(rule: str | None, expected: float) -> None:
    parts = [{"a": [{"b": tf.constant(1.0)}]}, {"a": [{"b": tf.constant(6.0)}]}]
    merged = merge.outputs(parts, SHARDS, {"b": rule} if rule else None)
    assert float(merged["a"][0]["b"]) == pytest.approx(expected)
    unnamed = merge.outputs(parts, SHARDS, {"a": rule or "sum", "output": rule or "sum"})
    assert float(unnamed["a"][0]["b"]) == pytest.approx(3.0)


def test_live_sum_is_numpys() -> None:
    values = np.random.default_rng(0).integers(-9, 9, (3, 4))
    merged = merge.live_sum([tf.constant(value) for value in values], SHARES)
    np.testing.assert_array_equal(merged, values.sum(axis=0))
    assert merged.dtype == tf.int64


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "float32", "float64"])
def test_increments_are_added_once(dtype: str) -> None:
    added = np.array([[1, 2], [3, 4], [5, 6]])
    old = np.array([10, 20])
    new = [tf.cast(old + by, dtype) for by in added]
    merged = merge.increments(tf.cast(old, dtype), new, SHARES)
    np.testing.assert_array_equal(merged, [10 + 9, 20 + 12])
    assert merged.dtype == dtype


def test_flags_of_a_stand_in_count_for_nothing() -> None:
    flags = [tf.constant(False), tf.constant(False), tf.constant(True)]
    assert not bool(merge.increments(tf.constant(False), flags, [0.5, 0.5, 0.0]))
    assert bool(merge.increments(tf.constant(False), flags[::-1], [0.5, 0.5, 0.0]))


def test_sparse_gradients_keep_their_dense_shape_and_duplicates() -> None:
    """The optimizer adds up rows of one index, and needs to know how many rows there are."""
    part = tf.IndexedSlices(tf.constant([[1.0]]), tf.constant([2]), tf.constant([5, 1]))
    merged = merge.total([part, None, part])
    np.testing.assert_array_equal(merged.indices, [2, 2])
    np.testing.assert_array_equal(merged.values, [[1], [1]])
    np.testing.assert_array_equal(merged.dense_shape, [5, 1])


def test_pad_for_sizes_that_are_found_at_run_time() -> None:
    spec = [tf.TensorSpec([None, None])] * 3
    join = tf.function(
        lambda *parts: merge.outputs(parts, STAND_IN, {"output": "pad"}), input_signature=spec
    )
    merged = join(tf.fill((1, 1), 1.0), tf.fill((1, 3), 2.0), tf.fill((1, 2), np.nan))
    np.testing.assert_array_equal(merged, [[1, 0, 0], [2, 2, 2]])


@pytest.mark.parametrize("kind", ["sparse", "ragged"])
def test_other_sizes_are_refused_by_name_whatever_the_kind(kind: str) -> None:
    def part(rows: int, width: int) -> dict[str, Any]:
        if kind == "sparse":
            return {"boxes": tf.sparse.from_dense(np.ones((rows, width)))}
        return {"boxes": tf.RaggedTensor.from_row_lengths(tf.ones((rows, width)), [1] * rows)}

    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="output boxes"):
        merge.outputs([part(3, 2), part(2, 4)], SHARDS)


def test_other_ranks_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"the output to have .*shapes=\[\(3, 2\), \(2,\)\]"):
        merge.outputs([tf.ones((3, 2)), tf.ones(2)], SHARDS)


def test_first_axis_must_be_the_batch_also_of_unknown_size() -> None:
    shards = Shards([None] * 2, [tf.constant(1), tf.constant(1)], tf.constant(2))
    with pytest.raises(ValueError, match=r"output boxes to be the batch.*a varying number of rows"):
        merge.outputs([{"boxes": tf.ones((7, 2))}] * 2, shards)


def test_moving_moments_ignore_what_a_stand_in_did() -> None:
    means = [[tf.constant(0.5), tf.constant(value)] for value in (1.0, 3.0, np.nan)]
    variances = [tf.constant(value) for value in (1.0, 2.0, np.nan)]
    with_it = merge.moving_moments(means, variances, [0.5, 0.5, 0.0], 0.9)
    without = merge.moving_moments(means[:2], variances[:2], [0.5, 0.5], 0.9)
    np.testing.assert_allclose(with_it, without, rtol=1e-6)


def test_moving_moments_that_do_not_move() -> None:
    """Momentum 1 divides by nothing."""
    old = [tf.constant(0.5), tf.constant(0.5)]
    mean, variance = merge.moving_moments([old, old], [tf.constant(2.0)] * 2, [0.6, 0.4], 1.0)
    assert float(mean) == 0.5
    assert float(variance) == 2.0


def test_moving_moments_of_each_channel() -> None:
    random = np.random.default_rng(2)
    batch, momentum = random.normal(size=(7, 3)), 0.7
    cuts = np.split(batch, [3, 5])
    mean, variance = merge.moving_moments(
        [[tf.zeros(3, tf.float64), tf.constant((1 - momentum) * c.mean(0))] for c in cuts],
        [tf.constant(momentum + (1 - momentum) * c.var(0)) for c in cuts],
        SHARES,
        momentum,
    )
    # The shares are Python floats: TensorFlow takes those as float32.
    np.testing.assert_allclose(mean, (1 - momentum) * batch.mean(0), rtol=1e-6)
    np.testing.assert_allclose(variance, momentum + (1 - momentum) * batch.var(0), rtol=1e-6)


def test_the_check_of_sizes_comes_before_the_outputs() -> None:
    """In a plain graph nothing runs but what is waited for."""
    with tf.Graph().as_default():
        parts = [tf.compat.v1.placeholder(tf.float32, [None, None]) for _ in range(2)]
        merged = merge.outputs(parts, SHARDS)
        with (
            tf.compat.v1.Session() as session,
            pytest.raises(tf.errors.InvalidArgumentError, match="the output to have the same size"),
        ):
            session.run(merged, {parts[0]: np.ones((3, 2)), parts[1]: np.ones((2, 4))})


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint64", "bool"])
def test_mean_of_equal_integers_of_any_kind(dtype: str) -> None:
    largest = np.array(1 if dtype == "bool" else np.iinfo(dtype).max, dtype)
    assert merge.mean([tf.constant(largest)] * 3, SHARES).numpy() == largest


@pytest.mark.parametrize("values", [(0, 100, 200), (200, 0, 0), (255, 254, 0)])
def test_mean_of_unsigned_integers_does_not_wrap(values: tuple[int, ...]) -> None:
    merged = merge.mean([tf.constant(value, tf.uint8) for value in values], SHARES)
    assert int(merged) == round(np.average(values, weights=SHARES))


@pytest.mark.parametrize("kind", ["sparse", "ragged"])
def test_other_sizes_of_sparse_and_ragged_are_refused_at_run_time(kind: str) -> None:
    def join(one: Any, other: Any) -> Any:
        return merge.outputs([{"boxes": one}, {"boxes": other}], SHARDS)

    if kind == "sparse":
        spec: Any = tf.SparseTensorSpec([None, None], tf.float32)
        parts = [tf.sparse.from_dense(np.ones((n, w), "float32")) for n, w in ((3, 2), (2, 4))]
    else:
        spec = tf.RaggedTensorSpec([None, None, None], tf.float32, ragged_rank=1)
        parts = [
            tf.RaggedTensor.from_row_lengths(tf.ones((n, w)), [1] * n) for n, w in ((3, 2), (2, 4))
        ]
    traced = tf.function(join, input_signature=[spec] * 2)
    assert traced(parts[0], parts[0])["boxes"].shape[0] in (None, 6)
    with pytest.raises(tf.errors.InvalidArgumentError, match="output boxes to have the same size"):
        traced(*parts)


def test_pad_of_sparse_and_ragged() -> None:
    rules = {"output": "pad"}
    sparse = [tf.sparse.from_dense(np.ones((n, w))) for n, w in ((3, 2), (2, 4))]
    expected = np.zeros((5, 4))
    expected[:3, :2] = expected[3:] = 1
    np.testing.assert_array_equal(
        tf.sparse.to_dense(merge.outputs(sparse, SHARDS, rules)), expected
    )
    ragged = [
        tf.RaggedTensor.from_row_lengths(tf.ones((n, w)), lengths)
        for n, w, lengths in ((3, 2, [0, 1, 2]), (2, 4, [1, 1]))
    ]
    merged = merge.outputs(ragged, SHARDS, rules)
    assert merged.row_lengths().numpy().tolist() == [0, 1, 2, 1, 1]
    np.testing.assert_array_equal(merged.flat_values, expected)
