"""Wrong use says what happened, what was expected, what came and what to do."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras.graphs import graph
from parallel_keras.steps import checks
from parallel_keras.towers import losses
from parallel_keras.towers.collectives import Peers, TowerContext
from tests.parity import mlp, rows

PACKAGE = Path(pk.__file__).parent


@pytest.mark.parametrize("template", [None, "model", keras.layers.Dense(1), keras.Sequential])
def test_template_must_be_a_model(template: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected `template` to be a keras.Model. Received"):
        pk.DataParallelModel(template)


def test_template_must_be_an_instance() -> None:
    with pytest.raises(TypeError, match="create the model first"):
        pk.DataParallelModel(keras.Sequential)


def test_loss_on_is_one_of_three() -> None:
    with pytest.raises(ValueError, match=r"one of \('auto', 'merged', 'towers'\). .*loss_on='x'"):
        pk.DataParallelModel(mlp(), 2, loss_on="x")


def test_strategy_is_for_several_machines() -> None:
    with pytest.raises(TypeError, match=r"a tf.distribute.MultiWorkerMirroredStrategy.*'anything'"):
        pk.DataParallelModel(mlp(), 2, strategy="anything")


def test_workers_need_a_built_template() -> None:
    with pytest.raises(ValueError, match="no weights yet, which workers must agree on"):
        checks.check_built(keras.Sequential([keras.layers.Dense(1)]))
    checks.check_built(mlp())


def test_rules() -> None:
    with pytest.raises(TypeError, match="Expected `rules` to be a dict"):
        pk.DataParallelModel(mlp(), 2, rules=["pad"])
    with pytest.raises(ValueError, match=r"one of \(.*'pad'.*Received: rules={'boxes': 'stretch'}"):
        pk.DataParallelModel(mlp(), 2, rules={"boxes": "stretch"})


def test_merge_device_must_exist() -> None:
    with pytest.raises(ValueError, match=r"'GPU:7', which does not exist"):
        pk.DataParallelModel(mlp(), 2, merge_device="GPU:7")


def stateful() -> keras.Model:
    inputs = keras.Input((4, 3), batch_size=8)
    return keras.Model(inputs, keras.layers.LSTM(2, stateful=True, name="memory")(inputs))


def fixed_batch() -> keras.Model:
    return keras.Sequential([keras.Input((3,), batch_size=8, name="eight"), keras.layers.Dense(1)])


def test_stateful_layers_are_refused() -> None:
    """B3: https://github.com/keras-team/keras/issues/8397."""
    with pytest.raises(ValueError, match=r"Layer 'memory' is stateful.*devices=1"):
        pk.DataParallelModel(stateful(), 2)
    x = rows(8, 4, 3)
    alone = pk.DataParallelModel(stateful(), 1)
    first, second = alone.predict(x, verbose=0), alone.predict(x, verbose=0)
    assert not np.allclose(first, second)  # its state went on, as on one device


def test_fixed_batch_sizes_are_refused() -> None:
    """B3: https://github.com/keras-team/keras/issues/12295."""
    with pytest.raises(ValueError, match=r"Input 'eight.*fixed batch size.*shape=\(8, 3\)"):
        pk.DataParallelModel(fixed_batch(), 2)
    template = fixed_batch()
    x = rows(8, 3)
    np.testing.assert_array_equal(
        pk.DataParallelModel(template, 1).predict(x, verbose=0), template.predict(x, verbose=0)
    )


@pytest.mark.parametrize("how", ["jit_compile", "run_eagerly"])
def test_synchronized_layers_need_towers_that_run_together(how: str) -> None:
    layer = keras.layers.BatchNormalization(synchronized=True, name="norm")
    parallel = pk.DataParallelModel(keras.Sequential([keras.Input((3,)), layer]), 2)
    with pytest.raises(ValueError, match=rf"Layer 'norm' is synchronized.*{how}=True"):
        parallel.compile("sgd", "mse", **{how: True})


def test_towers_do_not_hold_towers() -> None:
    parallel = pk.DataParallelModel(mlp(), 2)
    with pytest.raises(ValueError, match=r"on several devices already.*CPU:1.*model\.template"):
        pk.DataParallelModel(parallel, 3)
    assert pk.DataParallelModel(parallel.template, 3).num_towers == 3


