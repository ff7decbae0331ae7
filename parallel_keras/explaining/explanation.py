"""What `explain` found, as a table, a picture or JSON."""

from __future__ import annotations

import dataclasses
import pathlib
import textwrap
from typing import Any, Final

from parallel_keras.explaining.step_times import StepTimes
from parallel_keras.explaining.timeline import draw
from parallel_keras.explaining.verdict import Verdict, judge

# That of the table.
WIDTH: Final = 72


@dataclasses.dataclass(frozen=True)
class Explanation(StepTimes):
    """The times of one training step, with what they mean.

    It prints as a table. The times are those of `parallel_keras.explaining.step_times.StepTimes`.

    Example:
    ```python
    explanation = pk.explain(parallel, (x, y))
    print(explanation)
    explanation.draw("step.png")
    if explanation.verdict.cause == "small batch":
        ...
    ```
    """

    @property
    def verdict(self) -> Verdict:
        """What to do."""
        return judge(self)

    def as_dict(self) -> dict[str, Any]:
        """All numbers and the verdict, for JSON.

        Returns:
            A dict of strings, numbers, `None`, and lists and dicts of them.
        """
        derived = ("speed_up", "efficiency", "waiting")
        return {
            **dataclasses.asdict(self),
            **{name: getattr(self, name) for name in derived},
            "verdict": dataclasses.asdict(self.verdict),
        }

    def draw(self, path: str | pathlib.Path) -> None:
        """Draws the step as a timeline, one lane for each device.

        Args:
            path: Where to write the picture; the ending (`.png`, `.svg`, `.pdf`) says as what.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        draw(self, path)

    def __str__(self) -> str:
        """A table of the times, and the verdict below it."""
        count = "1 tower" if len(self.towers) == 1 else f"{len(self.towers)} towers"
        verdict = self.verdict
        lines = [f"{count}, {self.batch_size} rows a step, loss on: {self.loss_on}"]
        if self.why_merged:
            lines.append(f"(outputs are merged first: {self.why_merged})")
        return "\n".join(
            [
                *lines,
                "",
                f"{'milliseconds':<36}{'rows':>6}{'forward':>10}{'backward':>10}{'waiting':>10}",
                *(
                    f"{tower.device:<36}{tower.rows:>6}{tower.forward:>10.2f}"
                    f"{tower.backward:>10.2f}{tower.waiting:>10.2f}"
                    for tower in self.towers
                ),
                "",
                *(f"{name:<36}{value:>6.2f}" for name, value in self._rows()),
                "",
                f"{'speed-up':<36}{self.speed_up:>6.2f}",
                f"{'efficiency (speed-up / towers)':<36}{self.efficiency:>6.0%}",
                "",
                *self._places(),
                textwrap.fill(verdict.finding, WIDTH),
                textwrap.fill(f"-> {verdict.remedy}", WIDTH, subsequent_indent="   "),
            ]
        )

    def _places(self) -> list[str]:
        """Where weights live, and what the busiest device has to do with it."""
        if not self.busiest or not self.least_bytes:
            return []
        homes = ", ".join(f"{size / 1e6:.2f} on {home}" for home, size in self.homes.items())
        ratio = self.busiest_bytes / self.least_bytes
        sentences = (
            f"Weights, in MB: {homes}. Busiest device: {self.busiest}, with "
            f"{self.busiest_bytes / 1e6:.2f} MB to receive or to send in a step; with weights and "
            f"gradients alone, evenly spread, it were {self.least_bytes / 1e6:.2f} MB. That is "
            f"{ratio:.2f} times as much."
        )
        return [textwrap.fill(sentences, WIDTH), ""]

    def _rows(self) -> list[tuple[str, float]]:
        reading = (
            [] if self.reading is None else [("reading a batch, beside the step", self.reading)]
        )
        return [
            ("starting the step", self.starting),
            ("sharding", self.sharding),
            ("weights out", self.weights_out),
            ("all towers at the same time", self.together),
            ("merging", self.merging),
            ("update", self.update),
            ("whole step", self.step),
            ("bare template on the first device", self.template),
            *reading,
        ]
