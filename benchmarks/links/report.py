"""What the laboratory found: rows of the table of bars, and Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from benchmarks.links.laboratory import COUNTS, MBIT, busiest, optimum
from benchmarks.links.predicted import WITHIN, checked, limit, median, worst
from benchmarks.row import Row, not_measured

Run = dict[str, Any]
Lines = Iterable[tuple[Any, ...]]
CONTENDERS = {
    "unmoved": 'one place (weights_on="unmoved")',
    "spread": 'spread (weights_on="spread")',
    "workers": "our workers (strategy=)",
    "ring": "MultiWorkerMirroredStrategy, ring",
}
MODELS = {
    "mlp": "MLP of 16.8 MB",
    "xception": "Xception of 84 MB",
    "transformer": "Transformer of 84 MB, 4 layers, 8k words",
}
STEP_BARS = {4: 0.35, 8: 0.25}
OPTIMUM_BAR, RING_BAR = 1.3, 1.2


def runs(results: dict[str, Any]) -> list[Run]:
    """All runs; none if the laboratory did not run."""
    return (results.get("links") or {}).get("runs", [])


def find(results: dict[str, Any], **wanted: Any) -> Run | None:
    """The run with these fields, preferably one behind limited links."""
    found = [
        run for run in runs(results) if all(run[name] == value for name, value in wanted.items())
    ]
    return max(found, key=lambda run: run["mbit"] or 0) if found else None


def rows(results: dict[str, Any]) -> list[Row]:
    """The rows of the table of bars."""
    return [
        *(_step(results, devices, bar) for devices, bar in STEP_BARS.items()),
        *(_beside_optimum(results, model) for model in MODELS),
        *(_beside_ring(results, model) for model in MODELS),
        _model(results),
    ]


def times(results: dict[str, Any]) -> tuple[tuple[str, ...], Lines]:
    """Heads and lines of the step times beside what the links allow and the model says."""
    heads = (
        f"MLP of 16.8 MB, links of {MBIT:.0f} Mbit/s",
        "devices",
        "step, ms",
        "limit of the links, ms",
        "beside the limit",
        "predicted, ms",
        "off by",
    )
    pairs = sorted(checked(results), key=lambda pair: list(CONTENDERS).index(pair[0]["contender"]))
    lines = [
        (
            CONTENDERS[run["contender"]],
            run["devices"],
            f"{1e3 * median(run):.0f}",
            f"{1e3 * limit(run):.0f}",
            f"{median(run) / limit(run):.2f}",
            f"{1e3 * said:.0f}",
            f"{said / median(run) - 1:+.0%}",
        )
        for run, said in pairs
    ]
    return heads, lines


def sizes(results: dict[str, Any]) -> tuple[tuple[str, ...], Lines]:
    """Heads and lines of the bytes on the busiest link."""
    heads = ("model", "devices", "2 (N - 1) / N of the weights", *CONTENDERS.values())
    lines = []
    for model, devices in itertools.product(MODELS, COUNTS):
        found = {
            name: find(results, model=model, devices=devices, contender=name) for name in CONTENDERS
        }
        known = [run for run in found.values() if run]
        if known:
            cells = [_size(run) for run in found.values()]
            lines.append((MODELS[model], devices, f"{optimum(known[0]) / 1e6:.1f} MB", *cells))
    return heads, lines


def trusted(results: dict[str, Any]) -> bool:
    """Whether the model predicted the laboratory well enough to say anything of other machines."""
    error = worst(results)
    return error is not None and error <= WITHIN


def _size(run: Run | None) -> str:
    return f"{busiest(run) / 1e6:.1f} MB ({busiest(run) / optimum(run):.2f})" if run else ""


def _step(results: dict[str, Any], devices: int, bar: float) -> Row:
    measure = f"Step on {devices} devices behind {MBIT:.0f} Mbit/s links, spread beside one place"
    spread, place = (
        find(results, model="mlp", devices=devices, mbit=MBIT, contender=name)
        for name in ("spread", "unmoved")
    )
    if not (spread and place):
        return not_measured(measure, f"<= {bar}")
    ratio = median(spread) / median(place)
    figure = f"{ratio:.2f} ({1e3 * median(spread):.0f} and {1e3 * median(place):.0f} ms)"
    return Row(measure, figure, f"<= {bar}", ratio <= bar)


def _beside_optimum(results: dict[str, Any], model: str) -> Row:
    measure = f"Bytes on the busiest link beside 2(N-1)/N of the weights: {MODELS[model]}"
    found = [find(results, model=model, devices=n, contender="spread") for n in COUNTS]
    ratios = {run["devices"]: busiest(run) / optimum(run) for run in found if run}
    return _ratios(measure, ratios, OPTIMUM_BAR)


def _beside_ring(results: dict[str, Any], model: str) -> Row:
    measure = f"Bytes on the busiest link beside MultiWorkerMirroredStrategy: {MODELS[model]}"
    pairs = {
        n: [find(results, model=model, devices=n, contender=name) for name in ("spread", "ring")]
        for n in COUNTS
    }
    ratios = {n: busiest(a) / busiest(b) for n, (a, b) in pairs.items() if a and b}
    return _ratios(measure, ratios, RING_BAR)


def _ratios(measure: str, ratios: dict[int, float], bar: float) -> Row:
    if not ratios:
        return not_measured(measure, f"<= {bar}")
    figures = ", ".join(f"{ratio:.2f}" for ratio in ratios.values())
    named = ", ".join(map(str, ratios))
    return Row(measure, f"{figures} (N = {named})", f"<= {bar}", max(ratios.values()) <= bar)


def _model(results: dict[str, Any]) -> Row:
    measure = "Largest error of the cost model for a step behind links"
    error = worst(results)
    if error is None:
        return not_measured(measure, f"<= {WITHIN:.0%}")
    return Row(measure, f"{error:.0%}", f"<= {WITHIN:.0%}", error <= WITHIN)
