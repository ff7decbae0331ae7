"""The process that measures one workload with one peer on so many devices.

Started by the harness with a JSON spec; answers the commands of `parallel_keras.measuring.runner`
and `profile`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks import phases
from benchmarks.peers import HALF, PEERS
from benchmarks.workloads import WORKLOADS
from parallel_keras.measuring.runner import Contender, prepare, serve


def make(spec: dict[str, Any], devices: list[str]) -> Contender:
    """The model of a spec with its batch."""
    workload = WORKLOADS[spec["workload"]]
    x, y = workload.data()
    rows = len(x) // 2 if spec["peer"] == HALF else len(x)
    return Contender(PEERS[spec["peer"]](workload.compiled, devices), x[:rows], y[:rows])


def main() -> None:
    """Serves the spec in the first argument."""
    spec = json.loads(sys.argv[1])
    devices = prepare(spec["devices"], spec.get("core"))
    serve(lambda: make(spec, devices), {"profile": phases.profile})


if __name__ == "__main__":
    main()
