"""What verify says: whether the numbers are those of one device, and where they are not."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

RANDOM: Final = "random"
BY_SHARD: Final = "normalises by shard"
SEVERAL_ROWS: Final = "looks at several rows"
OUTSIDE: Final = "state kept outside of Keras"
STATE: Final = "state merged by rule"
LOSS: Final = "loss looks at several rows"
UNKNOWN: Final = "unknown"
REFUSED: Final = "refused"

# How many differences the table lists; `differences` has all.
_SHOWN: Final = 20

REMEDIES: Final = {
    RANDOM: "Each device draws random numbers of its own. Expected; a rate of 0 shows the rest.",
    BY_SHARD: "Build the layer with synchronized=True: then it normalises the whole batch.",
    SEVERAL_ROWS: "Compute it from the merged outputs (in the loss, or in a train_step of the "
    "model's own), use a form that looks at one row at a time, or use one device.",
    OUTSIDE: "Keep it in a weight (add_weight, or a keras.Variable): then it is merged.",
    STATE: 'Declare how it is merged: add_weight(..., aggregation="sum") for what counts rows.',
    LOSS: "The outputs are the same: it is computed from each device's rows and is no sum or mean "
    'over rows. A loss: wrap with loss_on="merged". A term of add_loss, or a metric of a layer: '
    "compute it from the merged outputs, in a train_step of the model's own.",
    UNKNOWN: "Please report this with the model: it should not happen.",
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """One number that is not that of one device.

    Attributes:
        what: String, the number, such as `"train: gradient of dense/kernel"`.
        layer: String, the first layer whose output differs; `""` if none does.
        size: Float, the largest difference, relative to the largest value.
        allowed: Float, what rounding explains, likewise.
        kind: String, the likely reason.
        remedy: String, what to do.
    """

    what: str
    layer: str
    size: float
    allowed: float
    kind: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        equal: Bool, whether all numbers are those of one device.
        differences: Tuple of `Difference`, those of the first step first.
        compared: Int, how many numbers and arrays were compared.
        devices: Tuple of device names.
        rows: Int, the rows of the batch.
        notes: Tuple of strings: what was set aside for the comparison, such as rates of
            layers that draw random numbers.
    """

    equal: bool
    differences: tuple[Difference, ...]
    compared: int
    devices: tuple[str, ...]
    rows: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON.

        Returns:
            A dict.
        """
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """A table, and what to do."""
        head = f"{self.rows} rows on {len(self.devices)} devices beside one: "
        if self.equal:
            lines = [f"{head}all {self.compared} numbers are the same."]
        else:
            count = len(self.differences)
            lines = [f"{head}{count} of {self.compared} numbers differ.", "", *self._table()]
            for kind, layer, remedy in dict.fromkeys(
                (found.kind, found.layer, found.remedy) for found in self.differences
            ):
                where = f" (layer {layer})" if layer else ""
                lines += ["", f"{kind}{where}: {remedy}"]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    def _table(self) -> list[str]:
        rows = [("what", "size", "allowed", "first layer", "kind")]
        rows += [
            (found.what, f"{found.size:.1e}", f"{found.allowed:.1e}", found.layer, found.kind)
            for found in self.differences[:_SHOWN]
        ]
        more = len(self.differences) - _SHOWN
        rows += [(f"and {more} more", "", "", "", "")] if more > 0 else []
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
