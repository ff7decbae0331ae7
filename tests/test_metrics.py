"""Metrics of the whole batch, whatever the towers saw."""

from typing import Any

import keras
import pytest

from tests.parity import (
    assert_same_fit,
    pair,
    rng,
    row_wise,
    rows,
)

SGD = {"optimizer": lambda: keras.optimizers.SGD(0.05, momentum=0.9)}


class BatchSpread(keras.metrics.Metric):
    """A metric that sees the batch: the mean over steps of the standard deviation."""

    def __init__(self) -> None:
        super().__init__(name="spread")
        self.spread = self.add_weight(name="spread", initializer="zeros")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.spread.assign_add(keras.ops.std(y_pred))

    def result(self) -> Any:
        return self.spread


def binary() -> keras.Model:
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(2, activation="sigmoid")])


@pytest.mark.sweep(1)
@pytest.mark.parametrize("seen_by_batch", [True, False])
def test_metrics(seen_by_batch: bool) -> None:
    """N2, N6: https://github.com/tensorflow/tensorflow/issues/48152."""

    def metrics() -> list[Any]:
        known = [
            keras.metrics.AUC(name="auc"),
            keras.metrics.F1Score(threshold=0.5, name="f1"),
            keras.metrics.FalseNegatives(name="fn"),
            keras.metrics.TruePositives(name="tp"),
            keras.metrics.Precision(name="p"),
            keras.metrics.PrecisionAtRecall(0.5, name="par"),
            keras.metrics.OneHotMeanIoU(num_classes=2, name="iou"),
            "accuracy",
            "mae",
        ]
        others = [
            BatchSpread(),
            keras.metrics.R2Score(name="r2"),
            keras.metrics.CosineSimilarity(name="cos"),
            row_wise,
        ]
        return known + (others if seen_by_batch else [])

    x, y = rows(10, 6), keras.utils.to_categorical(rng(1).integers(0, 2, 10), 2)
    for loss_on in ("auto", "merged"):
        bare, parallel = pair(
            binary, 4, loss_on=loss_on, loss="binary_crossentropy", **SGD,
            metrics=_maker(metrics), weighted_metrics=_maker(lambda: [keras.metrics.AUC(name="w")]),
        )  # fmt: skip
        assert_same_fit(
            bare, parallel, x, y, batch_size=7, epochs=2, validation_data=(x, y),
            sample_weight=rng(3).random(10).astype("float32"),
        )  # fmt: skip


def _maker(make: Any) -> Any:
    return lambda: make()
