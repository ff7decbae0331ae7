"""What the cost model says of GPUs, as Markdown. No figure of it was measured on a GPU.

Run as `python -m benchmarks.gpus`. Assumptions and sources are in docs/scaling.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.cost_model import Exchange, Links, Phase, one_place, ring, spread, step

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Network:
    """What matters of a model.

    Attributes:
        name: String.
        parameters: How many weights.
        large: How many tensors of them have at least `PACKED` bytes; the others hardly count by
            their bytes, and go as one message.
        flops: Floating point operations to train on one row: three times those of a prediction.
        batch: Rows on one device.
    """

    name: str
    parameters: float
    large: int
    flops: float
    batch: int

    @property
    def bytes(self) -> float:
        """The weights in float32, and so the gradients."""
        return 4 * self.parameters


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where weights live, and what joins the devices.

    Attributes:
        name: String.
        weights: `"cpu"`, `"gpu"` (the first one), `"spread"`, or `"ring"`: copies on all, as
            all-reduce has them.
        links: The `Links` of the GPUs.
        overlap: Whether gradients travel while earlier layers still compute theirs.
    """

    name: str
    weights: str
    links: Links
    overlap: bool = False


PACKED = 2**16
# One multiplication and addition are two operations; a step is three predictions.
NETWORKS = (
    Network("ResNet50 224x224", 25.6e6, 52, 3 * 2 * 3.9e9, 64),
    Network("Xception 299x299", 22.9e6, 38, 3 * 2 * 8.4e9, 64),
    Network("BERT-base, 128 tokens", 110e6, 75, 6 * 110e6 * 128, 64),
)
# An A100 does 312e12 operations a second at most; well-kept programs reach about a third.
FLOPS = 0.35 * 312e12
BACKWARD = 2 / 3  # of the operations of a step
PCIE = 25 * GB  # of the 32 GB/s of PCIe 4 x16 in one direction
NVLINK = 250 * GB  # of the 300 GB/s of NVLink 3 in one direction
HOST = 100 * GB  # that all PCIe links of a host carry together
CPU_MEMORY, GPU_MEMORY = 50 * GB, 1400 * GB  # with which each works through its own memory
MESSAGE = 10e-6  # seconds from one GPU to another, whatever the size
BY_PCIE, BY_NVLINK = Links(PCIE, HOST, MESSAGE), Links(NVLINK, latency=MESSAGE)
MACHINES = (
    Machine("all on CPU, PCIe 4", "cpu", BY_PCIE),
    Machine("all on one GPU, PCIe 4", "gpu", BY_PCIE),
    Machine("spread, PCIe 4", "spread", BY_PCIE),
    Machine("spread, overlap, PCIe 4", "spread", BY_PCIE, overlap=True),
    Machine("all-reduce, overlap, PCIe 4", "ring", BY_PCIE, overlap=True),
    Machine("spread, NVLink 3", "spread", BY_NVLINK),
)
# Adam reads gradient, weight and two slots, and writes three of them.
UPDATE_PASSES = 7
BETWEEN_MACHINES = Links(100e9 / 8)
DEVICES = (1, 2, 4, 8)
WORKERS = (1, 2, 8, 64)


def moves(network: Network, machine: Machine, devices: int) -> Exchange:
    """What moves in a step."""
    size, packs = network.bytes, network.large + 1
    if machine.weights == "cpu":
        # The host has a link to each GPU, so none carries more than the weights.
        phase = Phase(size, devices * size, devices * packs)
        return phase, phase
    if machine.weights == "gpu":
        return one_place(size, packs, devices - 1)
    if machine.weights == "ring":
        return ring(size, devices)
    # Small weights go as one message from each device to each.
    out, back = spread(size, network.large, devices)
    few = devices - 1
    return (
        dataclasses.replace(out, messages=out.messages + few),
        dataclasses.replace(back, messages=back.messages + few),
    )


def update(network: Network, machine: Machine, devices: int) -> float:
    """Seconds to add up gradients and update the weights, where each of them lives."""
    passes = UPDATE_PASSES + (devices + 1 if devices > 1 and machine.weights != "ring" else 0)
    share = 1 / devices if machine.weights == "spread" else 1
    memory = CPU_MEMORY if machine.weights == "cpu" else GPU_MEMORY
    return share * passes * network.bytes / memory


def step_on(network: Network, machine: Machine, devices: int, batch: int) -> float:
    """Seconds of a training step of so many rows on each device."""
    towers = batch * network.flops / FLOPS
    compute = towers + update(network, machine, devices)
    hidden = BACKWARD * towers if machine.overlap else 0.0
    if devices == 1 and machine.weights != "cpu":
        return compute
    return step(compute, moves(network, machine, devices), machine.links, hidden)


def bare_step(network: Network, batch: int) -> float:
    """Seconds of a step of the bare model on one GPU."""
    return batch * network.flops / FLOPS + UPDATE_PASSES * network.bytes / GPU_MEMORY


def speed_up(network: Network, machine: Machine, devices: int, batch: int) -> float:
    """How many times as many rows a second as the bare model, with `batch` rows on each device."""
    return devices * bare_step(network, batch) / step_on(network, machine, devices, batch)


def workers_speed_up(network: Network, machine: Machine, workers: int, batch: int) -> float:
    """The same over machines with 8 devices each, whose gradients meet in a ring."""
    alone = step_on(network, machine, 8, batch)
    time = step(alone, ring(network.bytes, workers), BETWEEN_MACHINES)
    return 8 * workers * bare_step(network, batch) / time


def by_devices() -> str:
    """The speed-up for each number of devices, as Markdown."""
    lines = ["| model | devices | " + " | ".join(m.name for m in MACHINES) + " |"]
    lines.append("|---|---:|" + "---:|" * len(MACHINES))
    for network in NETWORKS:
        for devices in DEVICES:
            cells = [_cell(speed_up(network, m, devices, network.batch)) for m in MACHINES]
            lines.append(f"| {network.name} | {devices} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_batch(batches: Sequence[int] = (16, 64, 256)) -> str:
    """The speed-up on 8 devices for small and large batches, as Markdown."""
    lines = ["| model, 8 devices | rows on each | " + " | ".join(m.name for m in MACHINES) + " |"]
    lines.append("|---|---:|" + "---:|" * len(MACHINES))
    for network in NETWORKS:
        for batch in batches:
            cells = [_cell(speed_up(network, m, 8, batch)) for m in MACHINES]
            lines.append(f"| {network.name} | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_workers() -> str:
    """The speed-up over machines of 8 GPUs, as Markdown."""
    machine = MACHINES[-1]
    lines = [f"| model, {machine.name} | " + " | ".join(f"{8 * w} GPUs" for w in WORKERS) + " |"]
    lines.append("|---|" + "---:|" * len(WORKERS))
    for network in NETWORKS:
        cells = [_cell(workers_speed_up(network, machine, w, network.batch)) for w in WORKERS]
        lines.append(f"| {network.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


if __name__ == "__main__":
    print(by_devices(), by_batch(), by_workers(), sep="\n\n")
