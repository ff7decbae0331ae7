"""What `test_ray.py` runs: Ray Train starts two workers, and each writes what it trained.

Arguments: the folder to write to.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

SIZES = {"rows": 21, "batch_size": 8}  # the last batch has 5 rows, for two workers


def fit(wrap: Any) -> dict[str, Any]:
    """Trains what `wrap` makes of a model; the same function is the one device to compare with."""
    keras.utils.set_random_seed(5)
    template = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(7, activation="tanh"), keras.layers.Dense(3)]
    )
    model = wrap(template)
    model.compile(optimizer="adam", loss="mse", metrics=["mae"])
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(SIZES["rows"], n)).astype("float32") for n in (6, 3))
    arguments = {"batch_size": SIZES["batch_size"], "verbose": 0}
    history = model.fit(x, y, epochs=2, shuffle=False, **arguments).history
    weights = [weight.tolist() for weight in template.get_weights()]
    return {"history": history, "weights": weights, "scores": model.evaluate(x, y, **arguments)}


def train(config: dict[str, Any]) -> None:
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    import parallel_keras as pk

    found = fit(lambda template: pk.DataParallelModel(template, strategy=strategy))
    found["tf_config"] = json.loads(os.environ["TF_CONFIG"])
    path = Path(config["folder"]) / f"worker{found['tf_config']['task']['index']}.json"
    path.write_text(json.dumps(found))


def main() -> None:
    # Not at the top: it sets environment variables, and the test itself imports this file.
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.tensorflow import TensorflowTrainer

    folder = sys.argv[1]
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20)
    TensorflowTrainer(
        train,
        train_loop_config={"folder": folder},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=folder),
    ).fit()
    ray.shutdown()


if __name__ == "__main__":
    main()
