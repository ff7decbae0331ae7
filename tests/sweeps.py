"""In which order tests run, and which of a long sweep `make test` leaves to `make test-ci`."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import pytest

# What takes longest, or waits for processes that it starts: begun last, one of two processes would
# be left without work meanwhile.
FIRST = (
    "test_workers",
    "test_remote",
    "test_commands",
    "test_docs",
    "test_programs",
    "test_faults_gradients",
    "test_weights_on",
    "test_verify",
    "test_losses",
    "test_models",
    "test_explain",
    "test_faults_tracing",
    "test_faults_own_loops",
    "test_resume",
    "test_devices",
)


def longest_first(items: list[pytest.Item]) -> None:
    """Sorts tests by their files; the order within a file stays.

    Args:
        items: All tests that were collected.
    """

    def place(item: pytest.Item) -> int:
        return FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST)

    items.sort(key=place)


def mark_rest(items: Sequence[pytest.Item]) -> None:
    """Marks what is beyond the number of cases that a test's mark `sweep` names.

    Args:
        items: All tests that were collected.
    """
    sweeps: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("sweep"):
            sweeps.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in sweeps.values():
        [count] = next(cases[0].iter_markers("sweep")).args
        left = ("slow", "rest")
        quick = [case for case in cases if not any(map(case.get_closest_marker, left))]
        kept = spread([case.callspec.id.split("-") for case in quick], count)
        for index, case in enumerate(quick):
            if index not in kept:
                case.add_marker(pytest.mark.rest)


def spread(cases: Sequence[Sequence[str]], count: int) -> list[int]:
    """Takes cases such that the values of all parameters are among them, as evenly as can be.

    Args:
        cases: For each case the values of its parameters.
        count: Int, how many to take.

    Returns:
        The numbers of those taken.
    """
    taken: list[int] = []
    seen: collections.Counter[tuple[int, str]] = collections.Counter()

    def gain(index: int) -> tuple[int, int]:
        counts = [seen[value] for value in enumerate(cases[index])]
        return counts.count(0), -sum(counts)

    left = list(range(len(cases)))
    while left and len(taken) < count:
        best = max(left, key=gain)
        seen.update(enumerate(cases[best]))
        left.remove(best)
        taken.append(best)
    return taken
