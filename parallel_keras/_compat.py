"""The only file that touches anything private of Keras or TensorFlow.

Every function says why there is no public way and what would let it go; each
has a test in tests/test_compat.py that fails when the private thing changes. One file, in
parts by what is reached into, so that all that may break with a new version is in one place.
"""

import contextlib
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import keras
import tensorflow as tf
from keras.src import backend as _backend
from keras.src.backend.tensorflow import trainer as _trainer
from keras.src.utils import io_utils as _io_utils
from tensorflow.python.autograph.core import ag_ctx as _ag_ctx
from tensorflow.python.autograph.core import config as _autograph_config
from tensorflow.python.autograph.impl import api as _autograph_api
from tensorflow.python.eager import context as _context
from tensorflow.python.eager import record as _record
from tensorflow.python.eager.polymorphic_function import autograph_util as _autograph
from tensorflow.python.framework import auto_control_deps_utils as _control_deps
from tensorflow.python.framework import none_tensor as _none_tensor
from tensorflow.python.ops import gradients_util as _gradients_util

# --- Masks and logits, which hang on tensors ---


def get_mask(tensor: Any) -> Any:
    """The mask that a layer attached to a tensor, or `None`.

    Keras carries masks in an attribute of the tensor and has no public reader.
    A tower is a `tf.function`, which loses attributes, so masks are handed in
    and out by value. Goes when `keras.ops` gets a mask accessor.
    """
    return getattr(tensor, "_keras_mask", None)


def set_mask(tensor: Any, mask: Any) -> None:
    """Attaches a mask to a tensor; see `get_mask`."""
    if mask is not None:
        tensor._keras_mask = mask


def get_logits(tensor: Any) -> Any:
    """What a softmax or sigmoid that ended a model was computed from, or `None`.

    Keras keeps it in an attribute of the tensor, from which crossentropies are computed
    so that they do not saturate. A tower loses it, as it does masks. Goes with `get_mask`.
    """
    return getattr(tensor, "_keras_logits", None)


def set_logits(tensor: Any, logits: Any) -> None:
    """Attaches logits to a tensor; see `get_logits`."""
    if logits is not None:
        tensor._keras_logits = logits


# --- What is going on now: scopes, tapes, calls ---


def in_stateless_scope() -> bool:
    """Whether variables have stand-in values now (`keras.StatelessScope`).

    A traced function would bake those values in as constants. Goes when the
    scope can be queried publicly.
    """
    return _backend.in_stateless_scope()


def stateless_scope() -> Any:
    """The `keras.StatelessScope` that is open, or `None`; see `in_stateless_scope`."""
    return _backend.common.stateless_scope.get_stateless_scope()


def may_be_recorded() -> bool:
    """Whether there is a tape that records now, whatever it watches.

    Goes when there is a public way to ask.
    """
    return bool(_record.could_possibly_record())


def gradient_order(tensors: list[Any]) -> int:
    """How often the tapes that record now may differentiate what is computed from tensors.

    A `tf.GradientTape` has no public way to tell what it watches, or whether there is one.
    Goes when there is.

    Args:
        tensors: List of tensors.

    Returns:
        0 if no tape watches them, 1 if one does, once; 2 if it may be more often or further.
    """
    return int(_gradients_util.PossibleTapeGradientTypes(tensors)) if tensors else 0


def training_of_call(layer: keras.layers.Layer) -> Any:
    """The `training` of the call that is going on, also for layers that do not take it.

    Keras hands it down through a context without a public reader. Goes when it gets one.
    """
    return getattr(layer._get_call_context(), "training", None)


def allow_any_arguments(model: keras.Model) -> None:
    """Lets a model take what is no tensor by position, too.

    `DataParallelModel.call` cannot know the names of its template's arguments, so it takes
    them by position, where Keras refuses flags and numbers. Keras' own layers that take
    such arguments set this attribute. Goes when it is public.
    """
    model._allow_non_tensor_positional_args = True


# --- Layers of a model, and what they add to the loss ---


