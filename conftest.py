"""Eight CPU devices for the tests in tests/ and for the doctests in parallel_keras/.

TensorFlow reads all of this once, when its runtime starts, so it is set while pytest loads this
file: before it collects, and thereby imports, anything that could start the runtime.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest
import tensorflow as tf

import parallel_keras as pk

LOGICAL_CPUS = 8
FEWEST_LOGICAL_CPUS = 4

# More threads inside one operation would only fight the other towers for the same cores.
tf.config.threading.set_intra_op_parallelism_threads(1)
# Within one step several towers may each hold a thread while they wait for each other: with fewer
# threads than towers, which is the default on a machine with few cores, that step never ends.
tf.config.threading.set_inter_op_parallelism_threads(LOGICAL_CPUS)
pk.virtual_devices(LOGICAL_CPUS)


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
