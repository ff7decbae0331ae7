"""Refuses what would not give the numbers of one device, before anything runs."""

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.devices import resolve
from parallel_keras.towers import losses

LOSS_ON = ("auto", "merged", "towers")
WEIGHTS_ON = ("auto", "spread", "unmoved")
RULES = ("mean", "pad", "sum", "whole")
OWN_ROWS = ("batch", "own")
UNCUT = ("batch", "whole")


def check_arguments(
    template: Any, loss_on: Any, strategy: Any, rules: Any, weights_on: Any = "auto"
) -> None:
    """Checks the arguments of `DataParallelModel` that stand by themselves.

    Args:
        template: Must be a `keras.Model`.
        loss_on: Must be one of `LOSS_ON`.
        strategy: Must be `None` or a `tf.distribute.MultiWorkerMirroredStrategy`.
        rules: Must be `None` or a mapping from names to `RULES`; that of `"batch"` may
            also be `"own"`.
        weights_on: Must be a string. Defaults to `"auto"`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If it has a value that is not known.
    """
    if not isinstance(template, keras.Model):
        hint = (
            " A class was given: create the model first."
            if isinstance(template, type)
            else " Models of tf_keras (Keras 2) must be rebuilt with Keras 3."
        )
        raise TypeError(
            "Expected `template` to be a keras.Model. "
            f"Received: template={template!r} (of type {type(template).__name__}).{hint}"
        )
    if loss_on not in LOSS_ON:
        raise ValueError(
            f"Expected `loss_on` to be one of {LOSS_ON}. Received: loss_on={loss_on!r}. "
            'Leave it out for "auto", which is right for every loss.'
        )
    if not isinstance(weights_on, str):
        raise TypeError(
            f"Expected `weights_on` to be one of {WEIGHTS_ON}, or the name of a device. "
            f"Received: weights_on={weights_on!r} (of type {type(weights_on).__name__}). "
            'Leave it out for "auto".'
        )
    if not isinstance(strategy, (tf.distribute.MultiWorkerMirroredStrategy, type(None))):
        raise TypeError(
            "Expected `strategy` to be a tf.distribute.MultiWorkerMirroredStrategy, for several "
            f"machines. Received: strategy={strategy!r} (of type {type(strategy).__name__}). "
            "Leave it out to use the devices of this machine."
        )
    if not isinstance(rules, (Mapping, type(None))):
        raise TypeError(
            f"Expected `rules` to be a dict from names to one of {RULES}. "
            f"Received: rules={rules!r} (of type {type(rules).__name__})."
        )
    for name, rule in (rules or {}).items():
        if rule not in RULES and (name, rule) != OWN_ROWS:
            raise ValueError(
                f"Expected every rule to be one of {RULES}, or 'own' for 'batch'. "
                f"Received: rules={{{name!r}: {rule!r}}}."
            )


def place_of_weights(weights_on: str, task: str = "") -> str:
    """What `weights_on` means on this machine.

    Args:
        weights_on: One of `WEIGHTS_ON`, or the name of a device.
        task: String, the beginning of the names of the devices that may be used.
            Defaults to `""`.

    Returns:
        One of `WEIGHTS_ON`, or the canonical name of a device.

    Raises:
        ValueError: If it is neither.
    """
    if weights_on in WEIGHTS_ON:
        return weights_on
    try:
        return resolve([weights_on], task)[0]
    except ValueError as error:
        raise ValueError(
            f"Expected `weights_on` to be one of {WEIGHTS_ON}, or the name of a device. "
            f'Received: weights_on={weights_on!r}. Leave it out for "auto". ({error})'
        ) from error


def is_uncut(rules: Mapping[str, str] | None, strategy: Any) -> bool:
    """Whether the user wants batches not to be cut at all.

    Args:
        rules: What the user declared, by name.
        strategy: That of the workers, if there are any.

    Returns:
        Bool.

    Raises:
        ValueError: If there are several workers, which would all compute the same.
    """
    uncut = UNCUT in (rules or {}).items()
    if uncut and strategy is not None:
        raise ValueError(
            "Expected batches that can be cut where there are several machines: all of them would "
            f"compute the same. Received: rules={rules!r} with a strategy. Leave out the strategy."
        )
    return uncut


def check_no_strategy(template: keras.Model) -> None:
    """Refuses models of a `tf.distribute` strategy, whose variables are one for each replica.

    Args:
        template: The model.

    Raises:
        ValueError: Naming the strategy.
    """
    if tf.distribute.has_strategy():
        raise ValueError(
            "Expected to wrap a model outside of the scope of a strategy: towers and replicas "
            "would both cut the batch. Received: a scope of "
            f"{type(tf.distribute.get_strategy()).__name__}. Leave out `with strategy.scope():`."
        )
    models = [layer for layer in _compat.all_layers(template) if isinstance(layer, keras.Model)]
    replicated = [
        model.distribute_strategy
        for model in models
        if model.distribute_strategy.num_replicas_in_sync > 1
    ]
    optimizer = getattr(template, "optimizer", None)
    values = [variable.value for variable in [*template.variables, *_variables(optimizer)]]
    replicated += [
        value.distribute_strategy
        for value in values
        if isinstance(value, tf.distribute.DistributedValues)
    ]
    if replicated:
        raise ValueError(
            "Expected a template that was made outside of the scope of a strategy: towers "
            "copy plain variables, and these are one for each replica. "
            f"Received: template={template.name!r} of {type(replicated[0]).__name__}. "
            "Leave out `with strategy.scope():` where the template and its optimizer are made."
        )


