"""Whole programs in the style of Keras' own examples, bare and on three devices."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import keras
import numpy as np
import pytest

import parallel_keras as pk
from tests.parity import ATOL, RTOL, rows
from tests.programs import (
    generative,
    graph,
    recommendation,
    sound,
    structured,
    text,
    vision,
)
from tests.programs.program import BATCH, TOWERS, Make, assert_same, run

# Programs that are still another number or an error on several devices, under the fault that it is.
NOT_YET: dict[Make, str] = {}
# Programs that are refused on several devices, and what the error says.
REFUSED: dict[Make, str] = {
    generative.moving_codebook: "made of the rows in a way that parts of the batch cannot",
}
# Programs of more than some 8 seconds: they are long to trace, bare too.
SLOW: set[Make] = {
    text.translation,
    text.bidirectional_lstm,
    text.span_extraction,
    text.mixture_of_experts,
    text.recurrent_attention,
    vision.mobile_vit,
    vision.image_and_caption_pairs,
    vision.image_captioning,
    vision.object_detection,
    vision.super_resolution,
    generative.wasserstein_gan,
    generative.cycle_gan,
    generative.denoising_diffusion,
    generative.real_nvp,
    structured.tab_transformer,
    structured.inputs_and_outputs,
    structured.imbalanced_classes,
    structured.decision_forest,
    structured.next_frame,
    recommendation.behaviour_sequence,
    graph.point_net,
    graph.all_pairs_point_net,
    sound.speech_transformer,
    sound.speech_by_ctc,
}


def programs(family: ModuleType) -> list[object]:
    found = []
    for make in family.PROGRAMS:
        if make in REFUSED:
            continue
        marks = [pytest.mark.slow] if make in SLOW else []
        if make in NOT_YET:
            marks.append(pytest.mark.xfail(strict=True, reason=NOT_YET[make]))
        found.append(pytest.param(make, id=make.__name__, marks=marks))
    return found


@pytest.fixture
def check(caplog: pytest.LogCaptureFixture) -> Callable[[Make], None]:
    """The same numbers, and nothing in the log that accuses a layer of others."""

    def check(make: Make) -> None:
        assert_same(run(make), run(make, TOWERS))
        said = [record.getMessage() for record in caplog.records]
        assert not [text for text in said if "several rows at once" in text]

    return check


@pytest.mark.sweep(1)
@pytest.mark.parametrize("make", programs(text))
def test_text(make: Make, check: Callable[[Make], None]) -> None:
    check(make)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("make", programs(vision))
def test_vision(make: Make, check: Callable[[Make], None]) -> None:
    check(make)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("make", programs(generative))
def test_generative(make: Make, check: Callable[[Make], None]) -> None:
    check(make)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("make", programs(structured))
def test_structured(make: Make, check: Callable[[Make], None]) -> None:
    check(make)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("make", programs(recommendation))
def test_recommendation(make: Make, check: Callable[[Make], None]) -> None:
    check(make)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("make", programs(graph))
def test_graph(make: Make, check: Callable[[Make], None]) -> None:
    check(make)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("make", programs(sound))
def test_sound(make: Make, check: Callable[[Make], None]) -> None:
    check(make)


@pytest.mark.parametrize("make", [text.switch_transformer, recommendation.all_pairs_factorisation])
def test_a_layer_that_looks_at_several_rows_sees_those_of_its_tower(make: Make) -> None:
    """X13: an exception, as nothing can tell: such a layer computes for 2, 2 and 1 rows of 5."""

    def program():
        keras.utils.set_random_seed(7)
        return make()

    bare, wrapped = program(), program()
    parallel = pk.DataParallelModel(wrapped.model, TOWERS)
    cuts = [slice(0, 2), slice(2, 4), slice(4, 5)]

    def loss(model: keras.Model, rows: slice) -> float:
        return model.evaluate(bare.x[rows], bare.y[rows], verbose=0, return_dict=True)["loss"]

    by_tower = [loss(bare.model, cut) for cut in cuts]
    everything = slice(0, BATCH)
    expected = np.average(by_tower, weights=[2, 2, 1])
    np.testing.assert_allclose(loss(parallel, everything), expected, rtol=RTOL, atol=ATOL)
    assert abs(loss(bare.model, everything) - expected) > 1e-4


def test_a_graph_with_other_numbers_of_nodes_and_edges_is_refused() -> None:
    """X24: rows of nodes and rows of edges cannot be cut alike."""
    with pytest.raises(ValueError, match="rows"):
        run(graph.graph_attention, TOWERS)


@pytest.mark.parametrize("make", REFUSED)
def test_refused(make: Make) -> None:
    """X10: a codebook that is a quotient of moving sums, which parts of the batch cannot move."""
    with pytest.raises(ValueError, match=REFUSED[make]):
        run(make, TOWERS)


def test_a_graph_with_as_many_edges_as_nodes() -> None:
    """X24: in a ring they can be cut alike, but must not be: edges name nodes of other towers."""
    keras.utils.set_random_seed(7)
    ring = np.stack([np.arange(6), (np.arange(6) + 1) % 6], axis=1).astype("int32")
    model = graph.GraphAttentionNetwork(rows(6, 4), ring)
    expected = model([model.node_states, model.links]).numpy()
    parallel = pk.DataParallelModel(model, TOWERS, rules={"batch": "whole"})
    np.testing.assert_allclose(
        parallel([model.node_states, model.links]).numpy(), expected, rtol=RTOL, atol=ATOL
    )
