"""One step of `fit`, `evaluate` and `predict`."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from typing import Any

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
from parallel_keras.steps.loss_on_towers import LossStep, NeedsWholeBatch
from parallel_keras.steps.overriding import LEARNING, overrides
from parallel_keras.steps.penalties import Penalty, penalties, total
from parallel_keras.steps.step_results import StepResult
from parallel_keras.steps.wrapper import Wrapper
from parallel_keras.towers import losses
from parallel_keras.towers.call import takes_training
from parallel_keras.towers.collectives import one_replica
from parallel_keras.towers.results import assign

Data = tuple[Any, Any, Any]


class ParallelSteps(Wrapper):
    """The part of `DataParallelModel` that Keras' own loops call for each batch."""

    def train_step(self, data: Any) -> dict[str, Any]:
        """One step of `fit`: losses and gradients of the whole batch, one update.

        Args:
            data: Inputs, targets and sample weights of a batch, as Keras gives them.

        Returns:
            A dict of the values of the metrics.
        """
        with self._once_there(data):
            if self._follows_template():
                return self._template_steps.run("train_step", self._whole_batch(data))
            return self._train(data)

    def _train(self, data: Any) -> dict[str, Any]:
        step, batch = self._step_on_towers(data, training=True)
        if step is None:
            return self._train_on_merged(self._whole_batch(data))
        try:
            shards = step.shard(batch)
            results = step.run(shards)
        except NeedsWholeBatch as error:
            checks.check_may_merge(self.loss_on, error)
            return self._train_on_merged(self._whole_batch(data))
        merged = step.merge(results)
        assign(merged.state)
        loss = self._update(merged)
        return self._logs(merged, loss, batch)

    def test_step(self, data: Any) -> dict[str, Any]:
        """One step of `evaluate`: losses and metrics of the whole batch.

        Args:
            data: Inputs, targets and sample weights of a batch, as Keras gives them.

        Returns:
            A dict of the values of the metrics.
        """
        if self._follows_template():
            return self._template_steps.run("test_step", self._whole_batch(data))
        step, batch = self._step_on_towers(data, training=False)
        if step is None:
            return self._test_on_merged(self._whole_batch(data))
        try:
            shards = step.shard(batch)
            results = step.run(shards)
        except NeedsWholeBatch as error:
            checks.check_may_merge(self.loss_on, error)
            return self._test_on_merged(self._whole_batch(data))
        merged = step.merge(results)
        assign(merged.state)
        loss, _ = self._with_penalty(merged)
        return self._logs(merged, loss, batch)

    def predict_step(self, data: Any) -> Any:
        """One step of `predict`: the merged outputs.

        Args:
            data: Inputs of a batch, as Keras gives them.

        Returns:
            The outputs, rows in order.
        """
        if overrides(self.template, ("predict_step",)):
            outputs = self._template_steps.run("predict_step", self._whole_batch(data))
            return self._workers.own_rows(outputs, data)
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        if not self.template.built:
            self._build_template((x,), {})
        with self._calls.record(None):
            return self._workers.own_rows(
                self(self._whole_batch(x), **self._phase(training=False)), x
            )

    def make_train_function(self, force: bool = False) -> Any:
        """Makes the function that `fit` calls for each step, as Keras does.

        Args:
            force: Whether to make it anew. Defaults to `False`.

        Returns:
            The function.
        """
        self._settle()
        if force or self.train_function is None:
            super().make_train_function(force=True)
            self.train_function = before_first_step(self.train_function, self._build_to_train)
        return self.train_function

    def make_test_function(self, force: bool = False) -> Any:
        """Makes the function that `evaluate` calls for each step, as Keras does.

        Args:
            force: Whether to make it anew. Defaults to `False`.

        Returns:
            The function.
        """
        self._settle()
        if force or self.test_function is None:
            super().make_test_function(force=True)
            self.test_function = before_first_step(self.test_function, self._build_to_test)
        return self.test_function

    def make_predict_function(self, force: bool = False) -> Any:
        """Makes the function that `predict` calls for each batch, as Keras does.

        Args:
            force: Whether to make it anew. Defaults to `False`.

        Returns:
            The function.
        """
        self._settle()
        return super().make_predict_function(force=force)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """What the steps update: the template's metrics, then those of a subclass of this model."""
        of_wrapper = super().metrics
        if "template" not in vars(self):
            return of_wrapper
        metrics = list(self.template.metrics)
        if not self._follows_template():
            known = set(map(id, metrics))
            metrics += [metric for metric in of_wrapper if id(metric) not in known]
        return metrics

    def reset_metrics(self) -> None:
        """Starts the metrics anew, as Keras does at the beginning of an epoch."""
        if self._follows_template():
            self.template.reset_metrics()
        else:
            super().reset_metrics()

    def get_metrics_result(self) -> dict[str, Any]:
        """The values of the metrics.

        Returns:
            A dict from names to values.
        """
        if self._follows_template():
            return self.template.get_metrics_result()
        return super().get_metrics_result()

    @property
    def loss_path(self) -> losses.Decision:
        """Whether the next step to be traced computes the loss on the towers, and why not."""
        if self._follows_template():
            return losses.Decision(None, "the template has steps of its own")
        if self._workers.towers == 1 or self.loss_on == "merged":
            return losses.Decision(None, "there is one tower, or the merged batch is asked for")
        calls = type(self).call is not self._parallel_call.__func__
        if self._overrides("compute_loss") or calls:
            decision = losses.Decision(None, "compute_loss or call is overridden")
        else:
            decision = losses.decide(self.loss)
        if self.loss_on == "towers":
            checks.check_towers_loss(decision)
        elif not decision.proven:
            return losses.Decision(None, decision.reason)
        return decision

    def _build_to_train(self, spec: Any) -> None:
        if self._steps_are_ours():
            build_for_step(self, spec, training=True)
            self._settle(running=True)

    def _build_to_test(self, spec: Any) -> None:
        if self._steps_are_ours():
            build_for_step(self, spec, training=False)

    def _steps_are_ours(self) -> bool:
        """Whether it is known what the steps will need, and they are traced at all."""
        overridden = overrides(self, LEARNING, ParallelSteps)
        return not (overridden or self._follows_template() or self.run_eagerly)

    def _step_on_towers(self, data: Any, *, training: bool) -> tuple[LossStep | None, Data]:
        """The step with the loss on the towers; `None` where it goes over the merged batch."""
        batch: Data = keras.utils.unpack_x_y_sample_weight(data)
        reduction = self.loss_path.reduction
        if reduction is None or not is_dense(batch):
            return None, batch
        if self.run_eagerly and not _compat.losses_and_metrics_are_built(self):
            return None, batch  # Nothing is traced then; the first step makes what they need.
        build_losses_and_metrics(self, batch)
        metrics = _compat.compiled_metrics(self)
        count = not self._overrides("compute_metrics") and all(map(losses.is_additive, metrics))
        scale = self._loss_scale(training)
        step = LossStep(self._calls.towers(), self, reduction, count, training, scale)
        return step, batch if count else self._whole_batch(batch)

    def _train_on_merged(self, data: Any) -> dict[str, Any]:
        """A training step whose loss is computed from the merged outputs."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape, self._calls.record(tape) as recording:
            y_pred = self(x, **self._phase(training=True))
            inner = recording.penalties.watching(self.trainable_weights)
            with tf.device(self.merge_device), inner:
                loss = self._loss(x, y, y_pred, sample_weight, training=True)
                scaled = loss if self.optimizer is None else self.optimizer.scale_loss(loss)
        self._apply(recording.gradients(scaled, self.trainable_weights))
        with tf.device(self.merge_device):
            self._track(loss, recording.rows)
            return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _test_on_merged(self, data: Any) -> dict[str, Any]:
        """A test step whose loss is computed from the merged outputs."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with self._calls.record(None) as recording:
            y_pred = self(x, **self._phase(training=False))
        inner = recording.penalties.watching(self.trainable_weights)
        with tf.device(self.merge_device):
            with inner:
                loss = self._loss(x, y, y_pred, sample_weight, training=False)
            self._track(loss, recording.rows)
            return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _once_there(self, data: Any) -> contextlib.AbstractContextManager[Any]:
        """Inside, nothing is done before the data is there; it matters where XLA is asked for.

        What does not depend on the data, such as counting the step, would be done beside
        reading it, also where there is none any more. XLA does not, so the bare model's
        counter would stay behind.
        """
        waits = self._towers_by_xla and not tf.executing_eagerly()
        return tf.control_dependencies(tensors(data)) if waits else contextlib.nullcontext()

    def _phase(self, *, training: bool) -> dict[str, bool]:
        """What Keras' own steps call a model with: only those that take `training` get it."""
        return {"training": training} if takes_training(self.template) else {}

    def _whole_batch(self, data: Any) -> Any:
        """The rows of all workers, where each feeds its own."""
        return self._workers.whole_batch(data)

    def _update(self, merged: StepResult) -> tf.Tensor:
        """Updates the weights once, and returns the loss with weight regularisers."""
        loss, found = self._with_penalty(merged)
        scale, gradients = merged.step.loss_scale, merged.gradients()
        for index, penalty in found.items():
            with tf.device(penalty.home or None):
                gradients[index] = merge.total([gradients[index], penalty.gradient(scale)])
        self._apply(gradients)
        return loss

    def _with_penalty(self, merged: StepResult) -> tuple[tf.Tensor, dict[int, Penalty]]:
        """The loss with the weight regularisers, which count once; those by weight."""
        found = penalties(self.trainable_weights, merged.step.towers.homes)
        added = total(found.values())
        with tf.device(self.merge_device):
            loss = merged.loss()
            if added:
                loss += tf.add_n([tf.cast(number, loss.dtype) for number in added])
            return loss, found

    def _logs(self, merged: StepResult, loss: tf.Tensor, batch: Data) -> dict[str, Any]:
        """Updates the metrics, and returns their values."""
        with tf.device(self.merge_device):
            merged.update_counters()
            self._track(loss, merged.rows)
            if merged.step.count:
                return self.get_metrics_result()
            x, y, sample_weight = batch
            return self.compute_metrics(x, y, merged.outputs(), sample_weight=sample_weight)

    def _apply(self, gradients: list[Any]) -> None:
        if self.trainable_weights:
            with one_replica(), self.homes.at_home(self.optimizer):
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
        return bool(overrides(self, (method,)))

    def _follows_template(self) -> bool:
        """Whether `fit` and `evaluate` take the template's own steps."""
        template = self.__dict__.get("template")
        return template is not None and bool(overrides(template, LEARNING))
