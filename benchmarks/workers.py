"""Time of one training step on two worker processes: computing, exchanging, and the bytes sent.

Run as `python -m benchmarks.workers`; prints one line of JSON for each size of model. Both
processes share the cores of this machine, so only the exchange is what it would be elsewhere:
loopback is quicker than most networks.
"""

import json
import os
import socket
import statistics
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import parallel_keras as pk
from parallel_keras.measuring.clock import StepClock
from parallel_keras.workers import cluster

FLAGS = flags.FLAGS
flags.DEFINE_list("units", ["64", "512", "2048"], "Widths of the dense net that is trained.")
flags.DEFINE_integer("steps", 30, "Steps that are timed, after five that are not.", lower_bound=1)
flags.DEFINE_integer("batch", 64, "Rows of the whole batch.", lower_bound=1)
flags.DEFINE_boolean("worker", False, "Whether this is one of the two processes.")
WARM_UP = 5
WORKERS = 2


def build(units: int) -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(units, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((256,)), *layers, keras.layers.Dense(10)])
    model.compile("sgd", "mse")
    return model


def step_seconds(model: keras.Model, rows: int) -> float:
    """The median time of a step."""
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, 256)).astype("float32")
    y = random.normal(size=(rows, 10)).astype("float32")
    data = tf.data.Dataset.from_tensors((x, y)).repeat(FLAGS.steps + WARM_UP)
    options = tf.data.Options()
    options.autotune.enabled = False
    clock = StepClock()
    model.fit(data.with_options(options), verbose=0, callbacks=[clock])
    return statistics.median(clock.seconds()[WARM_UP - 1 :])


def worker() -> None:
    """Measures as one of two processes; the first one prints."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    for units in map(int, FLAGS.units):
        # What one worker computes in a step, while the other one does so too.
        compute = step_seconds(build(units), FLAGS.batch // WORKERS)
        model = pk.DataParallelModel(build(units), ["CPU:0"], strategy=strategy)
        step = step_seconds(model, FLAGS.batch)
        if strategy.cluster_resolver.task_id == 0:
            line = {
                "parameters": model.count_params(),
                "step_ms": round(1e3 * step, 2),
                "compute_ms": round(1e3 * compute, 2),
                "exchange_and_merge_ms": round(1e3 * (step - compute), 2),
                "bytes_sent": model.bytes_per_step,
            }
            print(json.dumps(line), flush=True)


def main(argv: list[str]) -> None:
    """Starts two processes, or is one of them."""
    if FLAGS.worker:
        worker()
        return
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(WORKERS)]
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    command = [sys.executable, "-m", "benchmarks.workers", "--worker", *argv[1:]]
    command += [f"--units={','.join(FLAGS.units)}", f"--steps={FLAGS.steps}"]
    command += [f"--batch={FLAGS.batch}"]
    processes = [
        subprocess.Popen(command, env=os.environ | {"TF_CONFIG": cluster.write(addresses, index)})
        for index in range(WORKERS)
    ]
    try:
        for process in processes:
            process.wait(600)
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    app.run(main)