def all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The model and every layer in it, each once.

    `model.layers` is public but one level deep, and layers that are no models
    have no public list of their children. Goes when they get one.
    """
    return model._flatten_layers()


def layer_metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    """The metrics that layers update when they are called.

    `layer.metrics` is public, but that of a compiled model lists its loss and compiled
    metrics too, which no layer updates. Goes when Keras tells the two apart.
    """
    return [metric for layer in all_layers(model) for metric in layer._metrics]


def loss_owners(model: keras.Model) -> dict[int, int]:
    """Which layer a term of `add_loss` came from, while a stateless scope collects them.

    `layer.losses` is public, but gives a layer's terms together with those of its sublayers.
    Goes when Keras tells them apart.

    Args:
        model: The model.

    Returns:
        The number of the layer in `all_layers(model)` by the `id` of the term.
    """
    layers = enumerate(all_layers(model))
    return {term: number for number, layer in layers for term in layer._loss_ids}


def forget_loss_owners(model: keras.Model) -> None:
    """Forgets which terms of `add_loss` came from where; see `loss_owners`.

    Keras does so only where no call of another layer is going on. What is left are numbers
    of terms that are gone, which new terms may get. Goes with `loss_owners`.

    Args:
        model: The model.
    """
    for layer in all_layers(model):
        layer._loss_ids.clear()


# --- What was given to `compile`, and what became of it ---


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """What the user gave to `compile`, the very objects.

    `get_compile_config()` is public but serialised: it would make copies of the
    optimizer and the metrics. Goes when Keras hands out the arguments.
    """
    return dict(model._compile_config.config)


def share_compiled(model: keras.Model, template: keras.Model) -> None:
    """Gives a model the compiled losses and metrics of another, the very objects.

    `compile` makes a tracker of the loss, and containers of losses and metrics, for each
    model by itself: what one of them counts, `metrics` of the other would not know. Goes
    when Keras lets two models share them.
    """
    for name in ("_loss_tracker", "_compile_loss", "_compile_metrics"):
        vars(model)[name] = vars(template)[name]


def data_loss(model: keras.Model, y: Any, y_pred: Any, sample_weight: Any) -> tf.Tensor:
    """The compiled losses alone, without `add_loss` terms and regularisers.

    `compute_loss` is public but adds those, which a tower must weight otherwise.
    Goes when Keras offers the two apart.
    """
    return model._compile_loss(y, y_pred, sample_weight)


def loss_arguments(loss: keras.losses.Loss) -> dict[str, Any]:
    """The arguments that a loss of Keras passes to its function, such as `axis`.

    Some losses leave them out of `get_config()`. Goes when none does.
    """
    return dict(getattr(loss, "_fn_kwargs", {}))


def loss_trackers(model: keras.Model) -> list[keras.metrics.Metric]:
    """The means of the losses of single outputs, which the compiled loss updates.

    `model.metrics` holds them too, but among others. Goes with `data_loss`.
    """
    return list(model._compile_loss.metrics)


def update_metrics(model: keras.Model, y: Any, y_pred: Any, sample_weight: Any) -> None:
    """Updates the compiled metrics.

    `compute_metrics` is public but also reads the results, which a tower must
    not. Goes when Keras offers the two apart.
    """
    if model._compile_metrics is not None:
        model._compile_metrics.update_state(y, y_pred, sample_weight)


def compiled_metrics(model: keras.Model) -> list[keras.metrics.Metric]:
    """The metrics given to `compile`, one by one; empty before they are built.

    `model.metrics` holds them as one container. Goes when that is flat.
    """
    return [] if model._compile_metrics is None else list(model._compile_metrics.metrics)


def losses_and_metrics_are_built(model: keras.Model) -> bool:
    """Whether compiled losses and metrics have their variables.

    Both say so themselves, but only the model knows them. Goes with `build_losses_and_metrics`.
    """
    parts = (model._compile_loss, model._compile_metrics)
    return all(part is None or part.built for part in parts)


def build_losses_and_metrics(model: keras.Model, data: tuple[Any, Any, Any]) -> None:
    """Makes the variables of compiled losses and metrics, as Keras' JAX trainer does.

    They are made at the first update, but a tower must not make variables.
    Goes when `compile` builds them or Keras offers it.

    Args:
        model: The compiled model, whose `template` is built.
        data: Inputs, targets and sample weights, symbolic and dense.
    """
    if losses_and_metrics_are_built(model):
        return
    loss, metrics = model._compile_loss, model._compile_metrics
    x, y, sample_weight = data
    try:
        y_pred = _backend.compute_output_spec(model.template, x, training=False)
    except Exception as error:  # noqa: BLE001 (it is raised again if this fails, too)
        y_pred = trace_as_step(model.template, (x,), {"training": False}, error)
    if loss is not None:
        _backend.compute_output_spec(data_loss, model, y, y_pred, sample_weight)
    if metrics is not None:
        _backend.compute_output_spec(
            lambda *args: update_metrics(model, *args), y, y_pred, sample_weight
        )


def trace_as_step(
    model: keras.Model, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> Any:
    """Traces a call as a step of Keras does, where Keras failed to find out its shapes.

    It looks for them with tensors instead of variables, which cannot be assigned inside of a
    loop or condition. Goes when it can do without.

    Args:
        model: The model.
        args: Positional arguments of a call, or specs or symbols of them.
        kwargs: Keyword arguments.
        error: What Keras failed with.

    Returns:
        What Keras would have found: a nest of `keras.KerasTensor`.

    Raises:
        Exception: What Keras failed with, if this fails, too.
    """

    def spec(leaf: Any) -> Any:
        if isinstance(leaf, tf.RaggedTensorSpec):
            return leaf
        known = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        of_keras = isinstance(leaf, keras.KerasTensor) and leaf.sparse
        sparse = of_keras or isinstance(leaf, (tf.SparseTensor, tf.SparseTensorSpec))
        kind = tf.SparseTensorSpec if sparse else tf.TensorSpec
        return kind(leaf.shape, leaf.dtype) if known else leaf

    try:
        function = tf.function(lambda *given: model(*given, **kwargs), autograph=False)
        traced = function.get_concrete_function(*keras.tree.map_structure(spec, args))
    except Exception as other:
        raise error from other
    return keras.tree.map_structure(
        lambda leaf: keras.KerasTensor(leaf.shape, leaf.dtype.name), traced.structured_outputs
    )


# --- Variables and optimizers ---


def move_variable(variable: keras.Variable, device: str) -> None:
    """Moves a variable to another device, in place.

    Keras has no public way to place or replace the tensor behind a variable.
    Goes when `keras.Variable` gets a device.

    The new tensor takes over the key of the old one, by which optimizers find
    slots and what weight decay leaves out. The old one is emptied, so that a
    function traced before fails instead of using what is no longer trained.
    """
    old = variable._value
    with tf.init_scope(), tf.device(device):
        new = tf.Variable(
            variable.numpy(), trainable=variable.trainable, dtype=variable.dtype, name=variable.name
        )
    new._unique_id = old._unique_id
    variable._value = new
    with tf.init_scope(), tf.device(old.device):
        tf.raw_ops.AssignVariableOp(resource=old.handle, value=tf.zeros([0], old.dtype))


def optimized(optimizer: keras.optimizers.Optimizer) -> list[Any]:
    """The weights that an optimizer was built for, in its order.

    `apply` may be given gradients alone, and means these. Goes when they are public.
    """
    return list(optimizer._trainable_variables)


def slots(optimizer: keras.optimizers.Optimizer) -> list[tuple[keras.Variable, keras.Variable]]:
    """What an optimizer keeps for each weight (momentum, average), beside that weight.

    Optimizers keep lists in the order of the weights they were built with, in attributes
    of any name. Goes when they can be asked.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    found = [] if inner is None else slots(inner)
    weights = optimizer._trainable_variables
    for name, kept in vars(optimizer).items():
        if name in ("_variables", "_trainable_variables") or not isinstance(kept, (list, tuple)):
            continue
        if len(kept) == len(weights):
            pairs = zip(kept, weights, strict=True)
            found += [pair for pair in pairs if isinstance(pair[0], keras.Variable)]
    return found


