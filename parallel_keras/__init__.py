"""Train a Keras model on all of your devices, with the same numbers as on one.

The public names are `DataParallelModel`, `multi_gpu_model`, `virtual_devices`, `explain`, `verify`
and `connect`; everything else is an implementation detail.
"""

import keras

from parallel_keras._version import __version__ as __version__

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "parallel_keras runs Keras models on TensorFlow devices, so it needs Keras' TensorFlow "
        f"backend. Received: keras.backend.backend()={keras.backend.backend()!r}. Set the "
        "environment variable KERAS_BACKEND=tensorflow before Keras is imported."
    )

from parallel_keras.devices import virtual_devices
from parallel_keras.explaining.explain import explain
from parallel_keras.model import DataParallelModel
from parallel_keras.multi_gpu import multi_gpu_model
from parallel_keras.verifying.verify import verify
from parallel_keras.workers.servers import connect

__all__ = [
    "DataParallelModel",
    "__version__",
    "connect",
    "explain",
    "multi_gpu_model",
    "verify",
    "virtual_devices",
]
