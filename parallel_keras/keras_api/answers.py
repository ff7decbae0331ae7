"""Answers as the template does: what people ask a model about itself."""

from __future__ import annotations

import inspect
from typing import Any

import keras
import tensorflow as tf

from parallel_keras import _compat
from parallel_keras.nests import symbols
from parallel_keras.steps.overriding import call_loss, overrides
from parallel_keras.steps.wrapper import Wrapper

# What Keras itself sets on the model that is compiled and trained.
_OF_FIT = ("history", "loss", "loss_weights", "optimizer", "stop_training")
# What stops a loop, which may be the template's own.
_STOPS = ("stop_training", "stop_evaluating", "stop_predicting")
_KEPT = (keras.layers.Layer, keras.metrics.Metric, keras.Variable, keras.optimizers.Optimizer)


def _of_template(name: str) -> property:
    """A property of Keras', or the template's where its class has made it its own."""
    of_keras = getattr(keras.Model, name)

    def get(model: Wrapper) -> Any:
        template = vars(model).get("template")
        if template is not None and overrides(template, (name,)):
            return getattr(template, name)
        return of_keras.fget(model)

    return property(get, doc=of_keras.__doc__)


class Answers(Wrapper):
    """Hands questions on to the template.

    It needs the template and the devices, and gives what people ask a model about itself: its
    attributes, whether it is built and trainable, layers, losses and metrics, summary, shapes of
    outputs.
    """

    def __getattr__(self, name: str) -> Any:
        """The template's attribute or method of that name.

        Only called for names that this model does not have itself. Private names
        are not handed on: Keras asks for them to find out what an object is.

        Args:
            name: String.

        Returns:
            The template's attribute.

        Raises:
            AttributeError: If the template has none either.
        """
        template = self.__dict__.get("template")
        cause: AttributeError | None = None
        if template is not None and not name.startswith("_"):
            try:
                return getattr(template, name)
            except AttributeError as error:
                cause = error  # Perhaps from inside a property that the template does have.
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}, "
            f"and its template ({type(template).__name__}) has none either."
        ) from cause

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; one that only the template has is set there, where it is read.

        Layers, metrics and the like are set here all the same: a subclass may have
        some of its own under the name of one of the template's. One that stops a loop is set
        where the loop runs, too.

        Args:
            name: String.
            value: Any.
        """
        if self._is_of_template(name) and not isinstance(value, _KEPT):
            setattr(self.template, name, value)
            return
        super().__setattr__(name, value)
        if name in _STOPS and self._template_loops:
            setattr(self.template, name, value)

    def _is_of_template(self, name: str) -> bool:
        attributes = vars(self)
        return (
            "template" in attributes
            and name not in attributes
            and name not in _OF_FIT
            and not name.startswith("_")
            and not hasattr(type(self), name)
            and not isinstance(vars(attributes["template"]).get(name, keras.Model), (type, *_KEPT))
        )

    @property
    def built(self) -> bool:
        """Whether the template has its weights."""
        template = self.__dict__.get("template")
        return template is not None and template.built

    @built.setter
    def built(self, value: bool) -> None:
        # Keras sets this on the wrapper whenever it was called; only the template knows.
        del value

    def build(self, input_shape: Any = None) -> None:
        """Makes the template's weights.

        Args:
            input_shape: Shape of the inputs, as in `keras.Model.build`.
        """
        if input_shape is not None and not self.template.built:
            self.template.build(input_shape)

    @property
    def trainable(self) -> bool:
        """Whether the template's weights may be trained."""
        template = self.__dict__.get("template")
        return self.__dict__.get("_trainable", True) if template is None else template.trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self.template.trainable = value

    trainable_variables = _of_template("trainable_variables")
    trainable_weights = _of_template("trainable_weights")
    non_trainable_variables = _of_template("non_trainable_variables")
    non_trainable_weights = _of_template("non_trainable_weights")

    @property
    def layers(self) -> list[keras.layers.Layer]:
        """The template's layers."""
        return self.template.layers

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """What the steps update: the template's metrics, then those of a subclass of this model."""
        of_wrapper = super().metrics
        if "template" not in vars(self):
            return of_wrapper
        metrics = list(self.template.metrics)
        if not self._template_learns:
            known = set(map(id, metrics))
            metrics += [metric for metric in of_wrapper if id(metric) not in known]
        return metrics

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """The loss of a whole batch, by the template's own method if it has one.

        Args:
            x: Inputs of the batch.
            y: Targets.
            y_pred: Outputs of this model, merged.
            sample_weight: Weights of rows. Defaults to `None`.
            training: Whether it is computed for training. Defaults to `True`.

        Returns:
            A tensor of rank 0.
        """
        given = {"x": x, "y": y, "y_pred": y_pred, "sample_weight": sample_weight}
        if not overrides(self.template, ("compute_loss",)):
            return super().compute_loss(**given, training=training)
        compute = _compat.as_called_by_user(self.template.compute_loss)
        return call_loss(compute, given, training=training)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Updates the metrics with a whole batch, by the template's own method if it has one.

        Args:
            x: Inputs of the batch.
            y: Targets.
            y_pred: Outputs of this model, merged.
            sample_weight: Weights of rows. Defaults to `None`.

        Returns:
            A dict of the values of the metrics.
        """
        if not overrides(self.template, ("compute_metrics",)):
            return super().compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        compute = _compat.as_called_by_user(self.template.compute_metrics)
        return compute(x, y, y_pred, sample_weight=sample_weight)

    def get_layer(self, name: str | None = None, index: int | None = None) -> Any:
        """The template's layer of that name or index.

        Args:
            name: String, name of the layer.
            index: Int, index of the layer.

        Returns:
            The layer.
        """
        return self.template.get_layer(name=name, index=index)

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Prints one line on the devices, then the template's own table.

        Args:
            *args: As in `keras.Model.summary`.
            **kwargs: As in `keras.Model.summary`.
        """
        show = kwargs.get("print_fn") or print
        towers = "1 tower" if len(self.devices) == 1 else f"{len(self.devices)} towers"
        show(f"Data parallel on {towers}: {', '.join(self.devices)}")
        self.template.summary(*args, **kwargs)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """Shapes and dtypes of the outputs: the template's, found without running towers.

        Args:
            *args: As in `call`.
            **kwargs: As in `call`.

        Returns:
            A nest of `keras.KerasTensor`.
        """
        accepted = inspect.signature(self.template.call).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        known = {
            name: value
            for name, value in kwargs.items()
            if name not in ("training", "mask") or name in accepted or takes_any
        }
        return self.template.compute_output_spec(*args, **known)

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        """Shapes of the outputs: the template's.

        Args:
            *args: As in the template.
            **kwargs: As in the template.

        Returns:
            A shape, or a nest of them.
        """
        return self.template.compute_output_shape(*args, **kwargs)

    def _empty_outputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the template would return for no rows, which no tower must be given."""
        specs = self.compute_output_spec(*symbols(args), **kwargs)
        return keras.tree.map_structure(
            lambda spec: tf.zeros([size or 0 for size in spec.shape], spec.dtype), specs
        )
