"""What was measured, held against what is to be reached."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.frameworks import report as frameworks
from benchmarks.links import report as links
from benchmarks.names import ABOUT, BESIDE_MIRRORED, SPEED_UP_OF
from benchmarks.row import Row, not_measured
from parallel_keras.measuring.clock import Spread, ratios

Results = dict[str, Any]

TRAIN_BAR, PREDICT_BAR, LARGE_OUTPUT_BAR = 1.85, 1.9, 1.7
HALF_BAR = 0.95
BESIDE_HALF = (("train", "encoder"), ("predict", "xception"), ("predict", "encoder"))
SPREAD_BAR, MESSAGES_BAR, STATE_BAR = 1.03, 120, 1.3
CLEARLY_FASTER, CLEARLY_FASTER_ON = 1.5, 4
OVERHEAD_BAR, START_BAR, MEMORY_BAR, TRACES_BAR, GROWTH_BAR = 1.03, 1.5, 0.4, 2, 0.02
# Sparse gradients of the embedding and the batch itself grow with the tokens, a little.
PER_OUTPUT_BYTE_BAR = 0.05
WARM_UP = 10  # epochs or cycles before memory must stay


def rows(results: Results) -> list[Row]:
    """The rows of the table; what was not measured has no verdict."""
    return [
        *(_speed_up(results, "train", name, TRAIN_BAR) for name in SPEED_UP_OF),
        _speed_up(results, "train", "words", None),
        *(_limit(results, "train", name) for name in SPEED_UP_OF),
        *(_speed_up(results, "predict", name, PREDICT_BAR) for name in SPEED_UP_OF),
        _speed_up(results, "predict", "words", LARGE_OUTPUT_BAR),
        *(_limit(results, "predict", name) for name in SPEED_UP_OF),
        *(_beside_half(results, command, name) for command, name in BESIDE_HALF),
        *(_spread(results, name) for name in BESIDE_MIRRORED),
        _messages(results),
        _state(results),
        *(_beside_mirrored(results, name) for name in BESIDE_MIRRORED),
        _clearly_faster(results),
        _overhead(results),
        _start(results, "first", "Time to the first training step of Xception, 8 towers beside 1"),
        _start(results, "memory", "Peak memory of Xception, 8 towers beside MirroredStrategy"),
        _large_outputs(results),
        _traces(results),
        _growth(results, "epochs", "Memory after more epochs of fit, evaluate and predict"),
        _growth(results, "wraps", "Memory after more cycles of wrapping and training"),
        *links.rows(results),
        *frameworks.rows(results),
    ]


def speed_up(results: Results, workload: str, command: str, towers: int) -> Spread | None:
    """How many times faster than the bare model on one core, `None` if not measured."""
    return _over_bare(results, workload, command, f"ours-{towers}")


def limit(results: Results, workload: str, command: str) -> Spread | None:
    """How many times faster the bare model is on half of the rows, `None` if not measured.

    Two towers that had nothing to share, on cores that had nothing to share, would be as fast.
    """
    return _over_bare(results, workload, command, "half-1")


def beside_mirrored(results: Results, workload: str) -> Spread | None:
    """How many times faster than MirroredStrategy on two devices, `None` if not measured."""
    measured = results.get("speed", {}).get(workload, {}).get("train", {})
    if "mirrored-2" not in measured:
        return None
    return ratios(measured["mirrored-2"]["seconds"], measured["ours-2"]["seconds"])


def growth(sizes: list[int]) -> float:
    """By how much memory grew after the warm-up, relative.

    Medians of ten at either end: single sizes jump by what the allocator happens to hold.
    """
    before = statistics.median(sizes[WARM_UP : WARM_UP + 10])
    return statistics.median(sizes[-10:]) / before - 1


def text(spread: Spread) -> str:
    """A median with its quartiles."""
    return f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})"


def _over_bare(results: Results, workload: str, command: str, name: str) -> Spread | None:
    measured = results.get("speed", {}).get(workload, {}).get(command, {})
    other, bare = measured.get(name), measured.get("bare-1")
    return ratios(bare["seconds"], other["seconds"]) if other and bare else None


def _speed_up(results: Results, command: str, workload: str, bar: float | None) -> Row:
    verb = "Training" if command == "train" else "Predicting"
    measure = f"{verb}, 2 towers over the bare model on one core: {ABOUT[workload]}"
    wanted = "" if bar is None else f">= {bar}"
    spread = speed_up(results, workload, command, 2)
    if spread is None:
        return not_measured(measure, wanted)
    return Row(measure, text(spread), wanted, None if bar is None else spread.median >= bar)


def _limit(results: Results, command: str, workload: str) -> Row:
    verb = "Training" if command == "train" else "Predicting"
    measure = f"{verb}, the bare model on half the rows, a limit of 2 towers: {ABOUT[workload]}"
    spread = limit(results, workload, command)
    return Row(measure, text(spread) if spread else "not measured", "", None)


def _beside_half(results: Results, command: str, workload: str) -> Row:
    verb = "Training" if command == "train" else "Predicting"
    measure = f"{verb}, 2 towers beside the bare model on half the rows: {ABOUT[workload]}"
    bar = f">= {HALF_BAR}"
    measured = results.get("speed", {}).get(workload, {}).get(command, {})
    if not {"ours-2", "half-1"} <= set(measured):
        return not_measured(measure, bar)
    found = ratios(measured["half-1"]["seconds"], measured["ours-2"]["seconds"])
    return Row(measure, text(found), bar, found.median >= HALF_BAR)


def _spread(results: Results, workload: str) -> Row:
    measure = f'Step on 2 devices, weights_on="spread" beside "unmoved": {ABOUT[workload]}'
    bar = f"<= {SPREAD_BAR}"
    measured = results.get("speed", {}).get(workload, {}).get("train", {})
    if not {"ours-2", "spread-2"} <= set(measured):
        return not_measured(measure, bar)
    found = ratios(measured["spread-2"]["seconds"], measured["ours-2"]["seconds"])
    return Row(measure, text(found), bar, found.median <= SPREAD_BAR)


def _messages(results: Results) -> Row:
    measure = "Tensors into one device in a step of Xception on 8 devices behind links"
    found = (results.get("graph") or {}).get("spread")
    if not found:
        return not_measured(measure, f"<= {MESSAGES_BAR}")
    most = found["messages"]
    return Row(measure, str(most), f"<= {MESSAGES_BAR}", most <= MESSAGES_BAR)


def _state(results: Results) -> Row:
    measure = (
        "Optimizer state (Adam, Xception, 8 devices) on the device with most, in shares of 1/8"
    )
    found = (results.get("graph") or {}).get("spread")
    if not found:
        return not_measured(measure, f"<= {STATE_BAR}")
    share = 8 * max(found["state"]) / sum(found["state"])
    return Row(measure, f"{share:.2f}", f"<= {STATE_BAR}", share <= STATE_BAR)


def _beside_mirrored(results: Results, workload: str) -> Row:
    measure = f"Training beside MirroredStrategy on 2 devices: {ABOUT[workload]}"
    spread = beside_mirrored(results, workload)
    if spread is None:
        return not_measured(measure, ">= 1")
    return Row(measure, text(spread), ">= 1", spread.median >= 1)


def _clearly_faster(results: Results) -> Row:
    measure = f"Of these, at least {CLEARLY_FASTER} times as fast"
    bar = f"{CLEARLY_FASTER_ON} of {len(BESIDE_MIRRORED)}"
    spreads = [beside_mirrored(results, name) for name in BESIDE_MIRRORED]
    found = [spread for spread in spreads if spread]
    count = sum(spread.median >= CLEARLY_FASTER for spread in found)
    if len(found) < len(spreads):
        return Row(measure, f"{count} of {len(found)} measured", bar, None)
    return Row(measure, f"{count} of {len(found)}", bar, count >= CLEARLY_FASTER_ON)


def _overhead(results: Results) -> Row:
    measure = f"Step of the wrapper on one device beside the bare model: {ABOUT['tiny']}"
    bar = f"<= {OVERHEAD_BAR}"
    if not results.get("overhead"):
        return not_measured(measure, bar)
    spread = ratios(results["overhead"]["ours"], results["overhead"]["bare"])
    figure = f"{spread.median:.3f} ({spread.low:.3f}-{spread.high:.3f})"
    return Row(measure, figure, bar, spread.median <= OVERHEAD_BAR)


def _start(results: Results, what: str, measure: str) -> Row:
    bar, base = (START_BAR, "bare-1") if what == "first" else (MEMORY_BAR, "mirrored-8")
    start = results.get("start") or {}
    if not {"ours-8", base} <= set(start):
        return not_measured(measure, f"<= {bar}")
    spread = ratios(start["ours-8"][what], start[base][what])
    return Row(measure, text(spread), f"<= {bar}", spread.median <= bar)


def _large_outputs(results: Results) -> Row:
    measure = "Bytes over the merge device, from the traced graph, for each further byte of outputs"
    bar = f"<= {PER_OUTPUT_BYTE_BAR}, weights twice a tower at most"
    if not results.get("graph"):
        return not_measured(measure, bar)
    every = results["graph"]["bytes"]["auto"]
    most = max(size["words"] for size in every)
    least, *_, largest = sorted(
        (size for size in every if size["words"] == most), key=lambda size: size["tokens"]
    )
    per_byte = (largest["crossing"] - least["crossing"]) / (largest["outputs"] - least["outputs"])
    towers = results["graph"]["towers"]
    bounded = all(
        size["crossing"] <= 2 * towers * size["weights"] + size["batch"] for size in every
    )
    return Row(measure, f"{per_byte:.3f}", bar, bounded and per_byte <= PER_OUTPUT_BYTE_BAR)


def _traces(results: Results) -> Row:
    measure = "Traces in one fit with a smaller last batch: train step, template"
    if not results.get("graph"):
        return not_measured(measure, f"<= {TRACES_BAR}")
    step, template = (results["graph"]["traces"][name] for name in ("step", "template"))
    passed = max(step, template) <= TRACES_BAR
    return Row(measure, f"{step}, {template}", f"<= {TRACES_BAR}", passed)


def _growth(results: Results, what: str, measure: str) -> Row:
    bar = f"<= +{GROWTH_BAR:.0%}"
    steady = results.get("steady") or {}
    if not steady:
        return not_measured(measure, bar)
    ours, bare = (growth(steady[peer][what]) for peer in ("ours", "bare"))
    return Row(measure, f"{ours:+.1%} (bare model: {bare:+.1%})", bar, ours <= GROWTH_BAR)
