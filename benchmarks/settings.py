"""How much is measured, in a full run and in a quick one."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        quick: Whether this is the quick run.
        workloads: Which workloads are trained.
        counts: Numbers of towers for the plot of the speed-up.
        scaled: The workloads that are trained on all of `counts`, the others on 2.
        rounds: How often each process has its turn.
        seconds: How long a turn is, about.
        start_rounds: How often the first step of Xception is timed; 0 leaves it out.
        start_counts: Numbers of towers for the time to the first step and the memory.
        overhead_rounds: Rounds of a few steps for the overhead on one device.
        cycles: Epochs, and cycles of wrapping, over which memory must stay.
    """

    quick: bool
    workloads: tuple[str, ...]
    counts: tuple[int, ...]
    scaled: tuple[str, ...]
    rounds: int
    seconds: float
    start_rounds: int
    start_counts: tuple[int, ...]
    overhead_rounds: int
    cycles: int


FULL = Settings(
    quick=False,
    workloads=("tiny", "mlp", "cnn", "xception", "encoder", "words", "embedding"),
    counts=(1, 2, 4),
    scaled=("cnn", "xception", "encoder"),
    rounds=4,
    seconds=1.5,
    start_rounds=1,
    start_counts=(1, 8),
    overhead_rounds=120,
    cycles=50,
)
QUICK = Settings(
    quick=True,
    workloads=("tiny", "cnn", "encoder"),
    counts=(2,),
    scaled=(),
    rounds=3,
    seconds=0.6,
    start_rounds=0,
    start_counts=(),
    overhead_rounds=40,
    cycles=0,
)
