"""Several worker processes give the numbers of one device."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import started
from tests.worker_cases import CASES, Bare, Numbers

LONGEST = 280.0
RTOL = 1e-5
ATOL = 3e-6
# The second cluster has workers with different numbers of towers.
CLUSTERS = {"2 workers of 2 towers": (2, 2), "3 workers of 1, 2 and 1 tower": (1, 2, 1)}
ON_THREE = (
    "uneven_batches",
    "dict_inputs_and_normalization",
    "loss_of_the_whole_batch",
    "tutorial",
    "embedding",
    "own_rows",
    "shuffled_arrays",
)
MARKS = {name: [pytest.mark.rest] if len(CLUSTERS[name]) == 3 else [] for name in CLUSTERS}
WHAT_RUNS = [
    pytest.param(cluster, name, marks=MARKS[cluster])
    for cluster, towers in CLUSTERS.items()
    for name in CASES
    if len(towers) == 2 or name in ON_THREE
]
OWN = "rows of the worker "
OWN_SIZES = (11, 3, 5)


def run(folder: Path, cluster: str, cases: list[str]) -> list[Numbers]:
    towers = CLUSTERS[cluster]
    settings = {"folder": str(folder), "timeout": 60, "cases": cases}
    with started("tests.worker_cases", settings, len(towers), towers) as workers:
        for worker in workers:
            code = worker.wait(LONGEST)
            assert code == 0, worker.said[-4000:]
    return [dict(np.load(folder / f"worker_{index}.npz")) for index in range(len(towers))]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """What the workers of a cluster found; it runs once, with what was selected."""
    found: dict[str, list[Numbers]] = {}
    selected = [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == "test_equal_to_one_device"
    ]

    def get(cluster: str) -> list[Numbers]:
        if cluster not in found:
            cases = [each["name"] for each in selected if each["cluster"] == cluster]
            # Where only a test of what all cases have in common was selected, any will do.
            folder = tmp_path_factory.mktemp("workers")
            found[cluster] = run(folder, cluster, cases or list(ON_THREE))
        return found[cluster]

    return get


@pytest.mark.sweep(5)
@pytest.mark.timeout(LONGEST + 60)
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
@pytest.mark.parametrize(("cluster", "name"), WHAT_RUNS)
def test_equal_to_one_device(cluster: str, name: str, ran: Any, tmp_path: Path) -> None:
    """W1, W2, W5: https://github.com/keras-team/keras/issues/20585."""
    found = ran(cluster)
    expected = CASES[name](Bare(len(found), tmp_path))
    for index, worker in enumerate(found):
        for key, value in expected.items():
            start = sum(OWN_SIZES[:index])
            own = value[start : start + OWN_SIZES[index]] if key.startswith(OWN) else value
            np.testing.assert_allclose(
                worker[f"{name}/{key}"],
                own,
                rtol=RTOL,
                atol=ATOL * max(1.0, float(np.abs(value).max(initial=0))),
                err_msg=f"{key} of worker {index}",
            )


@pytest.mark.timeout(LONGEST + 60)
@pytest.mark.parametrize(
    "cluster", [pytest.param(name, marks=marks) for name, marks in MARKS.items()]
)
def test_workers_are_bit_equal(cluster: str, ran: Any) -> None:
    """History, weights, state and optimizer variables do not drift apart."""
    first, *others = ran(cluster)
    compared = [key for key in first if OWN not in key]
    assert len(compared) > 30
    for other in others:
        for key in compared:
            np.testing.assert_array_equal(other[key], first[key], err_msg=key)
