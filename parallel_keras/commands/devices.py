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

from absl import flags

from parallel_keras.commands import EXIT_FAILURE, _flags

_CHECK = flags.DEFINE_bool("check", False, "Copy known numbers between all pairs of devices.")
_TIMEOUT = flags.DEFINE_float(
    "timeout", 10.0, "Seconds that one copy of --check may take.", lower_bound=0.1
)
_JSON = _flags.define_json()


def main() -> int:
    """Prints what there is; returns the exit code."""
    from parallel_keras.commands import device_table  # starts TensorFlow
    from parallel_keras.explaining.self_check import check_copies

    found = device_table.find()
    names = [device["name"] for device in found["devices"]]
    faults = check_copies(names, timeout=_TIMEOUT.value) if _CHECK.value else None
    if _JSON.value:
        listed = None if faults is None else [dataclasses.asdict(fault) for fault in faults]
        print(json.dumps({**found, "faults": listed}))
    else:
        print(device_table.table(found))
        if faults is not None:
            print(device_table.report(names, faults))
    if any(fault.kind == "hangs" for fault in faults or []):
        # The thread of a copy that hangs would keep the process from ending.
        sys.stdout.flush()
        os._exit(EXIT_FAILURE)
    return EXIT_FAILURE if faults else 0