@contextlib.contextmanager
def read_once(variables: Sequence[keras.Variable]) -> Iterator[None]:
    """Inside, each of the variables is read once in a graph, until it is assigned.

    Optimizers read the learning rate and the number of the step anew for each weight, and
    TensorFlow sends each value that was read by itself to the device of the weight. Keras
    reads by `value()` of what is behind a variable, which is overridden in that very
    object. Goes when optimizers read them once.
    """
    behind = [variable._value for variable in variables]
    values: dict[tuple[int, int], Any] = {}

    def reader(variable: Any) -> Any:
        original = variable.value

        def value() -> Any:
            key = (id(variable), id(tf.compat.v1.get_default_graph()))
            if key not in values:
                values[key] = original()
            return values[key]

        return value

    def writer(variable: Any, name: str) -> Any:
        original = getattr(variable, name)

        def write(*args: Any, **kwargs: Any) -> Any:
            values.clear()
            return original(*args, **kwargs)

        return write

    writers = ("assign", "assign_add", "assign_sub")
    try:
        for variable in behind:
            for name in writers:
                setattr(variable, name, writer(variable, name))
            variable.value = reader(variable)
        yield
    finally:
        for variable in behind:
            for name in ("value", *writers):
                vars(variable).pop(name, None)


# --- Data, epochs, files and workers ---


