"""A model of a training step on GPUs that nobody here has: what moves, and how long it takes.

Run as `python -m benchmarks.cost_model`; prints Markdown tables. No figure of it was measured on a
GPU. A step is the sum of what cannot overlap in this library: weights go to every device, towers
run, gradients come back and are added up, the optimizer updates the weights. Assumptions and
sources are in docs/scaling.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Network:
    """What matters of a model.

    Attributes:
        name: String.
        parameters: How many weights.
        flops: Floating point operations to train on one row: three times those of a prediction.
        batch: Rows on one device.
    """

    name: str
    parameters: float
    flops: float
    batch: int

    @property
    def bytes(self) -> float:
        """The weights in float32, and so the gradients."""
        return 4 * self.parameters


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where weights live, where gradients are merged, and what joins the devices.

    Attributes:
        name: String.
        weights: `"gpu"`, the first one, or `"cpu"`.
        merge: `"gpu"`, the first one, or `"cpu"`.
        peers: Bytes a second from one GPU to others or back, through its own link.
    """

    name: str
    weights: str
    merge: str
    peers: float


# One multiplication and addition are two operations; a step is three predictions.
NETWORKS = (
    Network("ResNet50 224x224", 25.6e6, 3 * 2 * 3.9e9, 64),
    Network("Xception 299x299", 22.9e6, 3 * 2 * 8.4e9, 64),
    Network("BERT-base, 128 tokens", 110e6, 6 * 110e6 * 128, 64),
)
# An A100 does 312e12 operations a second at most; well-kept programs reach about a third.
FLOPS = 0.35 * 312e12
PCIE = 25 * GB  # of the 32 GB/s of PCIe 4 x16 in one direction
NVLINK = 250 * GB  # of the 300 GB/s of NVLink 3 in one direction
HOST = 100 * GB  # that all PCIe links of a host carry together
CPU_MEMORY, GPU_MEMORY = 50 * GB, 1400 * GB  # with which each works through its own memory
MACHINES = (
    Machine("merge on CPU, PCIe 4", "gpu", "cpu", PCIE),
    Machine("merge and weights on CPU, PCIe 4", "cpu", "cpu", PCIE),
    Machine("merge on GPU, PCIe 4", "gpu", "gpu", PCIE),
    Machine("merge on GPU, NVLink 3", "gpu", "gpu", NVLINK),
)
# Adam reads gradient, weight and two slots, and writes three of them.
UPDATE_PASSES = 7
NETWORK = 100e9 / 8
DEVICES = (1, 2, 4, 8)
WORKERS = (1, 2, 8, 64)


def host_transfer(size: float, devices: int) -> float:
    """Seconds to copy so many bytes between the host and each of the devices, in one direction.

    >>> host_transfer(PCIE, 1), host_transfer(PCIE, 8)
    (1.0, 2.0)
    """
    return max(size / PCIE, devices * size / HOST)


def exchange(network: Network, machine: Machine, devices: int) -> float:
    """Seconds to hand out weights, bring gradients together and update, of one step."""
    size, others = network.bytes, devices - 1
    out = (
        host_transfer(size, devices) if machine.weights == "cpu" else others * size / machine.peers
    )
    update = UPDATE_PASSES * size / (CPU_MEMORY if machine.weights == "cpu" else GPU_MEMORY)
    if devices == 1:
        return out * 2 + update  # nothing to merge, but gradients go where the weights are
    if machine.merge == "gpu":
        return out + others * size / machine.peers + (devices + 1) * size / GPU_MEMORY + update
    back = 0.0 if machine.weights == "cpu" else size / PCIE
    summing = (devices + 1) * size / CPU_MEMORY
    return out + host_transfer(size, devices) + summing + back + update


def step(network: Network, machine: Machine, devices: int, batch: int) -> float:
    """Seconds of a training step of so many rows on each device."""
    return batch * network.flops / FLOPS + exchange(network, machine, devices)


def bare_step(network: Network, batch: int) -> float:
    """Seconds of a step of the bare model on one GPU."""
    return batch * network.flops / FLOPS + UPDATE_PASSES * network.bytes / GPU_MEMORY


def speed_up(network: Network, machine: Machine, devices: int, batch: int) -> float:
    """How many times as many rows a second as the bare model, with `batch` rows on each device."""
    return devices * bare_step(network, batch) / step(network, machine, devices, batch)


def all_reduce(size: float, workers: int, bandwidth: float = NETWORK) -> float:
    """Seconds of a ring all-reduce over machines.

    >>> all_reduce(100.0, 1, 10.0), all_reduce(100.0, 2, 10.0), all_reduce(100.0, 4, 10.0)
    (0.0, 10.0, 15.0)
    """
    return 2 * size * (workers - 1) / workers / bandwidth


def workers_speed_up(network: Network, machine: Machine, workers: int, batch: int) -> float:
    """The same over machines with 8 devices each."""
    alone = step(network, machine, 8, batch)
    time = alone + all_reduce(network.bytes, workers)
    return 8 * workers * bare_step(network, batch) / time


def two_cores(bare: float, update: float) -> float:
    """The speed-up of 2 towers on 2 logical CPUs, where nothing has to be copied.

    The update is the merge device's alone; the rest is halved.

    Args:
        bare: Seconds of a step of the bare model.
        update: Seconds of it that the update takes.

    >>> two_cores(1.0, 0.0), round(two_cores(1.0, 0.2), 2)
    (2.0, 1.67)
    """
    return bare / ((bare - update) / 2 + update)


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
