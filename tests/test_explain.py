"""`explain` says why a step is not faster: P1 and wish 7 of the users of the peers.

https://github.com/tensorflow/tensorflow/issues/35687
https://github.com/tensorflow/tensorflow/issues/33809
"""

import dataclasses
import json
import sys
import threading
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras.explaining import stopwatch
from parallel_keras.explaining.explanation import Explanation
from parallel_keras.explaining.step_times import TowerTimes
from parallel_keras.explaining.timeline import lanes
from parallel_keras.explaining.verdict import judge
from tests.parity import mlp, rows


class Clock:
    """Goes on by a millisecond when it is read, else only when it is told to.

    So what is found depends on what a step does, and not on how fast the machine is.
    """

    def __init__(self) -> None:
        self.seconds, self._lock = 0.0, threading.Lock()

    def __call__(self) -> float:
        self.go_on(0.001)
        return self.seconds

    def go_on(self, seconds: float) -> None:
        with self._lock:
            self.seconds += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "now", clock)
    return clock


CPUS = ("/device:CPU:0", "/device:CPU:1")


def times(**changes: Any) -> Explanation:
    """Two devices on which a step takes half as long as on one, but for the changes."""
    towers = tuple(TowerTimes(device, 32, 15.0, 30.0, 0.0) for device in CPUS)
    usual = Explanation(
        batch_size=64, loss_on="towers", why_merged="", may_divide=False,
        merge_device=CPUS[0], towers=towers, starting=0.0, sharding=0.5, weights_out=0.5,
        together=46.0, merging=1.0, update=2.0, step=50.0, template=100.0, whole_batch=90.0,
    )  # fmt: skip
    return dataclasses.replace(usual, **changes)


def towers(*busy: float) -> tuple[TowerTimes, ...]:
    return tuple(
        TowerTimes(device, 32, ms / 3, 2 * ms / 3, max(busy) - ms)
        for device, ms in zip(CPUS, busy, strict=True)
    )


MERGED = {"loss_on": "merged", "why_merged": "it was asked for", "merging": 45.0, "step": 95.0}
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "good": ({}, "none", "2.00 times as fast"),
    "eager": ({"eager": True, "step": 200.0}, "eager", "Compile without run_eagerly"),
    "input": ({"reading": 51.0}, "input", "prefetch"),
    "one device": ({"towers": towers(90.0, 0.0)[:1], "step": 101.0}, "one device", "more devices"),
    "slow device": ({"towers": towers(45.0, 140.0), "step": 145.0}, "slow device", "CPU:1 needs"),
    "outputs": ({**MERGED, "may_divide": True}, "merging", 'Use loss_on="towers"'),
    "whole batch": (MERGED, "merging", "needs the whole batch"),
    "gradients": ({"merging": 45.0, "step": 95.0}, "small batch", "adding up gradients 45.00"),
    "stiff": ({"towers": towers(85.0, 85.0), "step": 95.0}, "small batch", "in the towers 40.00"),
    "fewer rows than devices": ({"batch_size": 1, "step": 95.0}, "small batch", "of 1 rows"),
    "weights": ({"weights_out": 40.0, "step": 95.0}, "small batch", "copying weights 40.00"),
    "update": ({"update": 40.0, "step": 95.0}, "small batch", "Use a larger batch_size"),
    "cores": ({"together": 92.0, "step": 95.0}, "shared hardware", "share the same hardware"),
    "sharding": ({"sharding": 40.0, "step": 95.0}, "sharding", "Make the inputs smaller"),
}


@pytest.mark.parametrize("case", CASES)
def test_verdicts(case: str) -> None:
    changes, cause, words = CASES[case]
    verdict = judge(times(**changes))
    assert verdict.cause == cause
    assert words in f"{verdict.finding} {verdict.remedy}"


def test_a_slow_device_may_be_the_first() -> None:
    verdict = judge(times(towers=towers(140.0, 45.0), step=145.0))
    assert verdict.cause == "slow device"
    assert verdict.finding.startswith("/device:CPU:0 needs 140.00 ms")


def test_efficiency_is_the_speed_up_by_device() -> None:
    explanation = times(step=80.0)
    assert explanation.speed_up == pytest.approx(1.25)
    assert explanation.efficiency == pytest.approx(0.625)


def test_printed_as_a_table() -> None:
    shown = str(times(**MERGED, reading=1.5))
    assert "2 towers, 64 rows a step, loss on: merged\n(outputs are merged first: it was" in shown
    assert "/device:CPU:1                           32     15.00     30.00      0.00\n" in shown
    assert "whole step                           95.00\n" in shown
    assert "reading a batch, beside the step      1.50\n" in shown
    assert "efficiency (speed-up / towers)         53%\n" in shown
    assert " ".join(shown.split()).endswith("-> " + times(**MERGED).verdict.remedy)
    assert max(map(len, shown.splitlines())) <= 72
    assert str(times(towers=towers(90.0, 0.0)[:1])).startswith("1 tower, 64 rows a step")


