"""Loads files of others: the public door to what `multi_gpu_model` of Keras 2 wrote."""

from parallel_keras.keras_api.old_weights import load_multi_gpu_weights

__all__ = ["load_multi_gpu_weights"]
