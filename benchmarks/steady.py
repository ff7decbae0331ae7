"""Whether memory stays: over epochs, and over wrapping again and again.

Run as `python -m benchmarks.steady PEER CYCLES`, where PEER is bare or ours; prints JSON.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable

import keras
import numpy as np
import psutil

import parallel_keras as pk
from parallel_keras.measuring.runner import prepare


def _model() -> keras.Model:
    dense = keras.layers.Dense
    return keras.Sequential([keras.Input((64,)), dense(256, activation="relu"), dense(10)])


def _compiled(model: keras.Model) -> keras.Model:
    model.compile("adam", "mse", metrics=["mae"])
    return model


def held(do: Callable[[], None], cycles: int) -> list[int]:
    """Bytes that the process holds after each call."""
    process, sizes = psutil.Process(), []
    for _ in range(cycles):
        do()
        gc.collect()
        sizes.append(process.memory_info().rss)
    return sizes


def main() -> None:
    """Prints the bytes held after each epoch and each cycle of wrapping."""
    peer, cycles = sys.argv[1], int(sys.argv[2])
    devices = prepare(2)
    random = np.random.default_rng(0)
    x, y = random.random((1000, 64), "float32"), random.random((1000, 10), "float32")

    def wrap(model: keras.Model) -> keras.Model:
        return pk.DataParallelModel(model, devices) if peer == "ours" else model

    model, again = _compiled(wrap(_model())), _model()

    def epoch() -> None:
        model.fit(x, y, batch_size=64, verbose=0)
        model.evaluate(x, y, batch_size=64, verbose=0)
        model.predict(x, batch_size=64, verbose=0)

    def cycle() -> None:
        _compiled(wrap(again)).fit(x, y, batch_size=64, verbose=0)

    print(json.dumps({"epochs": held(epoch, cycles), "wraps": held(cycle, cycles)}))


if __name__ == "__main__":
    main()