def is_none_spec(spec: Any) -> bool:
    """Whether a spec of a data set stands for `None`.

    TensorFlow 2.16 keeps its type to itself. Goes when all that `setup.cfg` allows have
    `tf.NoneTensorSpec`.
    """
    return isinstance(spec, _none_tensor.NoneTensorSpec)


def get_initial_epoch(model: keras.Model) -> int | None:
    """The epoch that `fit` goes on from, as `BackupAndRestore` has set it.

    Keras hands it from the callback to `fit` in this attribute. Goes when there is a
    public one.
    """
    return model._initial_epoch


def set_initial_epoch(model: keras.Model, epoch: int | None) -> None:
    """Sets the epoch that `fit` goes on from; see `get_initial_epoch`."""
    model._initial_epoch = epoch


def may_overwrite(filepath: Any) -> bool:
    """Asks the user whether a file may be overwritten, in the words of Keras.

    Keras asks when it finds the file where it is told to write, but it is told to write
    beside it. Goes when Keras itself writes files whole.
    """
    return _io_utils.ask_to_proceed_with_overwrite(str(filepath))


def strategy_timeout(strategy: Any) -> float | None:
    """The `timeout_seconds` of the `CommunicationOptions` that a strategy was made with.

    A strategy takes them and has no public way to read them. Goes when it gets one.
    """
    return getattr(strategy.extended._communication_options, "timeout_seconds", None)


def ragged_concat(batches: Sequence[tf.Tensor]) -> Any:
    """The outputs of batches that may differ in more than their rows, as `predict` joins them.

    They become a ragged tensor, whose kind is Keras' own choice. Goes when Keras says publicly
    which, or joins what is not a tensor.
    """
    return _trainer.potentially_ragged_concat(batches)


# --- Graphs and the functions in them ---


def captured(placeholder: tf.Tensor) -> tf.Tensor | None:
    """What a graph that is being traced takes from outside under this name, or `None`.

    Goes when graphs of functions are public.

    Args:
        placeholder: A placeholder of the graph.

    Returns:
        The tensor outside, if that is one of a graph, too.
    """
    for outside, inside in getattr(placeholder.graph, "captures", ()):
        if inside is placeholder and hasattr(outside, "op"):
            return outside
    return None


def function_body(op: tf.Operation) -> Any:
    """The graph of the function that an operation calls, `None` if it calls none.

    `tf.Graph.as_graph_def` is public and has it too, but copies the graph of the whole step
    each time. Goes when operations tell what they call.

    Args:
        op: Operation of a graph that is being traced.

    Returns:
        The graph, whose `inputs` and `outputs` are those of the operation.
    """
    if op.type not in ("PartitionedCall", "StatefulPartitionedCall"):
        return None
    function = op.graph._get_function(op.get_attr("f").name)
    return None if function is None else function.graph


def mark_lookups() -> None:
    """Tells TensorFlow that looking something up in a table does not change the table.

    It takes every use of a table for a change, and so runs functions that use one table one
    after the other: towers would wait for each other. Goes when TensorFlow marks these
    operations, as it does reads of variables.
    """
    for operation in ("LookupTableFindV2", "LookupTableSizeV2", "LookupTableExportV2"):
        _control_deps.register_read_only_resource_op(operation)


