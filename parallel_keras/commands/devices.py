"""Lists the devices that TensorFlow sees, and how to name them.

It says what each is and how much memory it has, why GPUs may be missing, and how to hide those that
you do not want. With --check it copies known numbers from each device to each other one, and names
every pair that hangs or changes them: the fault behind "all GPUs at 100 %, no progress". It exits
with 1 if a pair fails.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any, Final

import keras
import tensorflow as tf
from absl import flags

from parallel_keras.commands import EXIT_FAILURE
from parallel_keras.devices import resolve
from parallel_keras.explaining.self_check import Fault, check_copies
from parallel_keras.hardware import (
    Card,
    built_for_gpus,
    driver_cards,
    gpu_model_and_memory,
    host_memory,
    why_no_gpus,
)

_CHECK = flags.DEFINE_bool("check", False, "Copy known numbers between all pairs of devices.")
_TIMEOUT = flags.DEFINE_float(
    "timeout", 10.0, "Seconds that one copy of --check may take.", lower_bound=0.1
)
_JSON = flags.DEFINE_bool("json", False, "Print the result as JSON.")

BAD_PAIR: Final = (
    "Leave one of the two devices out (devices=[...]) to go on. Copies between GPUs that hang or "
    "arrive changed mostly come from the IOMMU (VT-d, AMD-Vi) or PCI access control: switch it off "
    "in the BIOS, and see `nvidia-smi topo -m` and `dmesg`."
)
HIDE: Final = (
    "TensorFlow reserves memory on every GPU that it sees, also where you do not use it. To hide "
    "the others: CUDA_VISIBLE_DEVICES=0,1 python train.py"
)


def main() -> int:
    """Prints what there is; returns the exit code."""
    cards = driver_cards()
    devices = [_describe(device, cards) for device in tf.config.list_logical_devices()]
    gpus = len(tf.config.list_physical_devices("GPU"))
    missing = why_no_gpus(gpus, cards, os.environ, built=built_for_gpus())
    names = [device["name"] for device in devices]
    faults = check_copies(names, timeout=_TIMEOUT.value) if _CHECK.value else None
    if _JSON.value:
        found = {
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "devices": devices,
            "default": list(resolve()),
            "missing_gpus": missing,
            "faults": None if faults is None else [dataclasses.asdict(fault) for fault in faults],
        }
        print(json.dumps(found))
    else:
        print(_table(devices, missing, gpus))
        if faults is not None:
            print(_report(names, faults))
    if any(fault.kind == "hangs" for fault in faults or []):
        # The thread of a copy that hangs would keep the process from ending.
        sys.stdout.flush()
        os._exit(EXIT_FAILURE)
    return EXIT_FAILURE if faults else 0


def _describe(device: Any, cards: list[Card]) -> dict[str, Any]:
    """What is known of one device."""
    use = device.name.removeprefix("/device:")
    if device.device_type != "GPU":
        memory = host_memory() if device.device_type == "CPU" else None
        return {"name": device.name, "use": use, "memory_mb": memory, "model": None}
    model, memory = gpu_model_and_memory(int(use.rpartition(":")[2]), cards)
    return {"name": device.name, "use": use, "memory_mb": memory, "model": model}


def _table(devices: list[dict[str, Any]], missing: list[str], gpus: int) -> str:
    lines = [
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}",
        "",
        f"{'device':<22}{'name to use':<14}{'memory':>12}  model",
    ]
    for device in devices:
        memory = "" if device["memory_mb"] is None else f"{device['memory_mb']:,} MB"
        lines.append(
            f"{device['name']:<22}{device['use']:<14}{memory:>12}  {device['model'] or ''}"
        )
    lines += ["", f"DataParallelModel(model) uses: {', '.join(resolve())}"]
    if not gpus:
        lines.append("There is no GPU. To try several devices: parallel_keras.virtual_devices(2)")
    if gpus > 1:
        lines.append(HIDE)
    return "\n".join([*lines, *(f"Why there are not more GPUs: {reason}" for reason in missing)])


def _report(names: list[str], faults: list[Fault]) -> str:
    pairs = len(names) * (len(names) - 1)
    if not pairs:
        return "\nThere is one device, so there is nothing to copy between."
    if not faults:
        return f"\nCopies between all {pairs} pairs of devices arrived unchanged."
    lines = [f"{fault.source} -> {fault.target} {fault.kind}: {fault.detail}" for fault in faults]
    return "\n".join(["", f"{len(faults)} of {pairs} pairs do not copy right:", *lines, BAD_PAIR])
