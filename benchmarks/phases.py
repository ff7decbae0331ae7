"""Where the time of a training step goes, from a trace of TensorFlow's profiler.

At each moment of the traced steps it is looked which operations run, on any thread.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

# The profiler's own viewer is a package of its own; TensorFlow carries the format that it reads.
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from benchmarks.names import ALONE, MERGE, NOTHING, PHASES, SIDE_BY_SIDE, UPDATE
from parallel_keras.measuring.runner import Contender

OPERATION = re.compile(r"^(?P<node>[^: ][^:]*):_?[A-Z]\w*$")
Event = tuple[float, float, str]  # start, end, "tower", "update" or "merge"


def profile(contender: Contender, steps: int) -> dict[str, Any]:
    """Trains so many steps under the profiler.

    Returns:
        For each phase its share of the time, and the milliseconds of a step.
    """
    contender.train(2)
    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            contender.train(steps)
        (file,) = Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(file.read_bytes())
    model = getattr(contender.model, "template", contender.model)
    names = tuple(layer.name for layer in model.layers)
    events = list(_operations(space, names, contender.model.optimizer.name))
    towers = getattr(contender.model, "num_towers", 1)
    spent = sweep(events, towers)
    total = sum(spent.values())
    return {"shares": {phase: spent[phase] / total for phase in PHASES}}


def sweep(events: Iterable[Event], towers: int) -> Counter[str]:
    """Seconds spent in each phase, from the first event to the last.

    Args:
        events: Operations; those of one thread do not overlap.
        towers: How many towers there are.
    """
    edges = sorted(
        edge for start, end, kind in events for edge in ((start, 1, kind), (end, -1, kind))
    )
    spent: Counter[str] = Counter(dict.fromkeys(PHASES, 0.0))
    running: Counter[str] = Counter()
    before = edges[0][0] if edges else 0.0
    for now, change, kind in edges:
        spent[_phase(running, towers)] += now - before
        running[kind] += change
        before = now
    return spent


def _phase(running: Counter[str], towers: int) -> str:
    busy = sum(running.values())
    if running["tower"] >= min(towers, 2) or (running["tower"] and busy >= 2):
        return SIDE_BY_SIDE
    if running["tower"]:
        return ALONE
    if running["update"]:
        return UPDATE
    return MERGE if busy else NOTHING


def _operations(
    space: xplane_pb2.XSpace, layers: tuple[str, ...], optimizer: str
) -> Iterator[Event]:
    for plane in space.planes:
        if not plane.name.startswith("/host:CPU"):
            continue
        for line in plane.lines:
            for event in line.events:
                match = OPERATION.match(plane.event_metadata[event.metadata_id].name)
                if match and event.duration_ps and "terator" not in match["node"]:
                    start = line.timestamp_ns * 1e-9 + event.offset_ps * 1e-12
                    kind = _kind(match["node"], layers, optimizer)
                    yield start, start + event.duration_ps * 1e-12, kind


def _kind(node: str, layers: tuple[str, ...], optimizer: str) -> str:
    parts = node.split("/")
    if optimizer in parts:
        return "update"
    # A name that is taken gets a number behind it.
    inside = any(
        part == name or re.match(rf"{name}_\d+$", part) for part in parts for name in layers
    )
    return "tower" if inside or "gradient_tape" in parts else "merge"
