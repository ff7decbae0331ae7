"""What the machine has beside what TensorFlow sees, and why the two may differ."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU that the driver lists.

    Attributes:
        index: Int, its number for the driver.
        name: String, its model.
        memory: Int, megabytes.
    """

    index: int
    name: str
    memory: int


def driver_cards() -> list[Card]:
    """The GPUs that NVIDIA's driver lists, whether TensorFlow sees them or not.

    Returns:
        A list of `Card`; empty if there is no `nvidia-smi` that answers.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [] if done.returncode else parse_cards(done.stdout)


def parse_cards(listing: str) -> list[Card]:
    """Reads the answer of nvidia-smi.

    Args:
        listing: String, lines of `index, name, megabytes`.

    Returns:
        A list of `Card`. Lines of another form are left out.

    Example:
    >>> from parallel_keras import hardware
    >>> hardware.parse_cards("0, NVIDIA T4, 15360")
    [Card(index=0, name='NVIDIA T4', memory=15360)]
    """
    cards = []
    for line in listing.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 3 and fields[0].isdigit() and fields[2].isdigit():
            cards.append(Card(int(fields[0]), fields[1], int(fields[2])))
    return cards


def gpu_model_and_memory(index: int, cards: Sequence[Card]) -> tuple[str | None, int | None]:
    """What is known of a GPU that TensorFlow sees.

    Args:
        index: Int, its number for TensorFlow.
        cards: The GPUs that the driver lists.

    Returns:
        A tuple of its model and its megabytes, `None` for what is not known.
    """
    physical = tf.config.list_physical_devices("GPU")
    if not physical:
        return None, None
    # Logical devices of one GPU have higher numbers than there are physical ones.
    gpu = physical[min(index, len(physical) - 1)]
    model = tf.config.experimental.get_device_details(gpu).get("device_name")
    # TensorFlow may count them in another order than the driver, so all of that name must agree.
    memories = {card.memory for card in cards if card.name == model}
    return model, memories.pop() if len(memories) == 1 else None


def gpu_memories(devices: Sequence[str]) -> dict[str, int]:
    """The memory of those devices that are GPUs of this machine.

    Args:
        devices: Canonical device names.

    Returns:
        Dict from name to megabytes, without devices of which it is not known.
    """
    gpus = [name for name in devices if name.startswith("/device:GPU:")]
    if len(gpus) < 2:
        return {}  # Nothing to compare: spares the call of another program.
    cards = driver_cards()
    found = {name: gpu_model_and_memory(int(name.split(":")[-1]), cards)[1] for name in gpus}
    return {name: memory for name, memory in found.items() if memory is not None}


def host_memory() -> int | None:
    """Megabytes of main memory, or `None` where the system does not say."""
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(names):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


def built_for_gpus() -> bool:
    """Whether this TensorFlow was built for GPUs."""
    return tf.test.is_built_with_cuda() or tf.test.is_built_with_rocm()


def why_no_gpus(
    seen: int, cards: Sequence[Card], environment: Mapping[str, str], *, built: bool
) -> list[str]:
    """Says why TensorFlow sees fewer GPUs than there are, and what to do.

    Args:
        seen: Int, how many GPUs TensorFlow sees.
        cards: The GPUs that the driver lists.
        environment: The environment variables of the process.
        built: Bool, whether TensorFlow was built for GPUs.

    Returns:
        A list of sentences; empty if nothing is missing.

    Example:
    >>> from parallel_keras import hardware
    >>> card = hardware.Card(0, "NVIDIA T4", 15360)
    >>> hardware.why_no_gpus(0, [card], {"CUDA_VISIBLE_DEVICES": "-1"}, built=True)
    ["CUDA_VISIBLE_DEVICES='-1' hides GPUs: unset it, or name those to use, such as 0,1."]
    """
    if seen and seen >= len(cards):
        return []
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and len(_visible(hidden)) <= seen:
        return [
            f"CUDA_VISIBLE_DEVICES={hidden!r} hides GPUs: unset it, or name those to use, such as "
            "0,1."
        ]
    if not built:
        return [
            "This TensorFlow is built for CPUs only: install the one for GPUs, on Linux with "
            'pip install "tensorflow[and-cuda]".'
        ]
    if not cards:
        return [
            "The driver lists no NVIDIA GPU: run nvidia-smi. If it is not found or fails, install "
            "the driver; in a container, start it with the GPUs (docker run --gpus all)."
        ]
    return [
        f"The driver lists {len(cards)}, TensorFlow sees {seen}: it did not find its CUDA "
        'libraries, or they do not fit. Install them: pip install "tensorflow[and-cuda]" (the log '
        "that TensorFlow writes when it starts names the library that is missing).",
    ]


def _visible(value: str) -> list[str]:
    """The entries of CUDA_VISIBLE_DEVICES that count: CUDA ignores all from the first bad one."""
    entries = []
    for entry in value.split(","):
        if not entry.strip() or entry.strip().startswith("-"):
            break
        entries.append(entry.strip())
    return entries