def test_as_json() -> None:
    found = json.loads(json.dumps(times().as_dict()))
    assert found["speed_up"] == 2.0
    assert found["towers"][1]["device"] == "/device:CPU:1"
    assert found["verdict"]["cause"] == "none"


def test_timeline_has_a_lane_for_each_device() -> None:
    drawn = lanes(times(towers=towers(40.0, 45.0)))
    assert list(drawn) == ["merging on CPU:0", "tower on CPU:0", "tower on CPU:1", "one device"]
    forward, backward, waiting, slower = drawn["tower on CPU:0"]
    assert forward[:2] == ("forward", 1.0)
    assert backward[1] == pytest.approx(forward[1] + forward[2])
    assert waiting == ("waiting", pytest.approx(41.0), pytest.approx(5.0))
    assert slower == ("slower at the same time", pytest.approx(46.0), pytest.approx(1.0))
    assert drawn["merging on CPU:0"][3] == ("merging", pytest.approx(47.0), 1.0)


def test_timeline_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    times(reading=3.0).draw(tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_timeline_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"step.png'\. Install: pip install matplotlib"):
        times().draw(tmp_path / "step.png")


def test_small_batch() -> None:
    """What takes as long however few rows there are: here, that is all."""
    parallel = pk.DataParallelModel(mlp(), 2)
    parallel.compile("sgd", "mse")
    explanation = pk.explain(parallel, (rows(4, 6), rows(4, 3)), repeats=2)
    assert explanation.verdict.cause == "small batch"
    assert [tower.rows for tower in explanation.towers] == [2, 2]


class SlowLoss(keras.losses.Loss):
    """Takes a tenth of a microsecond for each number that it is given."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        def wait(size: tf.Tensor) -> None:
            self._clock.go_on(1e-7 * int(size))

        tf.py_function(wait, [tf.size(y_pred)], [])
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)


def test_large_output(clock: Clock) -> None:
    """The same model and batch: outputs are merged, and then they are not."""
    batch = (rows(64, 6), np.arange(64))
    found = {}
    for loss_on in ("merged", "towers"):
        wide = keras.Sequential([keras.Input((6,)), keras.layers.Dense(10_000)])
        parallel = pk.DataParallelModel(wide, 2, loss_on=loss_on)
        parallel.compile("sgd", SlowLoss(clock))
        found[loss_on] = pk.explain(parallel, batch, repeats=2)
    milliseconds = 1e-4 * 64 * 10_000
    assert found["merged"].merging == pytest.approx(milliseconds)
    assert found["merged"].verdict.cause == "merging"
    assert 'loss_on="towers"' in found["merged"].verdict.remedy
    assert found["towers"].loss_on == "towers"
    assert found["towers"].merging == pytest.approx(0)
    assert [tower.busy for tower in found["towers"].towers] == pytest.approx([milliseconds / 2] * 2)


class SlowFor(keras.layers.Layer):
    """Stands in for a slow device: takes a while for the shard that begins with a mark."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def call(self, x: tf.Tensor) -> tf.Tensor:
        def wait(value: tf.Tensor) -> tf.Tensor:
            if value[0, 0] > 100 and len(value) < 9:
                self._clock.go_on(0.2)
            return value

        return tf.ensure_shape(tf.py_function(wait, [x], x.dtype), x.shape)


def test_slow_device(clock: Clock) -> None:
    template = keras.Sequential([keras.Input((6,)), SlowFor(clock), keras.layers.Dense(2)])
    parallel = pk.DataParallelModel(template, ["CPU:0", "CPU:3", "CPU:2"])
    parallel.compile("sgd", "mse")
    x = rows(9, 6)
    x[6] = 101
    explanation = pk.explain(parallel, (x, rows(9, 2)), repeats=3)
    assert explanation.verdict.cause == "slow device"
    assert explanation.verdict.finding.startswith("/device:CPU:2 needs ")
    first, _, slow = explanation.towers
    assert slow.forward == pytest.approx(200)
    assert first.forward == pytest.approx(0)
    assert first.waiting == pytest.approx(200)
    assert slow.waiting == 0


def slow_dataset(clock: Clock) -> tf.data.Dataset:
    def wait(x: tf.Tensor) -> tf.Tensor:
        clock.go_on(0.1)
        return x

    dataset = tf.data.Dataset.from_tensor_slices((rows(8, 6), rows(8, 3))).batch(4)
    # Else it reads ahead, in a thread that may or may not get to it before the clock is read.
    options = tf.data.Options()
    options.experimental_optimization.inject_prefetch = False
    return dataset.with_options(options).map(
        lambda x, y: (tf.ensure_shape(tf.py_function(wait, [x], x.dtype), (4, 6)), y)
    )


