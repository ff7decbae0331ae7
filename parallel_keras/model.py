"""The model that trains another one on all devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from parallel_keras import _compat
from parallel_keras.devices import Devices, resolve
from parallel_keras.homes.plan import Homes
from parallel_keras.keras_api.answers import Answers
from parallel_keras.keras_api.loops import Loops
from parallel_keras.keras_api.notices import Notices
from parallel_keras.keras_api.saving import Files
from parallel_keras.shard import is_empty
from parallel_keras.steps import checks
from parallel_keras.steps.first_batch import first_batch
from parallel_keras.steps.keras_steps import Steps
from parallel_keras.steps.loss_on_towers import LossStep
from parallel_keras.steps.overriding import LEARNING, overrides
from parallel_keras.steps.runtime import Runtime
from parallel_keras.towers import losses
from parallel_keras.towers.call import Call, as_call, as_positional
from parallel_keras.towers.results import Merged
from parallel_keras.workers import servers
from parallel_keras.workers.agreement import check_same, facts_of
from parallel_keras.workers.alone import Alone
from parallel_keras.workers.connection import connect

_compat.keep_from_autograph("parallel_keras")


@keras.saving.register_keras_serializable(package="parallel_keras")
class DataParallelModel(Answers, Files, Loops):
    """Trains, evaluates and predicts with a model on several devices.

    The batch is cut by rows, each device runs the same model on its part, and
    the results are merged, so that the numbers are those of one device.

    Semantics (docs/semantics.md names the test of each sentence):

    - *Split*: every tensor of the inputs, targets and sample weights, by rows;
      sizes differ by at most one. `batch_size` is always that of the whole batch.
      A tower without rows is left out.
    - *Shared*: the weights. They are never cloned: each variable of this model
      is a variable of the template, read once a step and copied to each device.
      Embedding tables of 1 MiB or more stay where they are, and only the rows
      that a batch looks up travel.
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
        strategy: A `tf.distribute.MultiWorkerMirroredStrategy`, made before any other
            use of TensorFlow, for several machines that run the same script. Batches
            are global: every worker is fed the same ones and takes its rows. Defaults
            to `None`.
        name: String, the name of this model. Defaults to one from Keras.
        rules: Dict from the name of an input or output (the last key of its
            path) to what to do with it, where the default does not fit.
            `"whole"`: an input goes to every tower uncut, an output is the same
            on every tower. `"pad"`: outputs of different sizes are filled up
            with zeros. `"sum"`: outputs of rank 0 are added up; under the name
            `"add_loss"`, so are the terms that layers give to `add_loss`, which
            else are taken as means over rows. A model's only output is called
            `"output"`. `"whole"` under the name `"batch"`: no batch is cut, the first
            device runs the whole model (graph networks). `"own"` under the name
            `"batch"`: with a strategy, each worker feeds rows of its own. Defaults to
            `None`.
        weights_on: Where weights live, and with them what the optimizer keeps for them,
            their update and the sum of their gradients. `"spread"`: each on one of the
            towers' devices, so that each of N devices holds and sends its share, which
            is as much as an all-reduce would; `"unmoved"`: where they are; the name of
            a device: all there. They are moved in place, and are what they were.
            `"auto"`: `"spread"` where the towers are two or more GPUs, or devices of
            other machines, else `"unmoved"`. Defaults to `"auto"`.

    Input shape:
        That of the template: tensors of shape `(batch_size, ...)`, in any nest.

    Output shape:
        That of the template.

    Raises:
        TypeError: If `template` is not a `keras.Model`.
        ValueError: If an argument does not fit the machine or the template.

    Example:
    >>> import numpy as np
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
        weights_on: str = "auto",
    ) -> None:
        checks.check_arguments(template, loss_on, strategy, rules, weights_on)
        uncut = checks.is_uncut(rules, strategy)
        if isinstance(template, DataParallelModel):
            raise ValueError(  # noqa: TRY004 (it is a keras.Model, as asked)
                "Expected a template that is not on several devices already: towers do not hold "
                f"towers. Received: a {type(template).__name__} on {list(template.devices)}. "
                "Wrap what it wraps: DataParallelModel(model.template, devices=...)."
            )
        checks.check_no_strategy(template)
        cluster = connect(strategy, feeds_own_rows=checks.OWN_ROWS in (rules or {}).items())
        task = "" if cluster is None else cluster.task
        names = resolve(devices, task)[: 1 if uncut else None]
        if cluster is not None:
            cluster.seat(len(names))
        workers = cluster or Alone(len(names))
        weights_place = checks.place_of_weights(weights_on, task)
        checks.check_template(template, workers.towers)
        # Inputs are converted by the template, on the towers, not here.
        super().__init__(name=name, dtype=template.dtype_policy, autocast=False)
        checks.check_overrides(
            overrides(self, LEARNING, DataParallelModel), overrides(template, LEARNING), loss_on
        )
        self.template = template
        self.devices = names
        self.loss_on = loss_on
        self.merge_device = resolve([merge_device], task)[0]
        self.supports_masking = True
        _compat.allow_any_arguments(self)
        # XLA compiles for one device: towers can be compiled, the step around them cannot.
        self.jit_compile = False
        self.request = {
            "devices": devices,
            "merge_device": merge_device,
            "rules": dict(rules or {}),
            "weights_on": weights_on,
        }
        self.homes = Homes(template, names, weights_place)
        self._runtime = Runtime(self, workers, cluster)
        self._steps = Steps(self, self._runtime, DataParallelModel)
        if cluster is not None:
            check_same(cluster, facts_of(self))
        if template.compiled:
            self._inherit_compile()
        self._runtime.settle()
        self._notices = Notices(template, names)
        self._notices.wrapped(self)

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

        def flow(towers: Any, call: Call, training: Any) -> Merged:
            shards = towers.shard(call)
            results = towers.run(shards, training)
            return towers.merge(results)

        merged = self._runtime.calls.differentiable(
            flow, as_call((inputs, *args), kwargs, mask), training
        )
        if merged.terms:
            self.add_loss(merged.terms)
        return merged.attached(self.template)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Builds the template on the first batch, then calls as Keras does."""
        args, kwargs = as_positional(self.template, args, kwargs)
        if not self.template.built:
            self._runtime.build(args, kwargs)
        with servers.naming_faults():
            self._runtime.settle()
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
        self._inherit_compile(jit=kwargs.get("jit_compile") is True)
        self._runtime.settle()

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles the template from its serialised arguments, and this model with it.

        Args:
            config: Dict from `get_compile_config()`.
        """
        self.template.compile_from_config(config)
        self._inherit_compile()

    def _inherit_compile(self, *, jit: bool = False) -> None:
        arguments = _compat.compile_arguments(self.template)
        checks.check_compile(self.template, self._runtime.workers.towers, jit=jit)
        # The template's optimizer may already be wrapped for loss scaling.
        ours = {
            "optimizer": self.template.optimizer,
            "jit_compile": False,
            "auto_scale_loss": False,
        }
        super().compile(**{**arguments, **ours})
        _compat.share_compiled(self, self.template)
        self._runtime.compile_towers(jit=self.template.jit_compile, eager=self.run_eagerly)

    def fit(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as `keras.Model.fit` does, with its arguments.

        A template without weights gets them from the shapes of the first batch, so
        that callbacks which restore weights before the first step find some.

        Args:
            x: As in `keras.Model.fit`.
            *args: As in `keras.Model.fit`.
            **kwargs: As in `keras.Model.fit`. `batch_size` is that of all devices together.

        Returns:
            A `keras.callbacks.History`.
        """
        if self._template_loops:
            seen = {"x": x, "batch_size": kwargs.get("batch_size")}
            self._notices.fitting((), seen)
            return super().fit(*(() if x is None else (x,)), *args, **kwargs)
        self._notices.fitting((x, *args), kwargs)
        # What steps of its own give to which model is theirs to know.
        if not self.template.built and not self._template_learns:
            inputs, x = first_batch(x)
            if inputs is not None:
                self._runtime.build_early(inputs)
        return super().fit(x, *args, **kwargs)

    def train_step(self, data: Any) -> dict[str, Any]:
        """One step of `fit`: losses and gradients of the whole batch, one update.

        Args:
            data: Inputs, targets and sample weights of a batch, as Keras gives them.

        Returns:
            A dict of the values of the metrics.
        """

        def flow(step: LossStep, batch: Any) -> dict[str, Any]:
            shards = step.shard(batch)
            results = step.run(shards)
            merged = step.merge(results)
            loss = self._steps.update_weights(merged)
            return self._steps.update_metrics(merged, loss, batch)

        return self._steps.run(flow, data, training=True)

    def test_step(self, data: Any) -> dict[str, Any]:
        """One step of `evaluate`: losses and metrics of the whole batch.

        Args:
            data: Inputs, targets and sample weights of a batch, as Keras gives them.

        Returns:
            A dict of the values of the metrics.
        """

        def flow(step: LossStep, batch: Any) -> dict[str, Any]:
            shards = step.shard(batch)
            results = step.run(shards)
            merged = step.merge(results)
            loss = self._steps.loss(merged)
            return self._steps.update_metrics(merged, loss, batch)

        return self._steps.run(flow, data, training=False)

    def predict_step(self, data: Any) -> Any:
        """One step of `predict`: the outputs of `call`, merged.

        Args:
            data: Inputs of a batch, as Keras gives them.

        Returns:
            The outputs, rows in order.
        """
        return self._steps.predict(data)

    @property
    def loss_path(self) -> losses.Decision:
        """Whether the next step to be traced computes the loss on the towers, and why not."""
        return self._steps.loss_path()
