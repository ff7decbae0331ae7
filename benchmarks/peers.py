"""The ways of training one model that are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

import parallel_keras as pk

Make = Callable[[], keras.Model]


def bare(make: Make, devices: Sequence[str]) -> keras.Model:
    """The model itself, on the first device."""
    del devices
    return make()


def ours(make: Make, devices: Sequence[str]) -> keras.Model:
    """The model in a `DataParallelModel`."""
    return pk.DataParallelModel(make(), list(devices))


def spread(make: Make, devices: Sequence[str]) -> keras.Model:
    """The same, with each weight on one of the devices."""
    return pk.DataParallelModel(make(), list(devices), weights_on="spread")


def mirrored(make: Make, devices: Sequence[str]) -> keras.Model:
    """The model under `tf.distribute.MirroredStrategy`, as its guide shows."""
    with tf.distribute.MirroredStrategy(list(devices)).scope():
        return make()


# The bare model on half of the rows: what each of two towers has to do, with nothing to share.
HALF = "half"
PEERS = {"bare": bare, HALF: bare, "ours": ours, "spread": spread, "mirrored": mirrored}
