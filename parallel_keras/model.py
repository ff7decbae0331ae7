"""The model that trains another one on all devices."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from parallel_keras import _compat, checks, losses, merge
from parallel_keras.answers import TemplateAnswers
from parallel_keras.devices import Devices, resolve
from parallel_keras.files import TemplateFiles
from parallel_keras.gradients import Runner
from parallel_keras.loss_step import LossStep, NeedsWholeBatch, StepResult
from parallel_keras.shard import is_empty
from parallel_keras.towers import Call, Towers


@keras.saving.register_keras_serializable(package="parallel_keras")
class DataParallelModel(TemplateAnswers, TemplateFiles, keras.Model):
    """Trains, evaluates and predicts with a model on several devices.

    The batch is cut by rows, each device runs the same model on its part, and
    the results are merged, so that the numbers are those of one device.

    Semantics (docs/semantics.md names the test of each sentence):

    - *Split*: every tensor of the inputs, targets and sample weights, by rows;
      sizes differ by at most one. `batch_size` is always that of the whole batch.
      A tower without rows is left out.
    - *Shared*: the weights. They are never cloned: each variable of this model
      is a variable of the template, read once a step and copied to each device.
    - *Merged*: outputs are concatenated, rows in order; outputs of rank 0 are
      averaged by rows; losses and gradients are those of the whole batch; what
      layers assign becomes one update (BatchNormalization's moving statistics
      are those of the whole batch).
    - *Random*: the towers of one step draw from different streams. Seed
      generators advance as on one device, and one tower draws what the template
      draws.
    - *Normalisation*: BatchNormalization normalises each shard by its own
      statistics, unless it has `synchronized=True`: then by the whole batch's.
    - *Saved*: the template, with its optimizer.

    Args:
        template: `keras.Model` to run, built or not, compiled or not. A
            compiled one hands over its optimizer, losses and metrics.
        devices: `None` for all GPUs (else all logical CPUs), an int for the
            first that many, or a list of GPU ids and device names. Defaults to
            `None`.
        merge_device: String, the device that merges outputs and gradients.
            Defaults to `"/CPU:0"`.
        loss_on: `"merged"` computes the loss of the merged outputs, right for
            every loss; `"towers"` has each tower compute its part, so that
            outputs stay on their device; `"auto"` takes the towers where that
            is provably the same number. Defaults to `"auto"`.
        strategy: Not available yet, must be `None`: several machines.
        name: String, the name of this model. Defaults to one from Keras.
        rules: Dict from the name of an input or output (the last key of its
            path) to what to do with it, where the default does not fit.
            `"whole"`: an input goes to every tower uncut, an output is the same
            on every tower. `"pad"`: outputs of different sizes are filled up
            with zeros. `"sum"`: outputs of rank 0 are added up; under the name
            `"add_loss"`, so are the terms that layers give to `add_loss`, which
            else are taken as means over rows. A model's only output is called
            `"output"`. Defaults to `None`.

    Input shape:
        That of the template: tensors of shape `(batch_size, ...)`, in any nest.

    Output shape:
        That of the template.

    Raises:
        TypeError: If `template` is not a `keras.Model`.
        ValueError: If an argument does not fit the machine or the template.

    Example:

    >>> template = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> parallel = DataParallelModel(template, devices=["CPU:0", "CPU:1"])
    >>> parallel.compile(optimizer="sgd", loss="mse")
    >>> history = parallel.fit(np.ones((5, 3)), np.ones((5, 2)), verbose=0)
    >>> parallel.predict(np.ones((5, 3)), verbose=0).shape
    (5, 2)
    """

    def __init__(
        self,
        template: keras.Model,
        devices: Devices = None,
        *,
        merge_device: str = "/CPU:0",
        loss_on: str = "auto",
        strategy: Any = None,
        name: str | None = None,
        rules: Mapping[str, str] | None = None,
    ) -> None:
        checks.check_arguments(template, loss_on, strategy, rules)
        names = resolve(devices)
        checks.check_template(template, len(names))
        # Inputs are converted by the template, on the towers, not here.
        super().__init__(name=name, dtype="float32", autocast=False)
        self.template = template
        self.devices = names
        self.loss_on = loss_on
        self.merge_device = resolve([merge_device])[0]
        self.supports_masking = True
        # XLA compiles for one device: towers can be compiled, the step around them cannot.
        self.jit_compile = False
        self.request = {"devices": devices, "merge_device": merge_device, "rules": dict(rules or {})}
        self._towers = Towers(template, names, self.merge_device, dict(rules or {}))
        self._runner = Runner(self._towers)
        if template.compiled:
            self._inherit_compile()

    @property
    def num_towers(self) -> int:
        """The number of devices."""
        return len(self.devices)

    def call(
        self, inputs: Any, *args: Any, training: Any = None, mask: Any = None, **kwargs: Any
    ) -> Any:
        """Runs the template on all devices: shard, towers, merge.

        Args:
            inputs: What the template takes first.
            *args: Further positional arguments of the template.
            training: Bool or `None`, as in Keras. Defaults to `None`.
            mask: Masks of the inputs. Defaults to those that Keras attached.
            **kwargs: Further keyword arguments of the template.

        Returns:
            What the template returns.
        """
        if is_empty((inputs, args)):
            return self._empty_outputs((inputs, *args), kwargs)
        outputs, masks, terms = self._runner(_as_call((inputs, *args), kwargs, mask), training)
        if terms:
            self.add_loss(terms)
        keras.tree.map_structure(_compat.set_mask, outputs, masks)
        return outputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Builds the template on the first batch, then calls as Keras does."""
        args, kwargs = _as_positional(self.template, args, kwargs)
        if not self.template.built:
            self._build_template(args, kwargs)
        return super().__call__(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Configures training as `keras.Model.compile` does, with its arguments.

        The template is compiled with the very same objects, so that what is
        saved can go on training. `jit_compile` compiles the towers with XLA, one
        by one; the step around them, which spans devices, is not compiled.

        Args:
            *args: As in `keras.Model.compile`.
            **kwargs: As in `keras.Model.compile`.
        """
        self.template.compile(*args, **kwargs)
        self._inherit_compile()

    def _inherit_compile(self) -> None:
        arguments = _compat.compile_arguments(self.template)
        checks.check_compile(self.template, jit=self.template.jit_compile)
        # The template's optimizer may already be wrapped for loss scaling.
        own = {"optimizer": self.template.optimizer, "jit_compile": False, "auto_scale_loss": False}
        super().compile(**{**arguments, **own})
        self._towers.configure(jit=self.template.jit_compile, eager=self.run_eagerly)
        self._runner = Runner(self._towers, eager=self.run_eagerly)

    def train_step(self, data: Any) -> dict[str, Any]:
        """One step of `fit`: losses and gradients of the whole batch, one update.

        Args:
            data: Inputs, targets and sample weights of a batch, as Keras gives them.

        Returns:
            A dict of the values of the metrics.
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        logs = self._step_on_towers((x, y, sample_weight), training=True)
        if logs is not None:
            return logs
        with tf.GradientTape() as tape, self._runner.record(tape) as recording:
            y_pred = self(x, training=True)
            with tf.device(self.merge_device):
                loss = self._loss(x, y, y_pred, sample_weight, training=True)
                scaled = loss if self.optimizer is None else self.optimizer.scale_loss(loss)
        self._apply(recording.gradients(scaled, self.trainable_weights))
        with tf.device(self.merge_device):
            self._track(loss, recording.rows)
            return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def test_step(self, data: Any) -> dict[str, Any]:
        """One step of `evaluate`: losses and metrics of the whole batch.

        Args:
            data: Inputs, targets and sample weights of a batch, as Keras gives them.

        Returns:
            A dict of the values of the metrics.
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        logs = self._step_on_towers((x, y, sample_weight), training=False)
        if logs is not None:
            return logs
        with self._runner.record(None) as recording:
            y_pred = self(x, training=False)
        with tf.device(self.merge_device):
            loss = self._loss(x, y, y_pred, sample_weight, training=False)
            self._track(loss, recording.rows)
            return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def predict_step(self, data: Any) -> Any:
        """One step of `predict`: the merged outputs.

        Args:
            data: Inputs of a batch, as Keras gives them.

        Returns:
            The outputs, rows in order.
        """
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        with self._runner.record(None):
            return self(x, training=False)

    @property
    def loss_path(self) -> losses.Decision:
        """Whether the next step to be traced computes the loss on the towers, and why not."""
        if self.num_towers == 1 or self.loss_on == "merged":
            return losses.Decision(None, "there is one tower, or the merged batch is asked for")
        if self._overrides("compute_loss"):
            decision = losses.Decision(None, "compute_loss is overridden")
        else:
            decision = losses.decide(self.loss)
        if self.loss_on == "towers":
            checks.check_towers_loss(decision)
        elif not decision.proven:
            return losses.Decision(None, decision.reason)
        return decision

    def _step_on_towers(self, data: tuple[Any, Any, Any], *, training: bool) -> dict | None:
        """The step with the loss on the towers; `None` where it goes over the merged batch."""
        reduction = self.loss_path.reduction
        if reduction is None or not _compat.is_dense(data):
            return None
        _compat.build_losses_and_metrics(self, data)
        metrics = _compat.compiled_metrics(self)
        count = not self._overrides("compute_metrics") and all(map(losses.is_additive, metrics))
        step = LossStep(self._towers, self, reduction, count)
        try:
            result = step.run(data, training=training, loss_scale=self._loss_scale(training))
        except NeedsWholeBatch as error:
            checks.check_may_merge(self.loss_on, error)
            return None
        for variable, value in result.state:
            variable.assign(value)
        x, y, sample_weight = data
        loss = self._finish(result, training=training)
        with tf.device(self.merge_device):
            result.update_counters()
            self._track(loss, result.shards.total)
            if count:
                return self.get_metrics_result()
            return self.compute_metrics(x, y, result.outputs(), sample_weight=sample_weight)

    def _finish(self, result: StepResult, *, training: bool) -> tf.Tensor:
        """Adds the weight regularisers, which count once, and updates the weights."""
        variables = self.trainable_weights
        with tf.device(self.merge_device):
            with tf.GradientTape() as tape:
                penalties = [
                    tf.cast(variable.regularizer(variable), result.loss().dtype)
                    for variable in variables
                    if variable.regularizer is not None
                ]
                penalty = tf.add_n(penalties) if penalties else None
                scaled = None if penalty is None else self.optimizer.scale_loss(penalty)
            loss = result.loss() if penalty is None else result.loss() + penalty
            if not training:
                return loss
            gradients = result.gradients()
            if penalty is not None:
                own = tape.gradient(scaled, [variable.value for variable in variables])
                gradients = [merge.total(pair) for pair in zip(gradients, own, strict=True)]
        self._apply(gradients)
        return loss

    def _apply(self, gradients: list[Any]) -> None:
        if self.trainable_weights:
            self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        else:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)

    def _loss_scale(self, training: bool) -> tf.Tensor | None:
        one = tf.ones(())
        scale = self.optimizer.scale_loss(one) if training else one
        return None if scale is one else scale

    def _loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any, *, training: bool) -> Any:
        # Overrides written before Keras 3.3 do not take `training`.
        takes_training = "training" in inspect.signature(self.compute_loss).parameters
        extra = {"training": training} if takes_training else {}
        return self.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, **extra)

    def _track(self, loss: tf.Tensor, rows: Any) -> None:
        """Updates the mean of the loss that Keras reports, weighted by rows as it does."""
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=rows)
                return

    def _overrides(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(keras.Model, method)

    def _build_template(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Makes the template's weights from the shapes and dtypes of a batch."""
        with tf.device(None):  # weights go where they would go without this wrapper
            self.template(*keras.tree.map_structure(_symbol, args), **kwargs)

    def _empty_outputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the template would return for no rows, which no tower must be given."""
        symbols = self.compute_output_spec(*keras.tree.map_structure(_symbol, args), **kwargs)
        return keras.tree.map_structure(
            lambda symbol: tf.zeros([size or 0 for size in symbol.shape], symbol.dtype), symbols
        )


def _symbol(leaf: Any) -> Any:
    if not tf.is_tensor(leaf) and not isinstance(leaf, np.ndarray):
        return leaf
    sparse = isinstance(leaf, tf.SparseTensor)
    dtype = keras.backend.standardize_dtype(leaf.dtype)
    return keras.KerasTensor(tuple(leaf.shape), dtype, sparse=sparse)


def _as_positional(
    template: keras.Model, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gives by position what the template's `call` names, but for Keras' own arguments.

    `DataParallelModel.call` cannot know those names, and Keras refuses tensors and
    other values side by side in the rest of the keywords.
    """
    context = {name: kwargs[name] for name in ("training", "mask") if name in kwargs}
    named = {name: value for name, value in kwargs.items() if name not in context}
    if not named:
        return args, kwargs
    bound = inspect.signature(template.call).bind_partial(*args, **named)
    return bound.args, {**bound.kwargs, **context}


def _as_call(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Any) -> Call:
    masks = keras.tree.map_structure(_compat.get_mask, args)
    if mask is not None:
        masks = (mask, *masks[1:])
    return {"args": args, "kwargs": kwargs, "masks": masks}
