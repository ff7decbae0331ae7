"""What towers return is brought to where it is merged; new values of variables, to their homes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from parallel_keras.homes.messages import carried
from parallel_keras.shard import Shards
from parallel_keras.towers.weights import value_of

if TYPE_CHECKING:
    from parallel_keras.homes.plan import Homes
    from parallel_keras.towers.results import State
    from parallel_keras.towers.state import StateRules

# What towers return and is merged on the merge device, whatever else they return.
_CONSTANT = "constant"
_SMALL = ("loss", "trackers", "counts", "state", _CONSTANT)


def brought(result: Any, device: str, merge_device: str, *, first: bool) -> Any:
    """What a tower returned, with all that is small and merged on the merge device there.

    Args:
        result: What a tower returned.
        device: Where it ran.
        merge_device: Where it is merged.
        first: Whether it is the first tower.

    Returns:
        A result like the one given.
    """
    # What is constant is taken from the first tower.
    names = [name for name in _SMALL if hasattr(result, name) and (first or name != _CONSTANT)]
    small = {name: getattr(result, name) for name in names}
    return result.changed(**carried(small, device, merge_device))


def merge_state(
    rules: StateRules,
    variables: Sequence[keras.Variable],
    homes: Homes,
    merge_device: str,
    results: list[Any],
    weights: list[tf.Tensor],
    shards: Shards,
) -> State:
    """The merged new value of every variable that the towers assigned, on its home.

    Args:
        rules: Which variable is merged by which rule.
        variables: Those that the numbers of the towers' updates stand for.
        homes: Where they live.
        merge_device: Where they are merged.
        results: What each tower of all workers returned.
        weights: The values of the template's variables before.
        shards: What the towers were given.

    Returns:
        The `State`.
    """
    constant, states = results[0].constant, [result.state for result in results]
    if not states[0] and not constant:
        return []
    given = dict(enumerate(weights))
    home_of = {index: homes.of(variables[index]) for index in (*states[0], *constant)}
    before = {
        index: value_of(given.get(index), variables[index], home_of[index]) for index in states[0]
    }
    before = _carried_by_home(before, home_of, merge_device, to_home=False)
    with tf.device(merge_device):
        shares = shards.shares() if len(results) > 1 else []
        merged = rules.merge(variables, before, states, constant, shares)
    merged = _carried_by_home(merged, home_of, merge_device, to_home=True)
    return [(variables[index], value) for index, value in sorted(merged.items())]


def _carried_by_home(
    values: dict[int, tf.Tensor], homes: dict[int, str], merge_device: str, *, to_home: bool
) -> dict[int, tf.Tensor]:
    """Values of variables, brought from their homes to the merge device or back."""
    found: dict[int, tf.Tensor] = {}
    for home in dict.fromkeys(homes.values()):
        there = {index: value for index, value in values.items() if homes[index] == home}
        way = (merge_device, home) if to_home else (home, merge_device)
        found.update(carried(there, *way))
    return found
