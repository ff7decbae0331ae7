"""Which losses and metrics are the same number when each tower computes its part."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras

from parallel_keras import _compat

_ROW_WISE_LOSSES = (
    "BinaryCrossentropy",
    "BinaryFocalCrossentropy",
    "CTC",
    "CategoricalCrossentropy",
    "CategoricalFocalCrossentropy",
    "CategoricalHinge",
    "CosineSimilarity",
    "Hinge",
    "Huber",
    "KLDivergence",
    "LogCosh",
    "MeanAbsoluteError",
    "MeanAbsolutePercentageError",
    "MeanSquaredError",
    "MeanSquaredLogarithmicError",
    "Poisson",
    "SparseCategoricalCrossentropy",
    "SquaredHinge",
)
_ROW_WISE_FUNCTIONS = (
    "binary_crossentropy",
    "binary_focal_crossentropy",
    "categorical_crossentropy",
    "categorical_focal_crossentropy",
    "categorical_hinge",
    "cosine_similarity",
    "ctc",
    "hinge",
    "huber",
    "kl_divergence",
    "log_cosh",
    "mean_absolute_error",
    "mean_absolute_percentage_error",
    "mean_squared_error",
    "mean_squared_logarithmic_error",
    "poisson",
    "sparse_categorical_crossentropy",
    "squared_hinge",
)
_ADDITIVE_METRICS = (
    "AUC",
    "Accuracy",
    "BinaryAccuracy",
    "BinaryCrossentropy",
    "BinaryIoU",
    "CategoricalAccuracy",
    "CategoricalCrossentropy",
    "CategoricalHinge",
    "F1Score",
    "FBetaScore",
    "FalseNegatives",
    "FalsePositives",
    "Hinge",
    "IoU",
    "KLDivergence",
    "LogCoshError",
    "MeanAbsoluteError",
    "MeanAbsolutePercentageError",
    "MeanIoU",
    "MeanSquaredError",
    "MeanSquaredLogarithmicError",
    "OneHotIoU",
    "OneHotMeanIoU",
    "Poisson",
    "Precision",
    "PrecisionAtRecall",
    "Recall",
    "RecallAtPrecision",
    "SensitivityAtSpecificity",
    "SparseCategoricalAccuracy",
    "SparseCategoricalCrossentropy",
    "SparseTopKCategoricalAccuracy",
    "SpecificityAtSensitivity",
    "SquaredHinge",
    "TopKCategoricalAccuracy",
    "TrueNegatives",
    "TruePositives",
)
_COUPLED_LOSSES = ("Circle", "Dice", "Tversky")
_COUPLED_FUNCTIONS = ("circle", "dice", "tversky")
_SHAPE_RESOLVED = ("crossentropy", "ce")


# Since Keras 3.15 activity regularisers are divided by the batch size; before, they are sums.
_MEANS_SINCE = (3, 15)
ACTIVITY_RULE = (
    "mean" if tuple(map(int, keras.__version__.split(".")[:2])) >= _MEANS_SINCE else "sum"
)


def term_rule(source: str, rules: Mapping[str, str]) -> str:
    """How the towers' terms of the loss are joined.

    Args:
        source: `"activity"` for activity regularisers, `"add_loss"` for calls of a
            layer's own, `"found_sum"` for those that were found to be sums over rows.
        rules: What the user declared, by name.

    Returns:
        `"mean"`, weighted by rows, or `"sum"`.
    """
    if source == "activity":
        return ACTIVITY_RULE
    return rules.get("add_loss", "sum" if source == "found_sum" else "mean")


def adds_up_by_rows(regularizer: Any) -> bool:
    """Whether the penalty of a batch is the sum of those of its rows.

    Args:
        regularizer: What was given to a layer as its `activity_regularizer`.

    Returns:
        `True` only for Keras' own classes of which that is known.
    """
    known = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)
    return type(regularizer) in known


def activity_penalty(regularizer: Any, activity: Any) -> Any:
    """The term of the loss that Keras makes of the activity of a layer.

    Args:
        regularizer: The layer's `activity_regularizer`.
        activity: What the layer returned, a tensor of the whole batch.

    Returns:
        A tensor.
    """
    penalty = regularizer(activity)
    if ACTIVITY_RULE == "sum" or activity.shape.rank == 0:
        return penalty
    rows = keras.ops.cast(keras.ops.shape(activity)[0], penalty.dtype)
    return keras.ops.divide_no_nan(penalty, rows)


@dataclasses.dataclass(frozen=True)
class Decision:
    """Whether towers may compute a loss, and if not, why.

    Attributes:
        reduction: `"mean"` or `"sum"`, how the parts of the towers add up;
            `None` if they do not.
        reason: String, why not.
        proven: Bool, whether it is known that no loss looks beyond one row.
    """

    reduction: str | None
    reason: str = ""
    proven: bool = True


def decide(loss: Any) -> Decision:
    """Whether the loss of a batch is the (weighted) sum of the losses of its rows.

    Args:
        loss: What was given to `compile`: a name, function or `keras.losses.Loss`,
            or a nest of those.

    Returns:
        The `Decision`.

    Example:
    >>> from parallel_keras.towers import losses
    >>> losses.decide("mse").reduction
    'mean'
    >>> losses.decide(keras.losses.Dice()).reason
    'Dice looks at several rows at once'
    """
    leaves = [leaf for leaf in keras.tree.flatten(loss) if leaf is not None]
    if not leaves:
        return Decision(None, "there is no compiled loss")
    decisions = [_decide_one(leaf) for leaf in leaves]
    for decision in decisions:
        if decision.reduction is None:
            return decision
    if len({decision.reduction for decision in decisions}) > 1:
        return Decision(None, "some losses are means and some are sums")
    unproven = [decision for decision in decisions if not decision.proven]
    return unproven[0] if unproven else decisions[0]


def is_additive(metric: keras.metrics.Metric) -> bool:
    """Whether a metric's state grows by the same amount however the rows are grouped.

    Args:
        metric: A built metric.

    Returns:
        `True` only for Keras' own classes of which that is known.
    """
    return (
        type(metric) in {getattr(keras.metrics, name, None) for name in _ADDITIVE_METRICS}
        and getattr(metric, "axis", -1) == -1
        and _is_as_keras_made_it(metric)
    )


def _decide_one(loss: Any) -> Decision:
    if isinstance(loss, str) and loss not in _SHAPE_RESOLVED:
        loss = keras.losses.get(loss)
    if isinstance(loss, keras.losses.Loss):
        return _decide_object(loss)
    if loss in [*_SHAPE_RESOLVED, *_known(_ROW_WISE_FUNCTIONS)]:
        return Decision("mean")
    name = getattr(loss, "__name__", type(loss).__name__)
    if loss in [keras.losses.get(known) for known in _COUPLED_FUNCTIONS]:
        return Decision(None, f"{name} looks at several rows at once")
    return Decision("mean", f"{name} is not known to look at one row at a time", proven=False)


def _decide_object(loss: keras.losses.Loss) -> Decision:
    name, arguments = type(loss).__name__, _compat.loss_arguments(loss)
    reasons = {
        "divides by the sum of the sample weights": loss.reduction == "mean_with_sample_weight",
        "is not reduced to a number": loss.reduction in (None, "none"),
        "looks at several rows at once": type(loss) in _known(_COUPLED_LOSSES),
        "divides by the number of rows not ignored": arguments.get("ignore_class") is not None,
        "reduces over another axis than the last": arguments.get("axis", -1) not in (-1, None),
    }
    for reason, applies in reasons.items():
        if applies:
            return Decision(None, f"{name} {reason}")
    reduction = "sum" if loss.reduction == "sum" else "mean"
    known = type(loss) in _known(_ROW_WISE_LOSSES)
    if known and _is_as_keras_made_it(loss, _ROW_WISE_FUNCTIONS):
        return Decision(reduction)
    return Decision(reduction, f"{name} is not known to look at one row at a time", proven=False)


def _is_as_keras_made_it(thing: Any, functions: tuple[str, ...] = ()) -> bool:
    """Whether nobody has put code of their own into a loss or metric of Keras."""
    held = vars(thing)
    function = held.get("fn")
    own = function is not None and function not in _known(functions)
    return not own and not {"__call__", "call", "result", "update_state"} & held.keys()


def _known(names: tuple[str, ...]) -> list[Any]:
    """Those of the names that this version of Keras has."""
    return [getattr(keras.losses, name) for name in names if hasattr(keras.losses, name)]
