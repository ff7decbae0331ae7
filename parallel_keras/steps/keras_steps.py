"""One step of `fit`, `evaluate` and `predict`: which way it goes, and what is around its towers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from parallel_keras import _compat, merge
from parallel_keras.nests import is_dense, tensors
from parallel_keras.steps import checks
from parallel_keras.steps.building import (
    before_first_step,
    build_for_step,
    build_losses_and_metrics,
)
from parallel_keras.steps.loss_on_towers import LossStep, NeedsWholeBatch, StepResult
from parallel_keras.steps.overriding import LEARNING, call_loss, overridden_steps, overrides
from parallel_keras.steps.penalties import Penalty, penalties, total
from parallel_keras.steps.predicting import Predicting
from parallel_keras.towers import losses
from parallel_keras.towers.call import takes_training
from parallel_keras.towers.collectives import one_replica
from parallel_keras.towers.results import assign
from parallel_keras.towers.saying import warn_once

if TYPE_CHECKING:
    from parallel_keras.steps.loss_on_merged import Recording
    from parallel_keras.steps.runtime import Runtime

Data = tuple[Any, Any, Any]
Logs = dict[str, Any]


class Steps:
    """Runs the steps of a `DataParallelModel`.

    Args:
        model: The model.
        runtime: What it runs on.
        base: Its class, of which it may be of a subclass with methods of its own.
    """

    def __init__(self, model: keras.Model, runtime: Runtime, base: type[keras.Model]) -> None:
        self._model, self._runtime, self._base = model, runtime, base
        self.predicting = Predicting()

    def run(self, flow: Callable[[LossStep, Data], Logs], data: Any, *, training: bool) -> Logs:
        """Runs a step: the template's own, with the loss on the towers, or over the merged batch.

        Args:
            flow: What a step with the loss on the towers does, from it and the batch to its logs.
            data: Inputs, targets and sample weights of a batch, as Keras gives them.
            training: Whether weights are updated.

        Returns:
            A dict of the values of the metrics.
        """
        name = "train_step" if training else "test_step"
        with self._once_there(data) if training else contextlib.nullcontext():
            if overridden_steps(self._model.template):
                return self._runtime.template_steps.run(name, self._whole_batch(data))
            step, batch = self._step_on_towers(data, training=training)
            if step is not None:
                try:
                    return flow(step, batch)
                except NeedsWholeBatch as error:
                    checks.check_may_merge(self._model.loss_on, error)
            on_merged = self._train_on_merged if training else self._test_on_merged
            return on_merged(self._whole_batch(data))

    def predict(self, data: Any) -> Any:
        """One step of `predict`: the merged outputs.

        Args:
            data: Inputs of a batch, as Keras gives them.

        Returns:
            The outputs, rows in order.
        """
        model, runtime = self._model, self._runtime
        if overrides(model.template, ("predict_step",)):
            outputs = runtime.template_steps.run("predict_step", self._whole_batch(data))
            return runtime.workers.own_rows(outputs, data)
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        with self._recorded(None, x, in_parts=self.predicting.in_parts):
            outputs = model(self._whole_batch(x), **self._phase(training=False))
            return runtime.workers.own_rows(outputs, x)

    def predict_function(self, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """What Keras made to predict a batch, whose outputs then stay in parts where they can.

        Args:
            step: Takes batches and returns their outputs.

        Returns:
            A function like the one given.
        """
        model = self._model
        methods = ("predict_step", "call", "__call__")  # Those that see outputs.
        seen = overrides(model, methods, self._base) or overrides(model.template, methods[:1])
        # Keras joins the batches of one execution by itself.
        if seen or model.steps_per_execution > 1 or self._runtime.workers.size > 1:
            return step
        return step if self._runtime.workers.towers == 1 else self.predicting.function(step)

    def update_weights(self, merged: StepResult) -> tf.Tensor:
        """Assigns what layers assigned, updates the weights once, and gives the loss.

        Args:
            merged: The step as one.

        Returns:
            The loss with weight regularisers.
        """
        assign(merged.state)
        loss, found = self._with_penalty(merged)
        scale, gradients = merged.step.loss_scale, merged.gradients()
        for index, penalty in found.items():
            with tf.device(penalty.home or None):
                gradients[index] = merge.total([gradients[index], penalty.gradient(scale)])
        self._apply(gradients)
        return loss

    def loss(self, merged: StepResult) -> tf.Tensor:
        """Assigns what layers assigned, and gives the loss.

        Args:
            merged: The step as one.

        Returns:
            The loss with weight regularisers.
        """
        assign(merged.state)
        loss, _ = self._with_penalty(merged)
        return loss

    def update_metrics(self, merged: StepResult, loss: tf.Tensor, batch: Data) -> dict[str, Any]:
        """Updates the metrics, and returns their values.

        Args:
            merged: The step as one.
            loss: Its loss.
            batch: Inputs, targets and sample weights.

        Returns:
            A dict of the values of the metrics.
        """
        with tf.device(self._model.merge_device):
            merged.update_counters()
            self._track(loss, merged.rows)
            if merged.step.count:
                return self._model.get_metrics_result()
            x, y, sample_weight = batch
            return self._model.compute_metrics(x, y, merged.outputs(), sample_weight=sample_weight)

    def loss_path(self) -> losses.Decision:
        """Whether the next step to be traced computes the loss on the towers, and why not."""
        if overridden_steps(self._model.template):
            return losses.Decision(None, "the template has steps of its own")
        if self._runtime.workers.towers == 1 or self._model.loss_on == "merged":
            return losses.Decision(None, "there is one tower, or the merged batch is asked for")
        calls = type(self._model).call is not self._base.call
        if self._overrides("compute_loss") or calls:
            decision = losses.Decision(None, "compute_loss or call is overridden")
        else:
            decision = losses.decide(self._model.loss)
        if self._model.loss_on == "towers":
            checks.check_towers_loss(decision)
            if not decision.proven:
                warn_once(
                    self._model,
                    'loss_on="towers": %s, but is taken for the %s of the losses of its rows. '
                    "Otherwise the numbers are not those of one device; "
                    'parallel_keras.verify(parallel, batch) tells, and loss_on="auto" is right '
                    "for any loss.",
                    *(decision.reason, decision.reduction),
                )
        elif not decision.proven:
            return losses.Decision(None, decision.reason)
        return decision

    def building(self, function: Callable[[Any], Any], *, training: bool) -> Callable[[Any], Any]:
        """What Keras made to run a step, which then first makes the variables that it needs.

        Args:
            function: Takes an iterator and runs a step.
            training: Whether weights are updated.

        Returns:
            A function like the one given.
        """

        def build(spec: Any) -> None:
            if self._are_known():
                build_for_step(self._model, spec, training=training)
                if training:
                    self._runtime.settle(running=True)

        return before_first_step(function, build)

    def _are_known(self) -> bool:
        """Whether it is known what the steps will need, and they are traced at all."""
        overridden = overrides(self._model, LEARNING, self._base)
        return not (overridden or overridden_steps(self._model.template) or self._model.run_eagerly)

    def _step_on_towers(self, data: Any, *, training: bool) -> tuple[LossStep | None, Data]:
        """The step with the loss on the towers; `None` where it goes over the merged batch."""
        batch: Data = keras.utils.unpack_x_y_sample_weight(data)
        reduction = self.loss_path().reduction
        if reduction is None or not is_dense(batch):
            return None, batch
        if self._model.run_eagerly and not _compat.losses_and_metrics_are_built(self._model):
            return None, batch  # Nothing is traced then; the first step makes what they need.
        build_losses_and_metrics(self._model, batch)
        metrics = _compat.compiled_metrics(self._model)
        count = not self._overrides("compute_metrics") and all(map(losses.is_additive, metrics))
        scale = self._loss_scale(training)
        step = LossStep(
            self._runtime.calls.towers(), self._model, reduction, count, training, scale
        )
        return step, batch if count else self._whole_batch(batch)

    def _train_on_merged(self, data: Any) -> dict[str, Any]:
        """A training step whose loss is computed from the merged outputs."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape, self._recorded(tape, x) as recording:
            y_pred = self._model(x, **self._phase(training=True))
            inner = recording.penalties.watching(self._model.trainable_weights)
            with tf.device(self._model.merge_device), inner:
                loss = self._loss(x, y, y_pred, sample_weight, training=True)
                optimizer = self._model.optimizer
                scaled = loss if optimizer is None else optimizer.scale_loss(loss)
        self._apply(recording.gradients(scaled, self._model.trainable_weights))
        with tf.device(self._model.merge_device):
            self._track(loss, recording.rows)
            return self._model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _test_on_merged(self, data: Any) -> dict[str, Any]:
        """A test step whose loss is computed from the merged outputs."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with self._recorded(None, x) as recording:
            y_pred = self._model(x, **self._phase(training=False))
        inner = recording.penalties.watching(self._model.trainable_weights)
        with tf.device(self._model.merge_device):
            with inner:
                loss = self._loss(x, y, y_pred, sample_weight, training=False)
            self._track(loss, recording.rows)
            return self._model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _recorded(
        self, tape: tf.GradientTape | None, x: Any, *, in_parts: bool = False
    ) -> contextlib.AbstractContextManager[Recording]:
        """The first call inside is the step's forward pass; the template has its weights then."""
        if not self._model.template.built:
            self._runtime.build((x,), {})
        return self._runtime.calls.record(tape, in_parts=in_parts)

    def _once_there(self, data: Any) -> contextlib.AbstractContextManager[Any]:
        """Inside, nothing is done before the data is there; it matters where XLA is asked for.

        What does not depend on the data, such as counting the step, would be done beside
        reading it, also where there is none any more. XLA does not, so the bare model's
        counter would stay behind.
        """
        waits = self._runtime.by_xla and not tf.executing_eagerly()
        return tf.control_dependencies(tensors(data)) if waits else contextlib.nullcontext()

    def _phase(self, *, training: bool) -> dict[str, bool]:
        """What Keras' own steps call a model with: only those that take `training` get it."""
        return {"training": training} if takes_training(self._model.template) else {}

    def _whole_batch(self, data: Any) -> Any:
        """The rows of all workers, where each feeds its own."""
        return self._runtime.workers.whole_batch(data)

    def _with_penalty(self, merged: StepResult) -> tuple[tf.Tensor, dict[int, Penalty]]:
        """The loss with the weight regularisers, which count once; those by weight."""
        found = penalties(self._model.trainable_weights, merged.step.towers.homes)
        added = total(found.values())
        with tf.device(self._model.merge_device):
            loss = merged.loss()
            if added:
                loss += tf.add_n([tf.cast(number, loss.dtype) for number in added])
            return loss, found

    def _apply(self, gradients: list[Any]) -> None:
        weights, optimizer = self._model.trainable_weights, self._model.optimizer
        if weights:
            with one_replica(), self._model.homes.at_home(optimizer):
                optimizer.apply_gradients(zip(gradients, weights, strict=True))
        else:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)

    def _loss_scale(self, training: bool) -> tf.Tensor | None:
        one = tf.ones(())
        scale = self._model.optimizer.scale_loss(one) if training else one
        return None if scale is one else scale

    def _loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any, *, training: bool) -> Any:
        given = {"x": x, "y": y, "y_pred": y_pred, "sample_weight": sample_weight}
        return call_loss(self._model.compute_loss, given, training=training)

    def _track(self, loss: tf.Tensor, rows: Any) -> None:
        """Updates the mean of the loss that Keras reports, weighted by rows as it does."""
        for metric in self._model.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=rows)
                return

    def _overrides(self, method: str) -> bool:
        return bool(overrides(self._model, (method,), self._base))
