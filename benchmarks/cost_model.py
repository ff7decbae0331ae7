"""A model of a training step: what moves over which link, and how long that takes.

A step is: weights go to the towers, towers compute, gradients come back, the weights are updated.
The same functions predict the steps of the laboratory (`benchmarks/links`), where they are held
against what was measured, and those of GPUs that nobody here has (`benchmarks/gpus.py`).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Links:
    """What joins devices: one link each, both directions at the same time.

    Attributes:
        rate: Bytes a second of a link in each direction.
        together: Bytes a second that all links carry together.
        latency: Seconds that a message takes beside its bytes.
    """

    rate: float
    together: float = float("inf")
    latency: float = 0.0


@dataclasses.dataclass(frozen=True)
class Phase:
    """Bytes that move at the same time.

    Attributes:
        busiest: Bytes over the busiest link, in its busier direction.
        total: Bytes over all links.
        messages: How many of them the busiest device sends or receives.
    """

    busiest: float
    total: float
    messages: float

    def seconds(self, links: Links) -> float:
        """How long it takes.

        >>> Phase(100.0, 300.0, 2.0).seconds(Links(rate=50.0, together=100.0, latency=0.5))
        4.0
        """
        moving = max(self.busiest / links.rate, self.total / links.together)
        return moving + self.messages * links.latency


# What goes out before the towers compute, and what comes back.
Exchange = tuple[Phase, Phase]
NOTHING = Phase(0.0, 0.0, 0.0)


def one_place(size: float, messages: float, receivers: int) -> Exchange:
    """Weights in one place, which sends them to so many devices and gets their gradients.

    >>> one_place(100.0, 5, 4)[0]
    Phase(busiest=400.0, total=400.0, messages=20)
    """
    phase = Phase(receivers * size, receivers * size, receivers * messages)
    return phase, phase


def spread(size: float, messages: float, devices: int) -> Exchange:
    """Each device has its share of the weights, sends it to the others and gets its gradients.

    >>> spread(100.0, 8, 4)[0]
    Phase(busiest=75.0, total=300.0, messages=6.0)
    """
    share = (devices - 1) / devices
    phase = Phase(share * size, (devices - 1) * size, share * messages)
    return phase, phase


def ring(size: float, devices: int, vectors: int = 1) -> Exchange:
    """All devices have all weights, and add up gradients in a ring: in twice N - 1 rounds.

    Args:
        size: Bytes of the weights.
        devices: How many.
        vectors: In how many pieces the gradients go around, each in rounds of its own.

    >>> ring(100.0, 4)[1]
    Phase(busiest=150.0, total=600.0, messages=6)
    """
    rounds = 2 * (devices - 1)
    return NOTHING, Phase(rounds / devices * size, rounds * size, rounds * vectors)


def step(compute: float, exchange: Exchange, links: Links, hidden: float = 0.0) -> float:
    """Seconds of a step.

    Args:
        compute: Seconds of the towers and the update.
        exchange: What moves before and after the towers.
        links: What it moves over.
        hidden: Seconds of the towers while which gradients may already move.

    >>> (
    ...     step(1.0, spread(100.0, 0, 2), Links(50.0)),
    ...     step(1.0, spread(100.0, 0, 2), Links(50.0), 0.5),
    ... )
    (3.0, 2.5)
    """
    out, back = (phase.seconds(links) for phase in exchange)
    return compute + out + max(back - hidden, 0.0)


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
