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
    if kind in DTYPES:
        return tf.cast(random.integers(0, 2 if kind == "bool" else 99, (rows, 2)), kind)
    shape = {"vector": (), "matrix": (3,), "image": (2, 2, 1)}[kind]
    return tf.constant(random.normal(size=(rows, *shape)))


DTYPES = ("bool", "float16", "bfloat16", "float32", "int8", "uint8", "int64", "complex64")
KINDS = ("vector", "matrix", "image", "string", "ragged", "sparse", "none", *DTYPES)


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


def without_sizes(value: Any) -> Any:
    """The spec of a leaf, its number of rows unknown; `None` stays."""
    if value is None:
        return None
    if isinstance(value, tf.RaggedTensor):
        return tf.RaggedTensorSpec([None, *value.shape[1:]], value.dtype, value.ragged_rank)
    spec = tf.SparseTensorSpec if isinstance(value, tf.SparseTensor) else tf.TensorSpec
    return spec([None, *value.shape[1:]], value.dtype)


@pytest.mark.rest
@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(nests())
def test_merge_is_the_inverse_of_any_nest_of_unknown_size(case: tuple[Any, int, int]) -> None:
    """Always as many parts as towers, no part empty, and what stands in is gone afterwards."""
    nest, rows, towers = case
    specs = tf.nest.map_structure(without_sizes, nest)
    tensors = [leaf for leaf in tf.nest.flatten(nest) if leaf is not None]
    seen: dict[str, Any] = {}

    @tf.function(input_signature=[[spec for spec in tf.nest.flatten(specs) if spec is not None]])
    def there_and_back(flat: Any) -> Any:
        given = iter(flat)
        batch = tf.nest.pack_sequence_as(
            nest, [None if leaf is None else next(given) for leaf in tf.nest.flatten(nest)]
        )
        shards = shard.shard(batch, towers)
        merged = merge.outputs(shards.parts, shards)
        seen["structure"] = merged
        kept = [leaf for leaf in tf.nest.flatten(merged) if leaf is not None]
        return kept, shards.rows, [tf.shape(part["first"])[0] for part in shards.parts]

    merged, counts, sizes = there_and_back(tensors)
    tf.nest.assert_same_structure(seen["structure"], nest)
    assert_same(merged, tensors)
    expected = shard.row_counts(rows, towers)
    assert [int(count) for count in counts] == expected + [0] * (towers - len(expected))
    assert [int(size) for size in sizes] == expected + [1] * (towers - len(expected))


def test_shares_are_precise() -> None:
    """They weight float64 values too."""
    shares = shard.shard(np.arange(7), 3).shares()
    assert [share.dtype for share in shares] == [tf.float64] * 3
    np.testing.assert_allclose(shares, [3 / 7, 2 / 7, 2 / 7], rtol=1e-15)


def test_whole_is_the_last_key_alone() -> None:
    """A name in the middle of a path declares nothing about what lies below it."""
    batch = {"table": {"x": np.arange(4)}, "other": {"table": np.eye(3)}, "y": np.arange(4)}
    for part in shard.shard(batch, 2, whole=["table"]).parts:
        assert part["table"]["x"].shape == (2,)
        assert part["other"]["table"].shape == (3, 3)


def test_whole_leaves_may_have_any_size_at_run_time() -> None:
    spec = {"x": tf.TensorSpec([None]), "table": tf.TensorSpec([None, 2])}

    @tf.function(input_signature=[spec])
    def cut(batch: Any) -> Any:
        return shard.shard(batch, 2, whole=["table"]).parts

    for part in cut({"x": tf.zeros(4), "table": tf.ones((7, 2))}):
        assert part["x"].shape == (2,)
        assert part["table"].shape == (7, 2)


@pytest.mark.parametrize("value", [np.float32(0.5), tf.constant(0.5), 0.5, "name", True])
def test_leaves_of_rank_0_go_to_every_tower(value: Any) -> None:
    parts = shard.shard({"x": np.arange(3), "rank_0": value}, 2).parts
    assert [part["rank_0"] for part in parts] == [value, value]
    if isinstance(value, np.generic):
        assert all(tf.is_tensor(part["rank_0"]) for part in parts)


def test_rows_known_of_one_leaf_are_checked_against_the_others_at_run_time() -> None:
    spec = {"a": tf.TensorSpec([4]), "b": tf.TensorSpec([None])}
    cut = tf.function(lambda batch: shard.shard(batch, 2).parts, input_signature=[spec])
    parts = cut({"a": tf.range(4.0), "b": tf.range(4.0)})
    assert [part["b"].numpy().tolist() for part in parts] == [[0, 1], [2, 3]]
    with pytest.raises(tf.errors.InvalidArgumentError, match="Leaf b has another number of rows"):
        cut({"a": tf.zeros(4), "b": tf.zeros(3)})


@pytest.mark.parametrize("kind", ["ragged", "sparse"])
def test_leaves_with_other_rows_are_named_whatever_their_kind(kind: str) -> None:
    random = np.random.default_rng(0)
    specs = {"a": tf.TensorSpec([None]), "b": without_sizes(leaf(kind, 3, random))}
    cut = tf.function(lambda batch: shard.shard(batch, 2).parts, input_signature=[specs])
    with pytest.raises(tf.errors.InvalidArgumentError, match="Leaf b has another number of rows"):
        cut({"a": tf.zeros(4), "b": leaf(kind, 3, random)})


def test_sparse_parts_keep_their_width() -> None:
    """A Dense layer reads it while it is built."""
    known = tf.sparse.from_dense(np.eye(5, 4))
    assert [part.shape for part in shard.shard(known, 2).parts] == [(3, 4), (2, 4)]
    found: list[Any] = []

    @tf.function(input_signature=[tf.SparseTensorSpec([None, 4], tf.float64)])
    def cut(x: tf.SparseTensor) -> None:
        found.extend(part.shape.as_list() for part in shard.shard(x, 2).parts)

    cut(known)
    assert found == [[None, 4]] * 2


def test_rank_may_be_unknown() -> None:
    cut = tf.function(lambda x: shard.shard(x, 2).parts, input_signature=[tf.TensorSpec(None)])
    assert [part.numpy().tolist() for part in cut(tf.range(5.0))] == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("batch", [np.zeros((0, 3)), {"x": np.zeros(0), "n": None}])
def test_known_batch_without_rows_has_no_parts(batch: Any) -> None:
    """`row_counts` promises `min(rows, towers)` of them."""
    assert shard.row_counts(0, 2) == []
    shards = shard.shard(batch, 2)
    assert (shards.parts, shards.rows, shards.total) == ([], [], 0)


def test_some_leaves_without_rows_are_no_empty_batch() -> None:
    assert not shard.is_empty({"a": np.zeros(0), "b": np.zeros(2)})
    assert not shard.is_empty({"a": tf.constant(1.0)})


@pytest.mark.parametrize(
    ("sizes", "match"), [((4, 3), "Leaf b has another"), ((0, 0), "The batch has no rows")]
)
def test_the_checks_come_before_the_parts(sizes: tuple[int, int], match: str) -> None:
    """In a plain graph nothing runs but what is waited for."""
    with tf.Graph().as_default():
        batch = {name: tf.compat.v1.placeholder(tf.float32, [None]) for name in "ab"}
        parts = shard.shard(batch, 2).parts
        feed = {batch[name]: np.zeros(size) for name, size in zip("ab", sizes, strict=True)}
        with (
            tf.compat.v1.Session() as session,
            pytest.raises(tf.errors.InvalidArgumentError, match=match),
        ):
            session.run(parts[0]["a"], feed)
