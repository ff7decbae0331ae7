"""What `devices` finds, and how it is shown."""

from __future__ import annotations

import os
from typing import Any, Final

import keras
import tensorflow as tf

from parallel_keras.devices import resolve
from parallel_keras.explaining.self_check import Fault
from parallel_keras.hardware import (
    Card,
    built_for_gpus,
    driver_cards,
    gpu_model_and_memory,
    host_memory,
    why_no_gpus,
)

BAD_PAIR: Final = (
    "Leave one of the two devices out (devices=[...]) to go on. Copies between GPUs that hang or "
    "arrive changed mostly come from the IOMMU (VT-d, AMD-Vi) or PCI access control: switch it off "
    "in the BIOS, and see `nvidia-smi topo -m` and `dmesg`."
)
HIDE: Final = (
    "TensorFlow reserves memory on every GPU that it sees, also where you do not use it. To hide "
    "the others: CUDA_VISIBLE_DEVICES=0,1 python train.py"
)


def find() -> dict[str, Any]:
    """The devices, those that a wrapper takes by default, and why there are no more GPUs."""
    cards = driver_cards()
    gpus = len(tf.config.list_physical_devices("GPU"))
    return {
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "devices": [_describe(device, cards) for device in tf.config.list_logical_devices()],
        "default": list(resolve()),
        "missing_gpus": why_no_gpus(gpus, cards, os.environ, built=built_for_gpus()),
    }


def table(found: dict[str, Any]) -> str:
    """What was found, as text."""
    devices = found["devices"]
    gpus = sum(device["use"].startswith("GPU:") for device in devices)
    lines = [
        f"TensorFlow {found['tensorflow']}, Keras {found['keras']}",
        "",
        f"{'device':<22}{'name to use':<14}{'memory':>12}  model",
    ]
    for device in devices:
        memory = "" if device["memory_mb"] is None else f"{device['memory_mb']:,} MB"
        lines.append(
            f"{device['name']:<22}{device['use']:<14}{memory:>12}  {device['model'] or ''}"
        )
    lines += ["", f"DataParallelModel(model) uses: {', '.join(found['default'])}"]
    if not gpus:
        lines.append("There is no GPU. To try several devices: parallel_keras.virtual_devices(2)")
    if gpus > 1:
        lines.append(HIDE)
    return "\n".join(
        [*lines, *(f"Why there are not more GPUs: {reason}" for reason in found["missing_gpus"])]
    )


def report(names: list[str], faults: list[Fault]) -> str:
    """What the check found, as text."""
    pairs = len(names) * (len(names) - 1)
    if not pairs:
        return "\nThere is one device, so there is nothing to copy between."
    if not faults:
        return f"\nCopies between all {pairs} pairs of devices arrived unchanged."
    lines = [f"{fault.source} -> {fault.target} {fault.kind}: {fault.detail}" for fault in faults]
    return "\n".join(["", f"{len(faults)} of {pairs} pairs do not copy right:", *lines, BAD_PAIR])


def _describe(device: Any, cards: list[Card]) -> dict[str, Any]:
    """What is known of one device."""
    use = device.name.removeprefix("/device:")
    if device.device_type != "GPU":
        memory = host_memory() if device.device_type == "CPU" else None
        return {"name": device.name, "use": use, "memory_mb": memory, "model": None}
    model, memory = gpu_model_and_memory(int(use.rpartition(":")[2]), cards)
    return {"name": device.name, "use": use, "memory_mb": memory, "model": model}