class SlowRows(keras.utils.PyDataset):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        self._clock.go_on(0.1)
        return rows(4, 6, seed=index), rows(4, 3, seed=index)


@pytest.mark.parametrize("dataset", [slow_dataset, SlowRows])
def test_slow_input(dataset: Any, clock: Clock) -> None:
    parallel = pk.DataParallelModel(mlp(), 2)
    parallel.compile("sgd", "mse")
    explanation = pk.explain(parallel, dataset(clock), repeats=2)
    assert explanation.verdict.cause == "input"
    assert explanation.reading is not None
    assert 100 <= explanation.reading < 102
    assert explanation.batch_size == 4


def test_no_time_is_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the machine gets faster and faster, and more of a step takes less time."""
    times = iter(np.cumsum(1 / np.arange(1, 10_000)))
    monkeypatch.setattr(stopwatch, "now", lambda: float(next(times)))
    parallel = pk.DataParallelModel(mlp(), 2)
    parallel.compile("sgd", "mse")
    found = pk.explain(parallel, (rows(4, 6), rows(4, 3)), repeats=1).as_dict()
    numbers = [each for each in keras.tree.flatten(found) if isinstance(each, (int, float))]
    assert len(numbers) > 15
    assert min(numbers) >= 0


def wide() -> keras.Model:
    layers = [keras.layers.Dense(60, use_bias=False) for _ in range(3)]
    return keras.Sequential([keras.Input((60,)), *layers])


@pytest.mark.parametrize(("weights_on", "ratio"), [("unmoved", 3 / (4 / 3)), ("spread", 1.0)])
def test_where_weights_live(weights_on: str, ratio: float) -> None:
    """One place has N times the weights to send, of which 2(N-1)/N would do."""
    devices = ["CPU:1", "CPU:2", "CPU:3"]
    parallel = pk.DataParallelModel(wide(), devices, weights_on=weights_on)
    parallel.compile("sgd", "mse")
    found = pk.explain(parallel, (rows(6, 60), rows(6, 60)), repeats=1)
    weights = 3 * 60 * 60 * 4
    homes = {"unmoved": ["CPU:0"], "spread": ["CPU:1", "CPU:2", "CPU:3"]}[weights_on]
    assert found.homes == {f"/device:{home}": weights // len(homes) for home in homes}
    assert found.least_bytes == pytest.approx(weights * 4 / 3)
    # The rows of the batch travel too.
    assert found.busiest_bytes / found.least_bytes == pytest.approx(ratio, rel=0.1)
    assert f"Busiest device: {found.busiest}" in " ".join(str(found).split())


def test_one_device_has_nothing_to_send() -> None:
    parallel = pk.DataParallelModel(mlp(), 1)
    parallel.compile("sgd", "mse")
    found = pk.explain(parallel, (rows(4, 6), rows(4, 3)), repeats=1)
    assert (found.busiest, found.busiest_bytes, found.least_bytes) == ("", 0, 0)
    assert "Busiest" not in str(found)


def forgetful() -> keras.Model:
    """Everything that a step changes: normalisation, seeds, weights."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5, seed=1),
            keras.layers.Dense(3),
        ]
    )


@pytest.mark.sweep(1)
@pytest.mark.parametrize("loss_on", ["towers", "merged"])
def test_nothing_is_changed(loss_on: str) -> None:
    parallel = pk.DataParallelModel(forgetful(), 2, loss_on=loss_on)
    parallel.compile(keras.optimizers.Adam(0.1), "mse", metrics=["mae"])
    batch = (rows(7, 6), rows(7, 3), np.ones(7, "float32"))
    parallel.train_on_batch(*batch)
    holders = [*parallel.template.variables, *parallel.optimizer.variables]
    holders += parallel.metrics_variables
    before = [variable.numpy().copy() for variable in holders]
    assert any(value.any() for value in before[-4:])
    pk.explain(parallel, batch, repeats=1)
    for variable, value in zip(holders, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value, err_msg=variable.path)


