"""KerasHub's tasks on raw data, bare and on three devices.

A task with a preprocessor has `fit`, `evaluate` and `predict` of its own, which take raw strings
or bytes of images. All configurations are tiny, all weights random; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf

import parallel_keras as pk
from tests.programs.program import Program, adam, assert_same, classes, rng, run

TOWERS = 3
SENTENCES = [
    "the quick brown fox",
    "the fox",
    "a quick the the fox jumped",
    "the fox jumped a brown",
    "quick",
    "a fox jumped",
    "brown the quick",
]
LETTERS = "abdefghijklmnopqrstuvwxz"


def bert() -> keras.Model:
    words = ["the", "quick", "brown", "fox", "a", "jumped"]
    tokenizer = keras_hub.models.BertTokenizer(
        vocabulary=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    )
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=8,
        dropout=0.0,
    )
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=8)
    return keras_hub.models.BertTextClassifier(
        backbone, num_classes=3, preprocessor=preprocessor, dropout=0.0
    )


def text_classifier() -> Program:
    model = bert()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=adam(), loss=loss, metrics=["accuracy"])
    return Program(model, SENTENCES, classes(len(SENTENCES), 3))


def text_classifier_on_a_dataset() -> Program:
    program = text_classifier()
    dataset = tf.data.Dataset.from_tensor_slices((program.x, program.y)).batch(5)
    return Program(program.model, dataset, batch_size=None)


def gpt2(sampler: str = "greedy") -> keras.Model:
    letters = [*LETTERS, *(f"\u0120{letter}" for letter in LETTERS), "\u0120"]
    tokenizer = keras_hub.models.GPT2Tokenizer(
        vocabulary={
            letter: index
            for index, letter in enumerate(["<|endoftext|>", *dict.fromkeys(letters), "c", "y"])
        },
        merges=[f"\u0120 {letter}" for letter in LETTERS],
    )
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=10,
        dropout=0.0,
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=10)
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=preprocessor)
    model.compile(
        optimizer=adam(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
        sampler=sampler,
    )
    return model


def causal_language_model() -> Program:
    dataset = tf.data.Dataset.from_tensor_slices(SENTENCES).batch(5)
    return Program(gpt2(), dataset, batch_size=None, skip=("predict",))


def image_classifier() -> Program:
    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64],
        stackwise_num_blocks=[1],
        stackwise_num_strides=[1],
        block_type="basic_block",
        image_shape=(16, 16, 3),
    )
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = True  # by shard it is another number, as documented
    converter = keras_hub.layers.ResNetImageConverter(image_size=(16, 16), scale=1 / 255.0)
    model = keras_hub.models.ImageClassifier(
        backbone,
        num_classes=3,
        preprocessor=keras_hub.models.ResNetImageClassifierPreprocessor(converter),
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=adam(), loss=loss, metrics=["accuracy"])
    pictures = rng().integers(0, 256, (7, 20, 20, 3)).astype("uint8")
    return Program(model, pictures, classes(7, 3), rtol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        text_classifier,
        text_classifier_on_a_dataset,
        causal_language_model,
        image_classifier,
    ],
)
def test_same_as_on_one_device(make: Callable[[], Program]) -> None:
    """X3: the task's own `fit`, `evaluate` and `predict`, on strings and on bytes of images."""
    assert_same(run(make), run(make, TOWERS))


def test_generate() -> None:
    """A method of the task, with strings in and out, before and after training."""
    keras.utils.set_random_seed(7)
    bare = gpt2()
    keras.utils.set_random_seed(7)
    parallel = pk.DataParallelModel(gpt2(), TOWERS)
    for _ in range(2):
        expected = bare.generate(SENTENCES[:4], max_length=8)
        assert parallel.generate(SENTENCES[:4], max_length=8) == expected
        assert parallel.generate("the fox", max_length=8) == bare.generate("the fox", max_length=8)
        for model in (bare, parallel):
            model.fit(SENTENCES, batch_size=5, shuffle=False, verbose=0)


def test_without_a_preprocessor() -> None:
    """What the preprocessor makes is what the wrapper takes where the task has none."""
    keras.utils.set_random_seed(7)
    bare = bert()
    keras.utils.set_random_seed(7)
    template = bert()
    prepared = template.preprocessor(SENTENCES)
    template.preprocessor = None
    parallel = pk.DataParallelModel(template, TOWERS)
    np.testing.assert_allclose(
        parallel.predict(prepared, batch_size=5, verbose=0),
        bare.predict(SENTENCES, batch_size=5, verbose=0),
        rtol=1e-5,
        atol=2e-6,
    )