class _Inlining:
    """Which threads call the code of a `tf.function` instead of its traces."""

    kind = type(tf.function(lambda: None))
    traced = kind.__call__
    lock = threading.Lock()
    depths: ClassVar[dict[int, int]] = {}

    @classmethod
    def add(cls, change: int) -> None:
        thread = threading.get_ident()
        with cls.lock:
            cls.depths[thread] = cls.depths.get(thread, 0) + change
            if not cls.depths[thread]:
                del cls.depths[thread]
            cls.kind.__call__ = cls.call if cls.depths else cls.traced

    @staticmethod
    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        # One that was loaded has no Python code, and its traces know variables, not what stands
        # for them.
        loaded = type(function) is not _Inlining.kind
        if loaded or threading.get_ident() not in _Inlining.depths:
            return _Inlining.traced(function, *args, **kwargs)
        code = function.python_function
        if function._jit_compile and not tf.executing_eagerly():
            return _Inlining.traced(function._clone(None), *args, **kwargs)
        # `tf.vectorized_map` makes a function for each call of it, and cannot do without a graph.
        if tf.executing_eagerly() and str(code.__module__).startswith("tensorflow."):
            return _Inlining.traced(function, *args, **kwargs)
        if tf.executing_eagerly() or not function._autograph:
            return code(*args, **kwargs)
        # Keras turns AutoGraph off for its steps, but a function has often been traced before.
        with _ag_ctx.ControlStatusCtx(status=_ag_ctx.Status.UNSPECIFIED):
            options = function._experimental_autograph_options
            return _autograph.py_func_from_autograph(code, options)(*args, **kwargs)


@contextlib.contextmanager
def inlined_functions() -> Iterator[None]:
    """Inside, a `tf.function` that is called becomes part of the graph that is being traced.

    Its traces are kept, and know the tensors that stand for variables in a tower: another tower
    would use them after their graph is gone. Or they are from before, and know the variables
    themselves. Goes when traces can be told apart by what variables stand for, or there is a
    public way to call a function without its traces; `tf.config.run_functions_eagerly` is one,
    but for all threads and without AutoGraph.
    """
    _Inlining.add(1)
    try:
        yield
    finally:
        _Inlining.add(-1)


# --- AutoGraph ---


def keep_from_autograph(package: str) -> None:
    """Lets AutoGraph call what a package has as it is, as it does with Keras and TensorFlow.

    Else the first call of a model in a `tf.function` of the user's translates all of this library,
    which takes many times as long as tracing the model. The public `do_not_convert` also turns
    AutoGraph off for what is called from there: for functions that a layer gives to `tf.map_fn`.
    Goes when a package can say so of itself.

    Args:
        package: Its name.
    """
    rule = _autograph_config.DoNotConvert(package)
    _autograph_config.CONVERSION_RULES = (rule, *_autograph_config.CONVERSION_RULES)


def as_called_by_user(method: Any) -> Any:
    """A method of the user's, translated by AutoGraph if the user's code that called us is.

    Goes when `tf.autograph` says publicly whether the code that runs is translated.

    Args:
        method: Function or bound method.
    """
    return _autograph_api.tf_convert(method, autograph_here(), convert_by_default=False)


def autograph_here() -> contextlib.AbstractContextManager[Any]:
    """Whether AutoGraph translates what is called: inside of it that is so again.

    A `tf.function` turns it off or on for what it traces, and so would a tower. Goes as above.
    """
    return _ag_ctx.control_status_ctx()


# --- Random numbers ---


def global_seed() -> int | None:
    """What was given to `tf.random.set_seed`, `None` before that; it cannot be asked for."""
    return _context.global_seed()


@contextlib.contextmanager
def eager_seed(seed: int) -> Iterator[None]:
    """Inside, operations that are not traced draw with another global seed.

    `tf.random.set_seed` also starts all streams anew. Goes when there is a public way to give
    operations without a graph a seed for a while.

    Args:
        seed: Int.
    """
    context = _context.context()
    before = context._seed
    # What has no seed at all must go on to be different each time.
    if before is None:
        context._rng = random.Random()  # noqa: S311 (nothing is kept secret by it)
    context._seed = seed
    try:
        yield
    finally:
        context._seed = before
