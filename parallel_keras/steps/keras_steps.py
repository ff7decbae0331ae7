"""One step of `fit`, `evaluate` and `predict`."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import keras
import tensorflow as tf

from parallel_keras import _compat, merge
from parallel_keras.nests import is_dense
from parallel_keras.steps import checks
from parallel_keras.steps.any_call import Runner
from parallel_keras.steps.building import (
    before_first_step,
    build_for_step,
    build_losses_and_metrics,
)
from parallel_keras.steps.loss_on_towers import LossStep, NeedsWholeBatch, StepResult
from parallel_keras.steps.template_steps import LEARNING, TemplateSteps, overrides
from parallel_keras.towers import losses
from parallel_keras.towers.collectives import one_replica
from parallel_keras.towers.run import Towers


class ParallelSteps(keras.Model):
    """Base of `DataParallelModel`: the steps that Keras' own loops call."""

    template: keras.Model
    loss_on: str
    merge_device: str
    devices: tuple[str, ...]
    _parallel_call: Any
    _runner: Runner
    _towers: Towers
    _template_steps: TemplateSteps
    train_function: Any
    test_function: Any

    def train_step(self, data: Any) -> dict[str, Any]:
        """One step of `fit`: losses and gradients of the whole batch, one update.

        Args:
            data: Inputs, targets and sample weights of a batch, as Keras gives them.

        Returns:
            A dict of the values of the metrics.
        """
        if self._follows_template():
            return self._template_steps.run("train_step", self._whole(data))
        logs = self._step_on_towers(keras.utils.unpack_x_y_sample_weight(data), training=True)
        if logs is not None:
            return logs
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(self._whole(data))
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
        if self._follows_template():
            return self._template_steps.run("test_step", self._whole(data))
        logs = self._step_on_towers(keras.utils.unpack_x_y_sample_weight(data), training=False)
        if logs is not None:
            return logs
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(self._whole(data))
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
        if overrides(self.template, ("predict_step",)):
            outputs = self._template_steps.run("predict_step", self._whole(data))
            return self._towers.workers.own_rows(outputs, data)
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        with self._runner.record(None):
            return self._towers.workers.own_rows(self(self._whole(x), training=False), x)

    def make_train_function(self, force: bool = False) -> Any:
        """Makes the function that `fit` calls for each step, as Keras does.

        Args:
            force: Whether to make it anew. Defaults to `False`.

        Returns:
            The function.
        """
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
        if force or self.test_function is None:
            super().make_test_function(force=True)
            self.test_function = before_first_step(self.test_function, self._build_to_test)
        return self.test_function

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """What the steps update: the template's own metrics where its own steps are taken."""
        return self.template.metrics if self._follows_template() else super().metrics

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
        if self._towers.workers.towers == 1 or self.loss_on == "merged":
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

    def _build_to_test(self, spec: Any) -> None:
        if self._steps_are_ours():
            build_for_step(self, spec, training=False)

    def _steps_are_ours(self) -> bool:
        """Whether it is known what the steps will need, and they are traced at all."""
        own = overrides(self, LEARNING, ParallelSteps)
        return not (own or self._follows_template() or self.run_eagerly)

    def _step_on_towers(
        self, data: tuple[Any, Any, Any], *, training: bool
    ) -> dict[str, Any] | None:
        """The step with the loss on the towers; `None` where it goes over the merged batch."""
        reduction = self.loss_path.reduction
        if reduction is None or not is_dense(data):
            return None
        build_losses_and_metrics(self, data)
        metrics = _compat.compiled_metrics(self)
        count = not self._overrides("compute_metrics") and all(map(losses.is_additive, metrics))
        if not count:
            data = self._whole(data)
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

    def _whole(self, data: Any) -> Any:
        """The rows of all workers, where each feeds its own."""
        return self._towers.workers.whole_batch(data)

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
                scaled = self.optimizer.scale_loss(penalty) if penalties and training else None
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
            with one_replica():
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
