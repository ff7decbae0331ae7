"""What workers exchange, without processes: threads that add up their messages."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from parallel_keras import shard
from parallel_keras.workers import exchange, faults, feeding
from parallel_keras.workers.agreement import check_same
from parallel_keras.workers.alone import Alone
from parallel_keras.workers.cluster import read, write
from parallel_keras.workers.connection import Workers
from parallel_keras.workers.own_rows import Feed

ADDRESSES = ["127.0.0.1:2", "127.0.0.1:3", "127.0.0.1:4"]
WAIT = 20.0


class Thread(Workers):
    """A worker that is a thread; `_reduce` is what the strategy would do."""

    def __init__(self, index: int, size: int, board: "Board") -> None:
        self.cluster = read(write(ADDRESSES[:size], index))
        self.index, self.size, self.chief, self.feeds_own_rows = index, size, index == 0, True
        self.first, self.towers, self.here = index, size, 1
        self.timeout, self.device, self.traffic = WAIT, "/device:CPU:0", {}
        self._board = board

    def _reduce(self, message: tf.Tensor, kind: str) -> tf.Tensor:
        return self._board.add_up(self.index, message)


class Board:
    """Where threads meet to add something up."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=WAIT)
        self._messages: list[Any] = [None] * size

    def add_up(self, index: int, message: tf.Tensor) -> tf.Tensor:
        self._messages[index] = message
        self._barrier.wait()
        total = tf.add_n(self._messages)
        self._barrier.wait()
        return total


def together(size: int, do: Callable[[Workers], Any]) -> list[Any]:
    """What each of several workers returns, or the error that it raises."""
    board, results = Board(size), [None] * size

    def run(index: int) -> None:
        try:
            results[index] = do(Thread(index, size, board))
        except Exception as error:  # noqa: BLE001 (the test judges it)
            results[index] = error

    threads = [threading.Thread(target=run, args=[index], daemon=True) for index in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT)
    return results


def _numpy(dtype: str) -> str:
    return "float32" if dtype == "bfloat16" else dtype


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        "float16",
        "bfloat16",
        "float64",
        "int8",
        "uint8",
        "int32",
        "uint32",
        "int64",
        "bool",
    ],
)
def test_every_type_survives_the_message(dtype: str) -> None:
    kind = tf.as_dtype(dtype)
    low, high = (kind.min, kind.max) if dtype != "bool" else (False, True)
    value = tf.cast(tf.constant(np.array([[low, high], [high, low]]).astype(_numpy(dtype))), kind)
    vector = exchange.encode(value)
    assert vector.dtype == tf.float32
    assert vector.shape[0] == 4 * exchange.pieces(kind)
    back = exchange.decode(vector + tf.zeros_like(vector), kind, value.shape)
    np.testing.assert_array_equal(back.numpy(), value.numpy())


def test_strings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected numbers where workers exchange.*dtype=string"):
        exchange.encode(tf.constant(["a"]))


def test_sizes_that_vary_become_few() -> None:
    sizes = [int(exchange.bucket(tf.constant(size))) for size in range(1, 5000)]
    assert all(size <= rounded <= size * 1.125 for size, rounded in enumerate(sizes, start=1))
    assert len(set(sizes)) < 90


def test_one_message_moves_sums_and_slots() -> None:
    """Workers with 2, 1 and 2 towers; outputs of other sizes on each tower."""
    places = [0, 2, 3]
    towers = [2, 1, 2]

    def swap(worker: Workers) -> Any:
        index = worker.index
        mine = range(places[index], places[index] + towers[index])
        return worker.exchange(
            "train",
            [tf.fill([2, 2], float(index + 1)), tf.constant(0.25, tf.float64)],
            [[tf.constant([tower, -tower], tf.int64)] for tower in mine],
            [[tf.fill([tower, 2], tower), tf.constant(tower > 2)] for tower in mine],
            (places[index], 5),
        )

    for sums, fixed, varied in together(3, swap):
        np.testing.assert_array_equal(sums[0], np.full((2, 2), 6.0))
        assert (sums[1].dtype, float(sums[1])) == (tf.float64, 0.75)
        assert [slot[0].numpy().tolist() for slot in fixed] == [[t, -t] for t in range(5)]
        for tower, (rows, flag) in enumerate(varied):
            np.testing.assert_array_equal(rows, np.full((tower, 2), tower))
            assert bool(flag) == (tower > 2)


def test_only_what_varies_is_rounded_up() -> None:
    """Weights are not sent with empty places because rows of a table go with them."""
    sent = []

    def swap(worker: Workers) -> Any:
        reduce = worker._reduce

        def counted(message: tf.Tensor, kind: str) -> tf.Tensor:
            sent.append(int(tf.size(message)))
            return reduce(message, kind)

        worker._reduce = counted
        rows = 9 + worker.index
        return worker.exchange(
            "train", [tf.fill([1025], 1.0)], [], [[tf.fill([rows], float(rows))]]
        )

    for sums, _, varied in together(2, swap):
        np.testing.assert_array_equal(sums[0], np.full(1025, 2.0))
        for index, (rows,) in enumerate(varied):
            np.testing.assert_array_equal(rows, np.full(9 + index, 9.0 + index))
    assert sent[-1] == 1025 + int(exchange.bucket(tf.constant(9 + 10)))


def test_one_value_for_all() -> None:
    values = together(2, lambda w: w.from_chief([tf.constant([w.index + 5, 2**40], tf.int64)]))
    assert [value[0].numpy().tolist() for value in values] == [[5, 2**40]] * 2