def test_nothing_is_left_of_a_model_never_trained() -> None:
    parallel = pk.DataParallelModel(mlp(), 2)
    parallel.compile("adam", "mse", metrics=["mae"])
    weights = [weight.copy() for weight in parallel.get_weights()]
    pk.explain(parallel, (rows(6, 6), rows(6, 3)), repeats=1)
    for weight, value in zip(parallel.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(weight, value)
    assert parallel.optimizer.iterations == 0
    assert all(not variable.numpy().any() for variable in parallel.metrics_variables)


def test_put_back_after_a_failure() -> None:
    def fail(y: Any, prediction: Any) -> Any:
        def at_run_time(value: np.ndarray) -> np.ndarray:
            parallel.template.trainable_weights[0].assign_add(np.ones((6, 7)))
            raise RuntimeError("out of order")

        same = tf.ensure_shape(tf.numpy_function(at_run_time, [y], tf.float32), y.shape)
        return prediction - same

    parallel = pk.DataParallelModel(mlp(), 2)
    parallel.compile("sgd", fail)
    weights = [weight.copy() for weight in parallel.get_weights()]
    with pytest.raises(tf.errors.UnknownError, match="out of order"):
        pk.explain(parallel, (rows(6, 6), rows(6, 3)), repeats=1)
    np.testing.assert_array_equal(parallel.get_weights()[0], weights[0])


def test_unbuilt_masked_and_without_loss() -> None:
    """The odd ones: built from the batch, merged because of a mask, only `add_loss`."""
    words = keras.Sequential([keras.layers.Embedding(9, 4, mask_zero=True), keras.layers.Dense(3)])
    parallel = pk.DataParallelModel(words, 2)
    parallel.compile("sgd", "mse")
    explanation = pk.explain(parallel, (np.ones((4, 5), "int32"), rows(4, 5, 3)), repeats=1)
    assert explanation.loss_on == "merged"
    assert "has a mask" in explanation.why_merged

    class Penalty(keras.layers.Layer):
        def call(self, x: tf.Tensor) -> tf.Tensor:
            self.add_loss(tf.reduce_mean(tf.square(x)))
            return x

    own = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3), Penalty()])
    parallel = pk.DataParallelModel(own, 2)
    parallel.compile("sgd")
    explanation = pk.explain(parallel, rows(4, 6), repeats=1)
    assert explanation.why_merged == "there is no compiled loss"


@pytest.mark.sweep(1)
@pytest.mark.parametrize("loss_on", ["towers", "merged"])
def test_a_table_that_stays_where_it_is(loss_on: str) -> None:
    layers = [keras.Input((4,), dtype="int32"), keras.layers.Embedding(8192, 32)]
    model = keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(3)])
    parallel = pk.DataParallelModel(model, 2, loss_on=loss_on)
    parallel.compile("sgd", "mse")
    table = model.layers[0].embeddings.numpy()
    batch = np.arange(24, dtype="int32").reshape(6, 4), rows(6, 3)
    explanation = pk.explain(parallel, batch, repeats=1)
    assert explanation.loss_on == loss_on
    np.testing.assert_array_equal(model.layers[0].embeddings.numpy(), table)


def test_fewer_rows_than_devices_and_one_device() -> None:
    parallel = pk.DataParallelModel(mlp(), 3)
    parallel.compile("sgd", "mse")
    explanation = pk.explain(parallel, (rows(2, 6), rows(2, 3)), repeats=1)
    assert [tower.rows for tower in explanation.towers] == [1, 1, 0]
    assert explanation.verdict.cause == "small batch"
    alone = pk.DataParallelModel(mlp(), 1)
    alone.compile("sgd", "mse")
    assert pk.explain(alone, (rows(2, 6), rows(2, 3)), repeats=1).verdict.cause == "one device"


def test_eagerly_and_synchronized() -> None:
    parallel = pk.DataParallelModel(mlp(), 2)
    parallel.compile("sgd", "mse", run_eagerly=True)
    assert pk.explain(parallel, (rows(4, 6), rows(4, 3)), repeats=1).verdict.cause == "eager"
    layers = [keras.layers.BatchNormalization(synchronized=True), keras.layers.Dense(3)]
    parallel = pk.DataParallelModel(keras.Sequential([keras.Input((6,)), *layers]), 2)
    parallel.compile("sgd", "mse")
    assert len(pk.explain(parallel, (rows(5, 6), rows(5, 3)), repeats=1).towers) == 2


def test_wrong_use() -> None:
    with pytest.raises(TypeError, match=r"to be a DataParallelModel\. Received: parallel=.*Wrap"):
        pk.explain(mlp(), None)
    parallel = pk.DataParallelModel(mlp(), 2)
    with pytest.raises(ValueError, match=r"Only a compiled model.*compile\(optimizer"):
        pk.explain(parallel, (rows(4, 6), rows(4, 3)))
    with pytest.raises(ValueError, match=r"`repeats` to be at least 1\. Received: repeats=0"):
        pk.explain(parallel, (rows(4, 6), rows(4, 3)), repeats=0)

    class Own(pk.DataParallelModel):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    own = Own(mlp(), 2)
    own.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"Received: Own, which overrides `compute_loss`"):
        pk.explain(own, (rows(4, 6), rows(4, 3)))