def _variables(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "variables", []))


def check_template(template: keras.Model, towers: int) -> None:
    """Refuses templates whose numbers depend on the batch not being cut.

    Args:
        template: The model.
        towers: Int, the number of towers; one tower can run anything.

    Raises:
        ValueError: Naming the layer that keeps state by row, or the input with a
            fixed batch size.
    """
    if towers == 1:
        return
    for layer in _compat.all_layers(template):
        if getattr(layer, "stateful", False):
            raise ValueError(
                f"Layer {layer.name!r} is stateful: it keeps a state for each row from batch to "
                f"batch, which cannot be cut among {towers} devices. Received: stateful=True. "
                "Build it with stateful=False, or use one device: devices=1."
            )
    for tensor in getattr(template, "inputs", None) or []:
        if tensor.shape and tensor.shape[0] is not None:
            raise ValueError(
                f"Input {tensor.name!r} has a fixed batch size, but each of {towers} devices gets "
                f"only a part of the batch. Received: shape={tuple(tensor.shape)}. "
                "Build the input without batch_size (a Sequential that was called before it is "
                "wrapped has that of the call), or use one device: devices=1."
            )


def check_built(template: keras.Model) -> None:
    """Refuses weights whose values come only after tracing: workers cannot agree on them.

    Args:
        template: The model.

    Raises:
        ValueError: If it is not built, or just being built while a graph is traced.
    """
    if not (template.built and tf.executing_eagerly()) or _compat.in_stateless_scope():
        raise ValueError(
            f"The template has no weights yet, which workers must agree on before they train. "
            f"Received: template={template.name!r}, unbuilt. Build it first, for example with "
            "template.build(input_shape) or by a call on one batch."
        )


def check_compile(template: keras.Model, towers: int, *, jit: bool) -> None:
    """Refuses ways to run in which towers cannot talk to each other.

    Args:
        template: The compiled model.
        towers: Int, the number of towers.
        jit: Bool, whether the user asked for XLA, rather than leaving it to Keras.

    Raises:
        ValueError: Naming the layer that reduces over the towers.
    """
    if towers == 1 or not (jit or template.run_eagerly):
        return
    for layer in _compat.all_layers(template):
        if getattr(layer, "synchronized", False):
            raise ValueError(
                f"Layer {layer.name!r} is synchronized: it adds up over {towers} devices in the "
                "middle of a tower, which needs towers that run at the same time and that XLA "
                f"does not compile. Received: jit_compile={jit}, "
                f"run_eagerly={template.run_eagerly}. Compile with neither."
            )


def check_overrides(of_subclass: list[str], of_template: list[str], loss_on: str) -> None:
    """Refuses what steps of the template's own would silently ignore.

    Args:
        of_subclass: Names of the methods that a subclass of `DataParallelModel` overrides.
        of_template: Names of those that the template overrides.
        loss_on: What the user asked for.

    Raises:
        ValueError: If both have steps, or the loss was to be computed on the towers.
    """
    if of_template and loss_on == "towers":
        raise ValueError(
            'Expected `loss_on` to be "auto" or "merged": the template computes its loss itself, '
            f'from merged outputs. Received: loss_on="towers", templates={of_template}. '
            "Leave it out."
        )
    if of_subclass and of_template:
        raise ValueError(
            "Expected steps of its own in the template or in the subclass of DataParallelModel, "
            f"not in both. Received: own={of_subclass}, templates={of_template}. "
            "Move all of them to one."
        )


def check_towers_loss(decision: losses.Decision) -> None:
    """Refuses `loss_on="towers"` where it would be another number.

    Args:
        decision: What is known of the compiled losses.

    Raises:
        ValueError: With the reason.
    """
    if decision.reduction is None:
        raise ValueError(
            "The loss of the batch is not the sum of the losses of its parts: "
            f'{decision.reason}. Received: loss_on="towers". Use loss_on="auto".'
        )


def check_may_merge(loss_on: str, cause: Exception) -> None:
    """Refuses to merge the outputs where the user asked not to.

    Args:
        loss_on: What the user asked for.
        cause: What the towers found.

    Raises:
        ValueError: If `loss_on` is `"towers"`.
    """
    if loss_on == "towers":
        raise ValueError(
            "The loss of the batch is not the sum of the losses of its parts: an output has a "
            "mask, no axis besides rows, or not its rows on the first axis alone, an activity "
            "regulariser may look at several rows, or metrics at what `call` leaves on a layer. "
            'Received: loss_on="towers". Use loss_on="auto".'
        ) from cause
