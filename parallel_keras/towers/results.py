"""One call of a model: what towers take, what they return, and the way back for gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from parallel_keras import _compat, merge
from parallel_keras.shard import Shards
from parallel_keras.towers.losses import term_rule

# One call of a model: its "args", its "kwargs", and the "masks" of its args.
Call = dict[str, Any]


def as_call(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Any) -> Call:
    """One call of a model, as towers take it.

    Args:
        args: Its positional arguments.
        kwargs: Its keyword arguments, without `training` and `mask`.
        mask: Masks of the first argument, `None` for those that Keras attached.

    Returns:
        The `Call`.
    """
    masks = keras.tree.map_structure(_compat.get_mask, args)
    if mask is not None:
        masks = (mask, *masks[1:])
    return {"args": args, "kwargs": kwargs, "masks": masks}


class Merged(NamedTuple):
    """What one call of the model gives.

    Attributes:
        outputs: Nest of tensors, rows in order.
        masks: Their masks, a nest like it.
        logits: What a softmax or sigmoid at the end was computed from, a nest like it.
        terms: What layers gave to `add_loss`.
    """

    outputs: Any
    masks: Any
    logits: Any
    terms: list[tf.Tensor]

    def attached(self) -> Any:
        """The outputs, with masks and logits attached as Keras does."""
        keras.tree.map_structure(_compat.set_mask, self.outputs, self.masks)
        keras.tree.map_structure(_compat.set_logits, self.outputs, self.logits)
        return self.outputs


@dataclasses.dataclass
class Pass:
    """What the towers returned from one call.

    Attributes:
        shards: The `Shards` they were given.
        results: For each tower a dict with `outputs`, `masks`, `logits` and `losses`.
        own: Those of the towers of this worker; they are all, without other workers.
        state: The merged new value of each variable that was assigned.
        rules: How outputs and losses are joined, by name.
        merge_device: Where.
        tapes: For each tower the tape of its gradients; empty if there are none.
        sources: For each tower the tensors to take gradients for.
        devices: Where each tower ran.
    """

    shards: Shards
    results: list[dict[str, Any]]
    own: list[dict[str, Any]]
    state: list[tuple[keras.Variable, tf.Tensor]]
    rules: Mapping[str, str]
    merge_device: str
    devices: tuple[str, ...]
    tapes: list[tf.GradientTape] = dataclasses.field(default_factory=list)
    sources: list[list[tf.Tensor]] = dataclasses.field(default_factory=list)

    def merged(self) -> Merged:
        """What the towers returned as one, on the merge device."""
        with tf.device(self.merge_device):
            outputs, masks, logits = (
                merge.outputs([result[kind] for result in self.results], self.shards, self.rules)
                for kind in ("outputs", "masks", "logits")
            )
            shares = self.shards.shares() if len(self.results) > 1 else []
            terms = []
            for source in self.results[0]["losses"]:
                join = merge.live_sum if term_rule(source, self.rules) == "sum" else merge.mean
                columns = zip(*[result["losses"][source] for result in self.results], strict=True)
                terms += [join(list(column), shares) for column in columns]
            return Merged(outputs, masks, logits, terms)

    def parts(self) -> list[list[tf.Tensor]]:
        """For each tower here, everything of its result that a gradient can flow to."""
        return [
            floats((result["outputs"], result["logits"], result["losses"])) for result in self.own
        ]

    def gradients(self, upstream: Sequence[Sequence[tf.Tensor | None]]) -> list[list[Any]]:
        """Gradients of each tower's sources, computed on its device.

        Args:
            upstream: For each tower the gradients of its `parts()`.

        Returns:
            For each tower a list, one entry for each source.
        """
        return [
            _tower_gradients(*tower)
            for tower in zip(
                self.devices, self.tapes, self.parts(), upstream, self.sources, strict=True
            )
        ]


def floats(nest: Any) -> list[tf.Tensor]:
    """The float tensors of a nest, also those inside of ragged and sparse ones."""
    leaves = tf.nest.flatten(nest, expand_composites=True)
    return [leaf for leaf in leaves if tf.is_tensor(leaf) and leaf.dtype.is_floating]


def _tower_gradients(
    device: str,
    tape: tf.GradientTape,
    parts: list[tf.Tensor],
    upstream: Sequence[tf.Tensor | None],
    sources: list[tf.Tensor],
) -> list[Any]:
    reached = [(part, up) for part, up in zip(parts, upstream, strict=True) if up is not None]
    if not reached:
        return [None] * len(sources)
    targets, ups = zip(*reached, strict=True)
    with tf.device(device):
        return tape.gradient(list(targets), sources, output_gradients=list(ups))
