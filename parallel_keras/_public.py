"""All public names. Importing it starts Keras and TensorFlow, which takes seconds."""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "parallel_keras runs Keras models on TensorFlow devices, so it needs Keras' TensorFlow "
        f"backend. Received: keras.backend.backend()={keras.backend.backend()!r}. Set the "
        "environment variable KERAS_BACKEND=tensorflow before Keras is imported."
    )

from parallel_keras.devices import virtual_devices
from parallel_keras.explaining.explain import explain
from parallel_keras.explaining.explanation import Explanation
from parallel_keras.keras_api.old_weights import load_multi_gpu_weights
from parallel_keras.model import DataParallelModel
from parallel_keras.multi_gpu import multi_gpu_model
from parallel_keras.verifying.verify import verify
from parallel_keras.workers.roll_call import check_workers
from parallel_keras.workers.servers import connect

__all__ = [
    "DataParallelModel",
    "Explanation",
    "check_workers",
    "connect",
    "explain",
    "load_multi_gpu_weights",
    "multi_gpu_model",
    "verify",
    "virtual_devices",
]