def test_facts_that_differ_name_the_worker() -> None:
    errors = together(3, lambda w: check_same(w, {"version of Keras": f"3.{w.index // 2}"}))
    for error in errors:
        assert isinstance(error, ValueError)
        assert "worker 2 (127.0.0.1:4) has another version of Keras" in str(error)
        assert "worker 0 (127.0.0.1:2): 3.0. Received: 3.1" in str(error)


def test_shards_of_one_worker() -> None:
    """The rows of all towers, the parts of its own, stand-ins for those without a row."""
    batch = {"x": np.arange(3), "y": None}
    shards = shard.shard(batch, 5, here=range(2, 5))
    assert (shards.rows, shards.total) == ([1, 1, 1, 0, 0], 3)
    assert [part["x"].numpy().tolist() for part in shards.parts] == [[2], [2], [2]]
    even = shard.shard(np.arange(7), 3, here=range(1, 3))
    assert [part.numpy().tolist() for part in even.parts] == [[3, 4], [5, 6]]


def test_alone_changes_nothing() -> None:
    alone, results, column = Alone(2), [{"a": 1}], [[None]]
    shards = alone.cut(np.arange(3), (), fed_here=True)
    assert [part.numpy().tolist() for part in shards.parts] == [[0, 1], [2]]
    assert alone.join(results, "call", shards) is results
    assert alone.add_up(column) is column
    assert alone.shared(results) is results
    assert alone.whole_batch(results) is results
    assert alone.own_rows(results, None) is results


def test_marks_tell_batches_apart() -> None:
    """W5: https://github.com/tensorflow/tensorflow/issues/42146."""
    x = np.random.default_rng(0).normal(size=(8, 30)).astype("float32")
    same, other = feeding.mark({"x": x}), feeding.mark({"x": x[::-1].copy()})
    worker = Thread(0, 2, Board(1))
    feeding.check_marks([same, feeding.mark({"x": x * (1 + 1e-6)})], worker)
    feeding.check_marks([None, None], worker)
    for wrong in (other, feeding.mark({"x": x[:7]}), feeding.mark({"x": x + 1})):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"were fed different batches"):
            feeding.check_marks([same, wrong], worker)
    words = [feeding.mark(tf.constant([[word]])) for word in ("a", "b")]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"were fed different batches"):
        feeding.check_marks(words, worker)


def test_a_batch_of_no_rows_gets_one() -> None:
    filled, some = feeding.fill({"x": tf.zeros([0, 3]), "y": None})
    assert (filled["x"].shape, int(some)) == ((1, 3), 0)
    filled, some = feeding.fill({"x": tf.ones([2, 3])})
    assert (filled["x"].shape, int(some)) == ((2, 3), 1)


def test_ragged_rows_of_one_worker_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected dense numbers.*RaggedTensor of dtype=int32"):
        feeding.check_dense({"x": tf.ragged.constant([[1], []])})


def data(count: int) -> tf.data.Dataset:
    return tf.data.Dataset.range(count).batch(2)


def test_workers_take_as_many_steps() -> None:
    """W2: https://github.com/tensorflow/tensorflow/issues/37112."""

    def feed(worker: Workers) -> list[int]:
        arguments = {"x": data(5 if worker.index else 1)}
        Feed(worker).evaluation(arguments)
        return [len(batch) for batch in arguments["x"].as_numpy_iterator()]

    assert together(2, feed) == [[1, 0, 0], [2, 2, 1]]


def test_own_rows_need_a_number_of_steps() -> None:
    def feed(worker: Workers, **more: Any) -> Any:
        arguments = {"x": data(4).repeat() if worker.index else data(4), **more}
        Feed(worker).training(arguments)
        return [len(batch) for batch in arguments["x"].take(3).as_numpy_iterator()]

    for error in together(2, feed):
        assert "Expected: `steps_per_epoch`, or datasets of known" in str(error)
    assert together(2, lambda w: feed(w, steps_per_epoch=3)) == [[2, 2, 0], [2, 2, 2]]


def test_what_own_rows_cannot_be() -> None:
    feed = Feed(Thread(0, 1, Board(1)))
    with pytest.raises(ValueError, match=r"Expected no `validation_split`"):
        feed.training({"x": np.zeros((4, 2)), "validation_split": 0.5})
    with pytest.raises(ValueError, match=r"Expected arrays or a tf.data.Dataset.*type generator"):
        feed.evaluation({"x": (row for row in ())})
    ragged = tf.data.Dataset.from_tensors(tf.ragged.constant([[1], []]))
    with pytest.raises(TypeError, match=r"Expected dense tensors.*RaggedTensorSpec"):
        feed.evaluation({"x": ragged, "steps": 1})


def test_errors_of_the_connection_name_the_worker() -> None:
    cluster = read(write(ADDRESSES, 0))
    text = "Collective ops is aborted by: Error reported from /job:worker/task:2: gone"
    named = faults.named(tf.errors.UnavailableError(None, None, text), cluster, 5)
    assert "is gone or cut off: worker 2 (127.0.0.1:4). Expected" in str(named)
    silent = tf.errors.DeadlineExceededError(None, None, "Collective has timed out")
    assert "worker 1 (127.0.0.1:3), worker 2" in str(faults.named(silent, cluster, 5))
    other = tf.errors.InternalError(None, None, "something else")
    assert faults.named(other, cluster, 5) is None
    worker = Thread(0, 2, Board(1))
    with pytest.raises(ConnectionError, match=r"Training cannot go on"), worker.naming_faults():
        raise silent
    with pytest.raises(tf.errors.InternalError, match=r"something else"), worker.naming_faults():
        raise other
