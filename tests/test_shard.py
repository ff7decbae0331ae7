"""Cutting batches, and the law that merging is its inverse."""

from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from parallel_keras import merge, shard

# (rows, towers): the row indices of each part.
TABLE = {
    (8, 4): [[0, 1], [2, 3], [4, 5], [6, 7]],
    (10, 4): [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]],
    (5, 4): [[0, 1], [2], [3], [4]],
    (7, 3): [[0, 1, 2], [3, 4], [5, 6]],
    (4, 4): [[0], [1], [2], [3]],
    (3, 4): [[0], [1], [2]],
    (1, 8): [[0]],
    (5, 1): [[0, 1, 2, 3, 4]],
}


@pytest.mark.parametrize(("rows", "towers"), TABLE)
def test_table(rows: int, towers: int) -> None:
    parts, counts, total = shard.shard(np.arange(rows), towers)
    assert [part.numpy().tolist() for part in parts] == TABLE[rows, towers]
    assert counts == [len(part) for part in TABLE[rows, towers]]
    assert total == rows


@pytest.mark.parametrize(("rows", "towers"), TABLE)
def test_table_of_unknown_size(rows: int, towers: int) -> None:
    """Every tower is there; one without rows gets the last row as a stand-in."""
    found: dict[str, Any] = {}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64)])
    def cut(x: tf.Tensor) -> Any:
        shards = shard.shard(x, towers)
        found["static"] = shards.parts[0].shape[0]
        return shards.parts, shards.rows, shards.shares()

    parts, counts, shares = cut(np.arange(rows))
    expected = TABLE[rows, towers]
    missing = towers - len(expected)
    assert [part.numpy().tolist() for part in parts] == expected + [[rows - 1]] * missing
    assert [int(count) for count in counts] == [len(part) for part in expected] + [0] * missing
    assert float(sum(shares)) == pytest.approx(1)
    assert found["static"] is None


def test_known_size_stays_known() -> None:
    @tf.function(input_signature=[tf.TensorSpec([5, 2])])
    def sizes(x: tf.Tensor) -> None:
        assert [part.shape for part in shard.shard(x, 2).parts] == [(3, 2), (2, 2)]

    sizes(tf.zeros((5, 2)))


class Point(NamedTuple):
    x: Any
    y: Any


def leaf(kind: str, rows: int, random: np.random.Generator) -> Any:
    if kind == "none":
        return None
    if kind == "ragged":
        lengths = random.integers(0, 4, rows)
        return tf.RaggedTensor.from_row_lengths(random.normal(size=lengths.sum()), lengths)
    if kind == "sparse":
        return tf.sparse.from_dense(random.integers(0, 3, (rows, 4)))
    if kind == "string":
        return tf.constant([[str(value)] for value in random.integers(0, 99, rows)])
    if kind == "bool":
        return tf.constant(random.integers(0, 2, rows), tf.bool)
    shape = {"vector": (), "matrix": (3,), "image": (2, 2, 1)}[kind]
    return tf.constant(random.normal(size=(rows, *shape)))


KINDS = ("vector", "matrix", "image", "string", "bool", "ragged", "sparse", "none")


@st.composite
def nests(draw: Any) -> tuple[Any, int, int]:
    towers = draw(st.integers(1, 8))
    rows = draw(st.integers(1, 3 * towers + 1))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    leaves = st.sampled_from(KINDS).map(lambda kind: leaf(kind, rows, random))
    nest = st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=3).map(tuple),
            st.dictionaries(st.sampled_from("abc"), inner, min_size=1),
            st.tuples(inner, inner).map(lambda pair: Point(*pair)),
        ),
        max_leaves=6,
    )
    return {"first": leaf("matrix", rows, random), "rest": draw(nest)}, rows, towers


def assert_same(actual: Any, expected: Any) -> None:
    tf.nest.assert_same_structure(actual, expected, expand_composites=True)
    pairs = zip(
        tf.nest.flatten(actual, expand_composites=True),
        tf.nest.flatten(expected, expand_composites=True),
        strict=True,
    )
    for one, other in pairs:
        if other is not None:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(nests())
def test_merge_is_the_inverse(case: tuple[Any, int, int]) -> None:
    nest, rows, towers = case
    shards = shard.shard(nest, towers)
    assert len(shards.parts) == min(rows, towers)
    assert sum(shards.rows) == rows
    assert max(shards.rows) - min(shards.rows) <= 1
    assert min(shards.rows) >= 1
    assert_same(merge.outputs(shards.parts, shards), nest)


@pytest.mark.parametrize("towers", [1, 2, 3, 8])
def test_merge_is_the_inverse_for_unknown_sizes(towers: int) -> None:
    """Rows in order, stand-ins gone, for every leaf that TensorFlow can cut."""
    spec = {
        "dense": tf.TensorSpec([None, 3], tf.float64),
        "words": tf.TensorSpec([None, 1], tf.string),
        "ragged": tf.RaggedTensorSpec([None, None], tf.float64, ragged_rank=1),
        "sparse": tf.SparseTensorSpec([None, 4], tf.int64),
    }

    @tf.function(input_signature=[spec])
    def there_and_back(nest: Any) -> Any:
        shards = shard.shard(nest, towers)
        return merge.outputs(shards.parts, shards)

    for rows in range(1, 3 * towers + 2):
        random = np.random.default_rng(rows)
        nest = {
            "dense": leaf("matrix", rows, random),
            "words": leaf("string", rows, random),
            "ragged": leaf("ragged", rows, random),
            "sparse": leaf("sparse", rows, random),
        }
        assert_same(there_and_back(nest), nest)


def test_what_goes_to_every_tower_whole() -> None:
    batch = {"x": np.arange(4), "rate": tf.constant(0.5), "table": np.eye(3), "n": 7, "no": None}
    for part in shard.shard(batch, 2, whole={"table"}).parts:
        assert part["x"].shape == (2,)
        assert float(part["rate"]) == 0.5
        assert part["table"].shape == (3, 3)
        assert part["n"] == 7
        assert part["no"] is None


def test_leaves_with_other_rows_are_named() -> None:
    with pytest.raises(ValueError, match=r"rows=\{'a': 4, 'b/0': 4, 'b/1': 3\}"):
        shard.shard({"a": np.arange(4), "b": [np.arange(4), np.arange(3)]}, 2)


def test_leaves_with_other_rows_are_named_at_run_time() -> None:
    spec = tf.TensorSpec([None])

    @tf.function(input_signature=[{"a": spec, "b": spec}])
    def cut(batch: Any) -> Any:
        return shard.shard(batch, 2).parts

    with pytest.raises(tf.errors.InvalidArgumentError, match="Leaf b has another number of rows"):
        cut({"a": np.zeros(4, "float32"), "b": np.zeros(3, "float32")})


def test_batch_of_unknown_size_without_rows_is_refused() -> None:
    cut = tf.function(lambda x: shard.shard(x, 2).parts, input_signature=[tf.TensorSpec([None])])
    with pytest.raises(tf.errors.InvalidArgumentError, match="The batch has no rows"):
        cut(np.zeros(0, "float32"))


def test_batch_without_a_row_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one tensor that has rows"):
        shard.shard({"a": None, "b": tf.constant(1.0)}, 2)


@pytest.mark.parametrize(
    ("batch", "empty"),
    [
        (np.zeros((0, 3)), True),
        (np.zeros((1, 3)), False),
        (None, False),
        ({"a": np.zeros(0)}, True),
    ],
)
def test_is_empty(batch: Any, empty: bool) -> None:
    assert shard.is_empty(batch) == empty
