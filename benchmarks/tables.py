"""Markdown of what was measured, and where it goes in the documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cost_model, gpus
from benchmarks.frameworks import report as frameworks
from benchmarks.judge import Results, beside_mirrored, growth, rows, speed_up, text
from benchmarks.links import report as links
from benchmarks.links.predicted import WITHIN
from benchmarks.names import ABOUT, PHASES, UPDATE
from parallel_keras.measuring.clock import Spread

Cells = Sequence[Any]


def markdown(heads: Cells, lines: Iterable[Cells]) -> str:
    """A Markdown table; all columns but the first are set right."""
    return "\n".join(
        [
            f"| {' | '.join(map(str, heads))} |",
            f"|---|{'---:|' * (len(heads) - 1)}",
            *(f"| {' | '.join(map(str, line))} |" for line in lines),
        ]
    )


def verdicts(results: Results) -> str:
    """The table of the bars."""
    lines = [(row.measure, row.figure, row.bar, row.verdict) for row in rows(results)]
    return markdown(("measure", "measured", "to reach", ""), lines)


def speed(results: Results) -> str:
    """Milliseconds of every workload and contender."""
    lines = []
    for workload, measured in results["speed"].items():
        train, predict = measured["train"], measured["predict"]
        for name, series in train.items():
            spread = Spread.of([value * 1e3 for value in series["seconds"]])
            cpu = Spread.of([value * 1e3 for value in series["cpu"]]).median
            ahead = predict.get(name)
            predicted = Spread.of([v * 1e3 for v in ahead["seconds"]]).median if ahead else None
            lines.append(
                (
                    ABOUT[workload],
                    _contender(name),
                    f"{_three(spread.median)} ({_three(spread.low)}-{_three(spread.high)})",
                    _three(cpu),
                    "" if predicted is None else _three(predicted),
                )
            )
    heads = ("workload", "", "training step, ms", "CPU time of it, ms", "predicting, ms")
    return markdown(heads, lines)


def summary(results: Results) -> str:
    """What a reader of the front page wants to know."""
    lines = []
    for workload in results["speed"]:
        spreads = [
            speed_up(results, workload, "train", 2),
            speed_up(results, workload, "predict", 2),
            beside_mirrored(results, workload),
        ]
        lines.append((ABOUT[workload], *(text(spread) if spread else "" for spread in spreads)))
    heads = ("workload, 2 devices", "training", "predicting", "training beside MirroredStrategy")
    return markdown(heads, lines)


def start(results: Results) -> str:
    """First step and memory of Xception."""
    lines = []
    for name, measured in results["start"].items():
        build, first = (Spread.of(measured[what]).median for what in ("build", "first"))
        memory = Spread.of(measured["memory"]).median / 2**20
        lines.append((_contender(name), f"{build:.1f}", f"{first:.1f}", f"{memory:.0f}"))
    return markdown(("Xception", "building, s", "first step, s", "memory, MB"), lines)


def large_outputs(results: Results) -> str:
    """Bytes over the merge device for growing outputs."""
    every = results["graph"]["bytes"]
    lines = [
        (
            f"{a['tokens']} x {a['words']}",
            *(_mega(a[w]) for w in ("outputs", "weights", "crossing")),
            _mega(b["crossing"]),
        )
        for a, b in zip(every["auto"], every["merged"], strict=True)
    ]
    heads = ("tokens x words", "outputs", "weights", "over the merge device", "with loss_on=merged")
    return markdown(heads, lines)


def phases(results: Results) -> str:
    """Share of each phase, in percent."""
    lines = []
    for workload, measured in results["speed"].items():
        for name, shares in measured["phases"].items():
            cells = [f"{shares[phase]:.0%}" for phase in PHASES]
            lines.append((ABOUT[workload], _contender(name), *cells))
    return markdown(("workload", "", *PHASES), lines)


def steady(results: Results) -> str:
    """How memory grew."""
    lines = [
        (
            _contender(f"{peer}-{1 if peer == 'bare' else 2}"),
            f"{growth(sizes['epochs']):+.1%}",
            f"{growth(sizes['wraps']):+.1%}",
        )
        for peer, sizes in results["steady"].items()
    ]
    return markdown(("", "epochs", "wrapping and training"), lines)


def checked(results: Results) -> str:
    """The cost model beside what was measured."""
    lines = []
    for workload, measured in results["speed"].items():
        spread = speed_up(results, workload, "train", 2)
        if spread is None:
            continue
        share = measured["phases"]["bare-1"][UPDATE]
        lines.append((ABOUT[workload], f"{cost_model.two_cores(1.0, share):.2f}", text(spread)))
    return markdown(("workload, 2 logical CPUs", "model", "measured"), lines)


def about(results: Results) -> str:
    """Versions and machine of a run."""
    machine = results["machine"]
    return (
        f"{machine['cores']} cores ({machine['processor']}), {machine['system']}, "
        f"Python {machine['python']}, TensorFlow {machine['tensorflow']}, "
        f"Keras {machine['keras']}, parallel_keras {machine['parallel_keras']}; "
        f"{when('core')(results)}"
    )


def when(section: str) -> Callable[[Results], str]:
    """What tells when a section was measured, and how."""

    def text_of(results: Results) -> str:
        run = results.get("sections", {}).get(section)
        if run is None:
            return "Not measured."
        return f"`{run['command']}` on {run['date']}, {run['minutes']:.0f} minutes."

    return text_of


def of_gpus(table: Callable[[], str]) -> Callable[[Results], str]:
    """What the cost model says of GPUs, if it was right where it could be held to account."""

    def text_of(results: Results) -> str:
        if links.trusted(results):
            return table()
        known = bool(links.runs(results))
        reason = f"is not within {WITHIN:.0%} of" if known else "was not held against"
        return f"The model {reason} the steps measured behind links, so it says nothing of GPUs."

    return text_of


SECTIONS = {
    "about": about,
    "verdicts": verdicts,
    "summary": summary,
    "speed": speed,
    "start": start,
    "large-outputs": large_outputs,
    "phases": phases,
    "steady": steady,
    "checked": checked,
    "links-about": when("links"),
    "links-times": lambda results: markdown(*links.times(results)),
    "links-bytes": lambda results: markdown(*links.sizes(results)),
    "frameworks-about": when("frameworks"),
    "frameworks": lambda results: markdown(*frameworks.table(results)),
    "cost-model-devices": of_gpus(gpus.by_devices),
    "cost-model-batches": of_gpus(gpus.by_batch),
    "cost-model-workers": of_gpus(gpus.by_workers),
}
PLOTS = {
    "speed-up": "Times as fast as the bare model on one core, for each number of towers",
    "first-step": "Time to the first training step",
    "memory": "Peak memory",
    "phases": "Share of each phase",
    "links": "Step times and bytes behind links of 400 Mbit/s, for each number of devices",
}
# Each document and where, seen from it, the plots are.
DOCUMENTS = {
    "README.md": "docs/plots",
    "benchmarks/README.md": "../docs/plots",
    "docs/scaling.md": "plots",
}


def fill(document: str, results: Results, plots: str) -> str:
    """The document with every generated part made anew.

    A part stands between `<!-- bench:NAME -->` and `<!-- /bench -->`, where the name is one of
    `SECTIONS`, or `plot-` and one of `PLOTS`.
    """
    pieces = document.split("<!-- bench:")
    done = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition(" -->")
        _, _, after = rest.partition("<!-- /bench -->")
        plot = name.removeprefix("plot-")
        body = SECTIONS[name](results) if plot == name else _picture(plot, results, plots)
        done.append(f"<!-- bench:{name} -->\n\n{body}\n\n<!-- /bench -->{after}")
    return "".join(done)


def _picture(plot: str, results: Results, plots: str) -> str:
    if plot == "links" and not links.runs(results):
        return "Not measured."
    return f"![{PLOTS[plot]}]({plots}/{plot}.svg)"


def fill_documents(root: Path, results: Results) -> None:
    """Makes the generated parts of all documents anew."""
    for name, plots in DOCUMENTS.items():
        path = root / name
        path.write_text(fill(path.read_text(), results, plots))


def _contender(name: str) -> str:
    peer, _, devices = name.partition("-")
    known = {
        "bare": "bare model",
        "half": "bare model on half the rows",
        "ours": "parallel_keras",
        "spread": "parallel_keras, weights spread",
        "mirrored": "MirroredStrategy",
    }
    return f"{known[peer]}, {devices}"


def _three(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _mega(size: float) -> str:
    return f"{size / 1e6:.1f} MB"
