"""Eight CPU devices for the tests in tests/ and for the doctests in parallel_keras/.

With `PARALLEL_KERAS_TEST_DEVICES=GPU` there are four GPUs beside them, all split from the first
card; then whatever asks for a number of devices gets those.

TensorFlow reads all of this once, when its runtime starts, so it is set while pytest loads this
file: before it collects, and thereby imports, anything that could start the runtime.
"""

from __future__ import annotations

import gc
import os
import random

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras import hardware

LOGICAL_CPUS = 8
FEWEST_LOGICAL_CPUS = 4
LOGICAL_GPUS = 4
# A card also holds what CUDA itself needs, and the tests' models are small.
SHARE_OF_CARD = 0.8
LEAST_MEMORY = 8192  # megabytes, where the driver does not say


def split_gpu() -> str:
    """Splits the first GPU.

    Returns:
        Why that cannot be; empty if it is done.
    """
    cards = hardware.driver_cards()
    if not tf.config.list_physical_devices("GPU"):
        built = hardware.built_for_gpus()
        reasons = hardware.why_no_gpus(0, cards, os.environ, built=built)
        return (
            "PARALLEL_KERAS_TEST_DEVICES=GPU asks for tests on a GPU, but no GPU was found, so "
            f"nothing was tested. {' '.join(reasons)}"
        )
    memory = min((card.memory for card in cards), default=LEAST_MEMORY)
    pk.virtual_devices(LOGICAL_GPUS, "GPU", int(memory * SHARE_OF_CARD) // LOGICAL_GPUS)
    # With its 10 bits, towers and one device would differ by what the tests must not overlook.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    return ""


# More threads inside one operation would only fight the other towers for the same cores.
tf.config.threading.set_intra_op_parallelism_threads(1)
# Within one step several towers may each hold a thread while they wait for each other: with fewer
# threads than towers, which is the default on a machine with few cores, that step never ends.
tf.config.threading.set_inter_op_parallelism_threads(LOGICAL_CPUS)
# TensorFlow's modules and each trace are many objects that live on: by its own thresholds Python
# would look at them again and again, for one twentieth of the tests' time.
gc.set_threshold(50_000, 20, 20)
ON_GPUS = os.environ.get("PARALLEL_KERAS_TEST_DEVICES", "CPU") == "GPU"
WHY_NO_GPU = split_gpu() if ON_GPUS else ""
pk.virtual_devices(LOGICAL_CPUS)


def pytest_configure() -> None:
    """Ends the run where there is not what it was asked for."""
    if WHY_NO_GPU:
        pytest.exit(WHY_NO_GPU, returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.fixture(scope="session", autouse=True)
def enough_devices() -> None:
    """Fails at once where the split did not happen, instead of in each test that needs devices."""
    found = len(tf.config.list_logical_devices("CPU"))
    if found < FEWEST_LOGICAL_CPUS:
        pytest.exit(
            "The tests need several logical CPUs, but TensorFlow's runtime was started before "
            f"they were set up. Expected: at least {FEWEST_LOGICAL_CPUS}. Received: "
            f"logical_cpus={found}. Start pytest from the top of the repository, and with no "
            "plugin that runs TensorFlow.",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )


@pytest.fixture(autouse=True)
def same_weights(request: pytest.FixtureRequest) -> None:
    """Lets a test start from the same weights in each run, so that one that fails fails again.

    Keras draws the seed of an initializer from Python's generator. TensorFlow's global seed stays
    as it is: with one, operations without a seed of their own draw otherwise. Another
    `PARALLEL_KERAS_TEST_SEED` gives all tests other weights.
    """
    seed = os.environ.get("PARALLEL_KERAS_TEST_SEED", "0")
    random.seed(f"{seed} {request.node.nodeid}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves most cases of long sweeps to `make test-ci`, and puts long files first."""
    from tests.sweeps import longest_first, mark_rest

    mark_rest(items)
    longest_first(items)
