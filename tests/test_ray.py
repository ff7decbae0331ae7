"""Ray Train's TensorflowTrainer, with two workers on this machine: `make test-ray`.

Ray's own example of multi-worker training fails on Keras 3:
https://github.com/ray-project/ray/issues/47464.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# Any folder of that name is found, too, but has no file.
RAY = importlib.util.find_spec("ray")
pytestmark = pytest.mark.skipif(
    RAY is None or RAY.origin is None,
    reason="Ray is not installed: make test-ray sets up an environment that has it",
)


def test_two_workers_equal_one_device(tmp_path: Path) -> None:
    from tests import ray_client

    subprocess.run(
        [sys.executable, "-m", "tests.ray_client", str(tmp_path)],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        check=True,
        timeout=900,
    )
    expected = ray_client.fit(lambda template: template)
    for index in range(2):
        found = json.loads((tmp_path / f"worker{index}.json").read_text())
        assert len(found["tf_config"]["cluster"]["worker"]) == 2
        assert list(found["history"]) == list(expected["history"])
        for key, values in expected["history"].items():
            np.testing.assert_allclose(found["history"][key], values, rtol=1e-5, err_msg=key)
        np.testing.assert_allclose(found["scores"], expected["scores"], rtol=1e-5)
        for ours, theirs in zip(found["weights"], expected["weights"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)
