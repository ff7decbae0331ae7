"""What scripts do that use servers on other machines.

Arguments: what to do, the timeout, this script's own address or `-`, and the servers' addresses.
Writes `equal` when the numbers were those of one device, a line for each step of a longer training,
and `failed` after an error, with the time and what it said.
"""

import os
import sys
import time
import traceback

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import parallel_keras as pk
from tests import remote_client
from tests.parity import mlp
from tests.worker_faults import FAILED, Progress, data


def check_numbers(devices: list[str]) -> None:
    """Everything that two servers on loopback are tested for, with all servers."""
    remote_client.REMOTE = devices
    remote_client.equals_one_device(mlp, devices, "towers")
    remote_client.equals_one_device(mlp, ["CPU:1", *devices], "merged")
    remote_client.equals_one_device(
        lambda: remote_client.normalised(synchronized=True), devices, "auto"
    )
    remote_client.looks_words_up("towers")


def check_some_numbers(devices: list[str]) -> None:
    remote_client.equals_one_device(mlp, devices, "towers")


def train_long(template: keras.Model, devices: list[str], pause: float) -> None:
    """One `fit` until it fails, or for six minutes."""
    model = pk.DataParallelModel(template, devices)
    model.compile("adam", "mse")
    callbacks = [Progress(pause)]
    model.fit(*data(), batch_size=4, epochs=200, verbose=0, shuffle=False, callbacks=callbacks)


def main() -> None:
    task, timeout, own, *addresses = sys.argv[1:]
    pk.virtual_devices(2)
    tf.config.threading.set_inter_op_parallelism_threads(6)
    devices = pk.connect(addresses, None if own == "-" else own, timeout=float(timeout))
    print(f"connected {devices}", flush=True)
    assert len(devices) == len(addresses)
    if task == "numbers":
        check_numbers(devices)
    else:
        check_some_numbers(devices)
    print("equal", flush=True)
    keras.utils.set_random_seed(7)
    if task in ("train", "anew"):
        train_long(mlp(), devices, 0.3)
    elif task == "train synchronized":  # Servers exchange sums with each other.
        train_long(remote_client.normalised(synchronized=True), devices, 0.3)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # noqa: BLE001 (the test judges it)
        traceback.print_exc()
        print(f"{time.time()} {type(error).__name__}: {error}", flush=True)
        print("failed", flush=True)
        sys.exit(FAILED)
