"""One row of the table of what is to be reached."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        measure: What was measured.
        figure: The figures, as text.
        bar: What is to be reached, as text.
        passed: Whether it was; `None` if it was not measured or is not judged.
    """

    measure: str
    figure: str
    bar: str
    passed: bool | None

    @property
    def verdict(self) -> str:
        """`pass` or `short`; a dash if nothing was to be reached or measured."""
        return {True: "pass", False: "short", None: "-"}[self.passed]


def not_measured(measure: str, bar: str) -> Row:
    """The row of what was not measured."""
    return Row(measure, "not measured", bar, None)