def test_missing_attribute() -> None:
    """C1: an AttributeError, never a recursion, also on an object that is half made."""
    parallel = pk.DataParallelModel(mlp(), 2)
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'.*template \(Sequential\)"):
        _ = parallel.nothing
    with pytest.raises(AttributeError, match="_private"):
        _ = parallel._private
    half = object.__new__(pk.DataParallelModel)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = half.nothing


def test_towers_reduce_sums_only() -> None:
    peers = Peers(*[tf.constant(1)] * 3, token=tf.constant(0), live=tf.constant(1.0), timeout=1.0)
    with pytest.raises(ValueError, match=r"ReduceOp.SUM"):
        TowerContext(peers).all_reduce(tf.distribute.ReduceOp.MEAN, tf.constant(1.0))


class Fails(keras.layers.Layer):
    fail = False

    def call(self, x: tf.Tensor) -> tf.Tensor:
        if self.fail:
            raise RuntimeError("out of order")
        return x


def fails_when_called() -> keras.Model:
    layer = Fails()
    model = keras.Sequential([keras.Input((3,)), layer])
    layer.fail = True
    return model


def test_errors_name_the_tower() -> None:
    parallel = pk.DataParallelModel(fails_when_called(), ["CPU:1", "CPU:2"], loss_on="merged")
    with pytest.raises(RuntimeError, match=r"(?s)out of order.*in tower 0 on device /device:CPU:1"):
        parallel(rows(4, 3))
    with pytest.raises(RuntimeError, match=r"(?s)out of order.*in tower 0 on device /device:CPU:1"):
        parallel.predict(rows(4, 3), verbose=0)


def test_another_backend_is_refused(tmp_path: Path) -> None:
    fake = tmp_path / "keras"
    fake.mkdir()
    (fake / "__init__.py").write_text(
        "class backend:\n    @staticmethod\n    def backend():\n        return 'jax'\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PACKAGE.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", "import parallel_keras"],
        env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "ImportError: parallel_keras runs Keras models on TensorFlow devices" in done.stderr
    assert "keras.backend.backend()='jax'" in done.stderr
    assert "KERAS_BACKEND=tensorflow" in done.stderr


def test_empty_batches_are_not_trained_on() -> None:
    """N1: on one device they turn every weight into NaN."""
    parallel = pk.DataParallelModel(mlp(), 2)
    parallel.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"at least one row.*a batch of 0 rows"):
        parallel.train_on_batch(np.zeros((0, 6)), np.zeros((0, 3)))


# Every raise of the package, each with a test that matches its message. One that is new must be
# tested and added here.
RAISES = {
    "_compat.py": 1,
    "towers/findings.py": 4,
    "towers/function.py": 1,
    "towers/recompute.py": 1,
    "towers/scope.py": 1,
    "__init__.py": 1,
    "_public.py": 1,
    "keras_api/answers.py": 1,
    "steps/building.py": 1,
    "steps/checks.py": 18,
    "steps/direct_calls.py": 2,
    "devices.py": 15,
    "explaining/explain.py": 4,
    "explaining/timeline.py": 1,
    "steps/any_call.py": 1,
    "steps/calls.py": 1,
    "steps/runtime.py": 1,
    "steps/loss_on_towers.py": 3,
    "merge.py": 2,
    "model.py": 1,
    "multi_gpu.py": 3,
    "keras_api/old_weights.py": 6,
    "towers/collectives.py": 1,
    "graphs/graph.py": 1,
    "graphs/outputs.py": 3,
    "graphs/sparse.py": 1,
    "towers/state.py": 1,
    "explaining/self_check.py": 1,
    "shard.py": 2,
    "towers/results.py": 2,
    "towers/run.py": 2,
    "verifying/verify.py": 2,
    "workers/agreement.py": 1,
    "workers/cluster.py": 11,
    "workers/connection.py": 2,
    "workers/exchange.py": 1,
    "workers/feeding.py": 1,
    "workers/listening.py": 2,
    "workers/own_rows.py": 4,
    "workers/roll_call.py": 3,
    "workers/server_checks.py": 3,
    "workers/servers.py": 9,
}


def test_every_raise_is_known() -> None:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        # They end the program, see tests of the commands.
        if name != "__main__.py" and not name.startswith(("commands/", "measuring/")):
            tree = ast.parse(path.read_text())
            found[name] = sum(isinstance(node, ast.Raise) for node in ast.walk(tree))
    assert {name: count for name, count in found.items() if count} == RAISES


