"""Draws the times of a step, one lane for each device."""

from __future__ import annotations

import pathlib

from parallel_keras.explaining.step_times import StepTimes

# In the order in which they happen; colours that differ for colour-blind people too.
COLORS = {
    "starting": "#f0e442",
    "sharding": "#56b4e9",
    "weights out": "#0072b2",
    "forward": "#009e73",
    "backward": "#e69f00",
    "waiting": "#d9d9d9",
    "slower at the same time": "#f4c2c2",
    "merging": "#cc79a7",
    "update": "#d55e00",
    "bare template": "#7f7f7f",
}
Bar = tuple[str, float, float]


def lanes(times: StepTimes) -> dict[str, list[Bar]]:
    """Where each bar of the picture begins and how long it is.

    Args:
        times: The times.

    Returns:
        Dict from the name of a lane, top first, to its bars `(piece, start, length)` in
        milliseconds.
    """
    cut = times.starting + times.sharding
    ready = cut + times.weights_out
    busy = max(tower.busy for tower in times.towers)
    together = max(busy, times.together)
    done = ready + together
    drawn: dict[str, list[Bar]] = {
        f"merging on {_short(times.merge_device)}": [
            ("starting", 0.0, times.starting),
            ("sharding", times.starting, times.sharding),
            ("weights out", cut, times.weights_out),
            ("merging", done, times.merging),
            ("update", done + times.merging, times.update),
        ]
    }
    for tower in times.towers:
        drawn[f"tower on {_short(tower.device)}"] = [
            ("forward", ready, tower.forward),
            ("backward", ready + tower.forward, tower.backward),
            ("waiting", ready + tower.busy, tower.waiting),
            ("slower at the same time", ready + busy, together - busy),
        ]
    drawn["one device"] = [("bare template", 0.0, times.template)]
    return drawn


def draw(times: StepTimes, path: str | pathlib.Path) -> None:
    """Writes the picture.

    Args:
        times: The times.
        path: Where to; the ending says as what.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib import figure, patches
    except ImportError as error:
        raise ImportError(
            "Drawing the timeline needs matplotlib, which is not installed. "
            f"Received: path={str(path)!r}. Install: pip install matplotlib."
        ) from error
    drawn = lanes(times)
    # A Figure of its own, not pyplot: that needs no display, and leaves no global state behind.
    drawing = figure.Figure(figsize=(9, 1.6 + 0.45 * len(drawn)), layout="constrained")
    axes = drawing.subplots()
    for lane, bars in enumerate(drawn.values()):
        for piece, start, length in bars:
            axes.barh(lane, length, left=start, height=0.7, color=COLORS[piece])
    axes.set_title(
        f"{times.step:.2f} ms a step, {times.template:.2f} ms on one device: "
        f"{times.speed_up:.2f} times as fast"
    )
    axes.set_yticks(range(len(drawn)), list(drawn))
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds (each piece measured by itself, at its shortest)")
    handles = [patches.Patch(color=color, label=piece) for piece, color in COLORS.items()]
    drawing.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    drawing.savefig(path, dpi=150)


def _short(device: str) -> str:
    return device.removeprefix("/device:")
