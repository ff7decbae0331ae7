"""Where each weight lives: the plan, and the work that belongs to a weight done there."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.homes.links import all_by_device, are_far, canonical, is_gpu, is_remote

# Seeds, counters and the like: TensorFlow keeps small integers in the memory of the host, and
# to move them would spread nothing.
_SMALLEST_INTEGERS = 2**10
# Their bodies are part of the step's graph when it runs, so each operation in them has a place of
# its own, and what they are given must not be fetched for them as a whole.
_TRANSPARENT = frozenset({"If", "StatelessIf", "While", "StatelessWhile"})


def wants_spread(devices: Sequence[str]) -> bool:
    """Whether weights are spread by default: where no device should carry all messages.

    Args:
        devices: Those of the towers.
    """
    return len(devices) > 1 and (
        sum(map(is_gpu, devices)) > 1 or any(is_remote(device) for device in devices)
    )


def plan(
    variables: Sequence[keras.Variable], devices: Sequence[str], loads: dict[str, int]
) -> dict[int, str]:
    """Gives each variable a home: the largest first, each to the device with the least.

    Args:
        variables: The variables.
        devices: Names of the devices. Of two with as little the first gets it.
        loads: The bytes that each device has already; they grow.

    Returns:
        The home of each variable by its `id`.

    Example:
    >>> from parallel_keras.homes.plan import plan
    >>> sizes = [keras.Variable([0.0] * size) for size in (1, 4, 2, 3)]
    >>> homes = plan(sizes, ["a", "b"], {"a": 0, "b": 0})
    >>> [homes[id(variable)] for variable in sizes]
    ['a', 'a', 'b', 'b']
    """
    homes = {}
    for variable in sorted(variables, key=size_of, reverse=True):  # stable: ties keep their order
        home = min(devices, key=lambda device: loads[device])
        loads[home] += size_of(variable)
        homes[id(variable)] = home
    return homes


def size_of(variable: keras.Variable) -> int:
    """The bytes of a variable."""
    return int(tf.as_dtype(variable.dtype).size * tf.TensorShape(variable.shape).num_elements())


class Homes:
    """The devices on which the variables of a model live, and what its optimizers keep.

    Args:
        template: The model.
        devices: Those of the towers.
        weights_on: `"auto"`, `"spread"`, `"unmoved"` or the canonical name of a device.
    """

    def __init__(self, template: keras.Model, devices: Sequence[str], weights_on: str) -> None:
        if weights_on == "auto":
            weights_on = "spread" if wants_spread(devices) else "unmoved"
        self.weights_on = weights_on
        self.devices = tuple(devices)
        self._template = template
        # The variables themselves are kept, because another one could get the id of one that went.
        self._settled: dict[int, tuple[keras.Variable, str]] = {}

    def of(self, variable: keras.Variable) -> str:
        """The device that a variable lives on, or will when it is moved.

        Args:
            variable: The variable.

        Returns:
            A canonical name; `""` if it is not known.
        """
        found = self._settled.get(id(variable))
        if found is not None:
            return found[1]
        return canonical(getattr(variable.value, "device", None) or "")

    def settle(self) -> bool:
        """Moves variables that came since the last time to their homes, in place.

        Does nothing while a graph is traced: what was traced before would go on with
        the old place.

        Returns:
            Whether any was moved.
        """
        template = self._template
        if self.weights_on == "unmoved" or not template.built or not tf.executing_eagerly():
            return False
        if _compat.in_stateless_scope():
            return False
        weights, slots = _once(template.variables), self._slots()
        every = [*weights, *(variable for variable, _ in slots)]
        self._settled = {
            id(variable): self._settled[id(variable)]
            for variable in every
            if id(variable) in self._settled
        }
        new = {id(variable) for variable in every} - self._settled.keys()
        if not new:
            return False
        homes = self._plan([weight for weight in weights if id(weight) in new])
        for slot, weight in slots:
            beside = self.of(weight) if id(weight) in self._settled else homes.get(id(weight))
            if id(slot) in new and beside:
                homes[id(slot)] = beside
        moved = False
        for variable in every:
            home = homes.get(id(variable))
            if home is None:
                continue
            if self.of(variable) != home:
                _compat.move_variable(variable, home)
                moved = True
            self._settled[id(variable)] = variable, home
        return moved

    @property
    def places(self) -> set[str]:
        """Every device that a weight lives on."""
        return {self.of(variable) for variable in self._template.variables}

    @property
    def apart(self) -> bool:
        """Whether it matters where an operation on a weight runs."""
        places = self.places
        return len(places) > 1 or are_far({*places, *self.devices})

    @contextlib.contextmanager
    def at_home(self, optimizer: keras.optimizers.Optimizer | None = None) -> Iterator[None]:
        """Inside, operations on weights and gradients run where those are.

        Where Keras works on all weights (clipping, loss scaling, weight decay, the
        optimizer), it names no device, and TensorFlow would take the first GPU.

        Args:
            optimizer: One that is applied inside: its numbers, such as the learning rate,
                are read once and not once for each weight. Defaults to `None`.
        """
        if tf.executing_eagerly() or not self.apart:
            yield
            return
        once = [] if optimizer is None else self._numbers(optimizer)
        with contextlib.ExitStack() as stack:
            stack.enter_context(tf.compat.v1.device(_WhereInputsAre(self)))
            stack.enter_context(_compat.read_once(once))
            for each in _optimizers(self._template):
                stack.enter_context(self._updating(each))
            yield

    @contextlib.contextmanager
    def _updating(self, optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
        """Inside, an optimizer updates each weight at its home.

        Its largest inputs are there anyway; but what it computes from the learning rate and
        the number of the step alone would be sent from where these are, for each weight anew.
        """
        handles, update = self.handles(), optimizer.update_step

        def update_step(gradient: Any, variable: Any, learning_rate: Any) -> Any:
            home = handles.get(id(variable.handle)) or canonical(variable.device or "")
            with tf.device(home or None):
                return update(gradient, variable, learning_rate)

        # Into the instance, where Python finds it before the class.
        ours: dict[str, Any] = {"update_step": update_step}
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            ours["check_finite"] = functools.partial(all_by_device, optimizer.check_finite)
        vars(optimizer).update(ours)
        try:
            yield
        finally:
            for name in ours:
                vars(optimizer).pop(name)

    def handles(self) -> dict[int, str]:
        """The homes of variables that were settled, by the `id` of the handle."""
        return {id(variable.value.handle): home for variable, home in self._settled.values()}

    def _plan(self, new: list[keras.Variable]) -> dict[int, str]:
        if self.weights_on != "spread":
            everything = [*new, *(v for o in _optimizers(self._template) for v in o.variables)]
            return {id(variable): self.weights_on for variable in everything}
        # Gradients come and slots stay for what is trained, so that is balanced by itself.
        spread = [variable for variable in new if _spreads(variable)]
        trained = [variable for variable in spread if variable.trainable]
        homes = plan(trained, self.devices, self._loads(trained=True))
        loads = self._loads(trained=False)
        for variable in trained:
            loads[homes[id(variable)]] += size_of(variable)
        rest = [variable for variable in spread if not variable.trainable]
        return {**homes, **plan(rest, self.devices, loads)}

    def _loads(self, *, trained: bool) -> dict[str, int]:
        """The bytes of weights on each device, of those that are trained or of all."""
        loads = dict.fromkeys(self.devices, 0)
        weights = {id(variable) for variable in self._template.variables}
        for variable, home in self._settled.values():
            if id(variable) in weights and (variable.trainable or not trained):
                loads[home] += size_of(variable)
        return loads

    def _slots(self) -> list[tuple[keras.Variable, keras.Variable | None]]:
        """What the optimizers keep for weights, each with its weight; `None` for the rest."""
        optimizers = _optimizers(self._template)
        found = [pair for optimizer in optimizers for pair in _compat.slots(optimizer)]
        known = {id(slot) for slot, _ in found}
        rest = [v for o in optimizers for v in _once(o.variables) if id(v) not in known]
        return [*found, *((variable, None) for variable in rest)]

    def _numbers(self, optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
        slots = {id(slot) for slot, _ in _compat.slots(optimizer)}
        return [v for v in _once(optimizer.variables) if not v.shape.rank and id(v) not in slots]


class _WhereInputsAre:
    """From an operation to the device of the largest of its inputs.

    Args:
        homes: The `Homes`.
    """

    def __init__(self, homes: Homes) -> None:
        self._homes = homes.handles()
        self._captured: dict[tuple[int, int], tuple[tf.Tensor, Any]] = {}

    def __call__(self, op: tf.Operation) -> str:
        """The device of an operation, `""` if it names none and none of its inputs has a place."""
        if op.device or op.type in _TRANSPARENT:
            return str(op.device)
        best, largest = "", -1.0
        for tensor in op.inputs:
            place = self._place(tensor)
            if place and tensor.dtype == tf.resource:
                return place
            size = tensor.shape.num_elements() if tensor.shape.is_fully_defined() else None
            size = float("inf") if size is None else size * tensor.dtype.size
            if place and size > largest:
                best, largest = place, size
        return best

    def _place(self, tensor: Any) -> str:
        """Where a tensor is, also one that comes from outside of the graph."""
        if not hasattr(tensor, "graph"):  # of no graph: a variable's handle, or a constant
            return self._homes.get(id(tensor)) or canonical(tensor.device or "")
        if tensor.op.device:
            return str(tensor.op.device)
        if tensor.op.type == "Placeholder":
            outside = self._outside(tensor)
            return "" if outside is None else self._place(outside)
        if tensor.op.type in ("ReadVariableOp", "Identity", "Cast"):
            return self._place(tensor.op.inputs[0])
        return ""

    def _outside(self, tensor: tf.Tensor) -> Any:
        """What a placeholder stands for, if it stands for something outside of its graph."""
        key = (id(tensor.graph), id(tensor))
        if key not in self._captured:
            for outside, inside in getattr(tensor.graph, "captures", []):
                # The tensor is kept, so that no other gets its id.
                self._captured[id(tensor.graph), id(inside)] = inside, outside
        return self._captured.get(key, (None, None))[1]


def _spreads(variable: keras.Variable) -> bool:
    dtype = tf.as_dtype(variable.dtype)
    number = dtype.is_floating or dtype.is_complex
    return bool(number or (dtype != tf.string and size_of(variable) >= _SMALLEST_INTEGERS))


def _optimizers(template: keras.Model) -> list[keras.optimizers.Optimizer]:
    """Those that the model was compiled with, or that it keeps for steps of its own."""
    found: list[Any] = []
    for layer in _compat.all_layers(template):
        if isinstance(layer, keras.Model):
            found += [getattr(layer, "optimizer", None), *vars(layer).values()]
    outer = [each for each in found if isinstance(each, keras.optimizers.Optimizer)]
    inner = [getattr(each, "inner_optimizer", None) for each in outer]
    return _once([*outer, *(each for each in inner if each is not None)])


def _once(things: Iterable[Any]) -> list[Any]:
    return list({id(thing): thing for thing in things}.values())