def test_models_of_keras_2_are_recognised() -> None:
    with pytest.raises(TypeError, match=r"type object\).*tf_keras .Keras 2. must be rebuilt"):
        pk.DataParallelModel(object())


@pytest.mark.parametrize("make", [stateful, fixed_batch])
def test_one_tower_runs_any_template(make: Any) -> None:
    checks.check_template(make(), 1)
    with pytest.raises(ValueError, match=r"(of|among) 2 devices"):
        checks.check_template(make(), 2)


def test_one_tower_compiles_synchronized_layers() -> None:
    layer = keras.layers.BatchNormalization(synchronized=True)
    parallel = pk.DataParallelModel(keras.Sequential([keras.Input((3,)), layer]), 1)
    parallel.compile("sgd", "mse", run_eagerly=True)
    checks.check_compile(parallel.template, 1, jit=True)
    with pytest.raises(ValueError, match=r"over 2 devices.*jit_compile=True"):
        checks.check_compile(parallel.template, 2, jit=True)


def test_loss_on_towers_needs_a_sum_over_rows() -> None:
    checks.check_towers_loss(losses.decide("mse"))
    with pytest.raises(ValueError, match=r'Dice looks at.*loss_on="towers".*loss_on="auto"'):
        checks.check_towers_loss(losses.decide(keras.losses.Dice()))
    parallel = pk.DataParallelModel(mlp(), 2, loss_on="towers")
    parallel.compile("sgd", keras.losses.Dice())
    with pytest.raises(ValueError, match="Dice looks at several rows at once"):
        parallel.fit(rows(4, 6), rows(4, 3), verbose=0)


def test_outputs_are_not_merged_unasked() -> None:
    cause = RuntimeError("found while tracing")
    checks.check_may_merge("auto", cause)
    with pytest.raises(ValueError, match="has a mask, no axis besides rows") as caught:
        checks.check_may_merge("towers", cause)
    assert caught.value.__cause__ is cause


@pytest.mark.parametrize("loss_on", ["auto", "towers"])
def test_outputs_of_rank_1_need_the_whole_batch(loss_on: str) -> None:
    """The signal between the two paths never reaches the user."""
    template = keras.Sequential([keras.Input((6,)), keras.layers.Lambda(lambda x: x[:, 0])])
    parallel = pk.DataParallelModel(template, 2, loss_on=loss_on)
    parallel.compile("sgd", "mse")
    if loss_on == "auto":
        parallel.evaluate(rows(4, 6), rows(4), verbose=0)
        return
    with pytest.raises(ValueError, match="no axis besides rows"):
        parallel.evaluate(rows(4, 6), rows(4), verbose=0)


class FailsLate(keras.layers.Layer):
    """Raises what it is told to, for the tower whose first row begins with 7."""

    error: Exception | None = None

    def call(self, x: tf.Tensor) -> tf.Tensor:
        if self.error is not None and float(x[0, 0]) == 7:
            raise self.error
        return x


def test_errors_name_the_tower_that_failed() -> None:
    """The second one, where each runs by itself."""
    layer = FailsLate()
    parallel = pk.DataParallelModel(
        keras.Sequential([keras.Input((3,)), layer]), ["CPU:1", "CPU:3"]
    )
    parallel.compile("sgd", "mse", run_eagerly=True)
    layer.error = RuntimeError("out of order")
    x = np.zeros((4, 3), "float32")
    parallel(x)
    x[2] = 7
    with pytest.raises(RuntimeError, match=r"(?s)out of order.*in tower 1 on device /device:CPU:3"):
        parallel(x)


@pytest.mark.parametrize("arguments", [(), (404,), (404, "not found")])
def test_errors_without_a_message_are_left_alone(arguments: tuple[Any, ...]) -> None:
    error = RuntimeError(*arguments)
    with pytest.raises(RuntimeError) as caught, graph.naming_tower(0, "/device:CPU:1"):
        raise error
    assert caught.value is error
    assert error.args == arguments


def test_private_names_are_not_handed_on() -> None:
    """Keras asks for them to find out what an object is."""
    template = mlp()
    template.own, template._own = 1, 2
    parallel = pk.DataParallelModel(template, 2)
    assert parallel.own == 1
    with pytest.raises(AttributeError, match="no attribute '_own'"):
        _ = parallel._own
