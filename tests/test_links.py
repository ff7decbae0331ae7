"""The laboratory of links and the race of frameworks: what is pure, and two devices for real."""

import copy
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.frameworks import race
from benchmarks.frameworks import report as frameworks
from benchmarks.links import laboratory, namespaces, predicted, report
from benchmarks.row import Row
from tests import made_up


@pytest.fixture
def results() -> dict[str, Any]:
    return {"links": {"runs": made_up.runs()}, "frameworks": made_up.frameworks()}


def row(results: dict[str, Any], start: str) -> Row:
    return next(
        row
        for row in [*report.rows(results), *frameworks.rows(results)]
        if row.measure.startswith(start)
    )


def slower(results: dict[str, Any], times: float, **wanted: Any) -> dict[str, Any]:
    """The results, had the steps of these runs taken longer."""
    changed = copy.deepcopy(results)
    for run in changed["links"]["runs"]:
        if all(run[name] == value for name, value in wanted.items()):
            run["seconds"] = [times * value for value in run["seconds"]]
    return changed


def test_the_calibration_finds_what_the_runs_were_made_with() -> None:
    found = predicted.Calibration.of(made_up.runs())
    assert found is not None
    assert found.compute == pytest.approx(dict.fromkeys(laboratory.COUNTS, made_up.COMPUTE))
    assert found.latency == pytest.approx(made_up.LATENCY)
    assert found.together == pytest.approx(made_up.TOGETHER)


def test_a_world_that_is_as_the_model_has_it(results: dict[str, Any]) -> None:
    pairs = predicted.checked(results)
    assert len(pairs) == len(laboratory.TIMES)
    assert predicted.worst(results) == pytest.approx(0.0)
    assert report.trusted(results)
    assert "| ResNet50" in tables.SECTIONS["cost-model-devices"](results)


@pytest.mark.parametrize(("times", "trusted"), [(1.2, True), (1.3, False), (0.8, False)])
def test_the_model_says_nothing_of_gpus_where_it_was_wrong(
    results: dict[str, Any], times: float, trusted: bool
) -> None:
    """One run of all is enough; too slow by 30 % is off by 23 %, too fast by 20 % by 25 %."""
    changed = slower(results, times, contender="ring", devices=8, mbit=laboratory.MBIT)
    assert report.trusted(changed) is trusted
    said = tables.SECTIONS["cost-model-devices"](changed)
    assert said.startswith("| model" if trusted else "The model is not within 20%")
    assert row(changed, "Largest error").verdict == ("pass" if trusted else "short")


def test_nothing_is_said_of_gpus_without_a_laboratory() -> None:
    assert not report.trusted({})
    assert predicted.worst({"links": {"runs": made_up.runs()[:1]}}) is None


def test_the_optimum_and_the_limit() -> None:
    run = {"devices": 4, "weights": 1_000_000, "mbit": 8.0}
    assert laboratory.optimum(run) == 1_500_000
    assert predicted.limit(run) == pytest.approx(1.5 / predicted.PAYLOAD)


def test_the_busiest_link_counts_its_busier_direction() -> None:
    run = {"traffic": [[10.0, 70.0], [60.0, 20.0], [30.0, 30.0]]}
    assert laboratory.busiest(run) == 70.0
    assert laboratory.total(run) == 100.0


def test_rows_of_the_links(results: dict[str, Any]) -> None:
    assert row(results, "Step on 4 devices").verdict == "pass"
    much = slower(results, 3.0, contender="spread", devices=4, mbit=laboratory.MBIT)
    assert row(much, "Step on 4 devices").verdict == "short"
    assert row(much, "Step on 8 devices").verdict == "pass"
    bytes_ = row(results, "Bytes on the busiest link beside 2(N-1)/N of the weights: Xception")
    assert (bytes_.figure, bytes_.verdict) == ("1.00, 1.00, 1.00 (N = 2, 4, 8)", "pass")


@pytest.mark.parametrize(
    ("times", "optimum", "ring"), [(1.25, "pass", "short"), (1.4, "short", "short")]
)
def test_one_number_of_devices_that_sends_too_much_is_enough(
    results: dict[str, Any], times: float, optimum: str, ring: str
) -> None:
    for run in results["links"]["runs"]:
        if (run["contender"], run["model"], run["devices"]) == ("spread", "transformer", 8):
            run["traffic"][3][0] *= times
    model = report.MODELS["transformer"]
    assert (
        row(results, f"Bytes on the busiest link beside 2(N-1)/N of the weights: {model}").verdict
        == optimum
    )
    assert (
        row(
            results, f"Bytes on the busiest link beside MultiWorkerMirroredStrategy: {model}"
        ).verdict
        == ring
    )
    other = report.MODELS["xception"]
    assert (
        row(
            results, f"Bytes on the busiest link beside MultiWorkerMirroredStrategy: {other}"
        ).verdict
        == "pass"
    )


def test_tables_of_the_links(results: dict[str, Any]) -> None:
    heads, lines = report.times(results)
    assert all(len(line) == len(heads) for line in lines)
    assert {line[-1] for line in lines} == {"+0%"}
    heads, lines = report.sizes(results)
    assert len(list(lines)) == len(report.MODELS) * len(laboratory.COUNTS)
    mlp = next(line for line in lines if line[:2] == (report.MODELS["mlp"], 4))
    # All weights to each device, from one place: 64 of 24 MB twice, as gradients come back.
    assert mlp[2:5] == ("24.0 MB", "128.0 MB (5.33)", "24.0 MB (1.00)")


def test_what_was_not_measured_has_no_verdict() -> None:
    rows = [*report.rows({}), *frameworks.rows({})]
    assert {row.verdict for row in rows} == {"-"}
    assert {row.figure for row in rows} == {"not measured"}
    assert (
        list(report.times({})[1])
        == list(report.sizes({})[1])
        == list(frameworks.table({})[1])
        == []
    )


def test_ours_must_be_faster_than_both(results: dict[str, Any]) -> None:
    start = "Step on 2 devices, Keras on JAX or PyTorch beside parallel_keras: CNN"
    assert (row(results, start).figure, row(results, start).verdict) == ("1.20, 1.20", "pass")
    results["frameworks"]["cnn"]["jax-2"]["seconds"] = [0.4] * 3
    assert (row(results, start).figure, row(results, start).verdict) == ("0.80, 1.20", "short")


def test_a_framework_that_is_not_installed_is_left_out(results: dict[str, Any]) -> None:
    for measured in results["frameworks"].values():
        for name in ("torch", "torch-2"):
            del measured[name]
    heads, lines = frameworks.table(results)
    lines = list(lines)
    assert len(lines) == 3 * len(race.WORKLOADS)
    assert all(len(line) == len(heads) for line in lines)
    assert lines[0][2:5] == ("1000", "500", "2.00 (2.00-2.00)")
    assert {row.figure for row in frameworks.rows(results)} == {"not measured"}


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(race, "ROOT", tmp_path)
    assert race.missing() == ["jax", "torch"]
    assert list(race.pythons()) == ["tensorflow"]


def test_without_iproute2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(namespaces.NoLaboratory, match="Not found: ip, tc"):
        namespaces.check()


def test_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces.shutil, "which", lambda program: f"/sbin/{program}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(namespaces.NoLaboratory, match="Received: user id 1000"):
        namespaces.check()


def test_where_the_kernel_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*command: str, given: str | None = None) -> None:
        raise subprocess.CalledProcessError(2, command, stderr="RTNETLINK answers: No.")

    monkeypatch.setattr(namespaces.shutil, "which", lambda program: f"/sbin/{program}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(namespaces, "_run", run)
    with pytest.raises(namespaces.NoLaboratory, match="RTNETLINK answers: No"):
        namespaces.check()


def test_leftovers_are_those_of_processes_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = 2**22 + 1  # more than any process can have
    assert namespaces.maker(f"pkl{gone}v3") == gone
    assert namespaces._orphan(f"pkl{gone}b")
    assert not namespaces._orphan(f"pkl{os.getpid()}n12")


@pytest.fixture
def laboratory_or_skip() -> None:
    try:
        namespaces.check()
    except namespaces.NoLaboratory as reason:
        pytest.skip(str(reason))


@pytest.mark.usefixtures("laboratory_or_skip")
def test_two_devices_behind_links() -> None:
    """Bytes are counted, not times: a ring of two sends the weights once, each way."""
    run = laboratory.measure_one(laboratory.Run("ring", "mlp", 2, None, 2))
    assert len(run["seconds"]) == 2
    assert run["weights"] == 16 * (512 * 512 + 512) * 4
    assert len(run["traffic"]) == 2
    for sent, received in run["traffic"]:
        assert 1 <= sent / laboratory.optimum(run) < 1.1
        assert 1 <= received / laboratory.optimum(run) < 1.1
    assert not list(Path("/sys/class/net").glob(f"pkl{os.getpid()}*"))


@pytest.mark.usefixtures("laboratory_or_skip")
def test_a_process_that_fails_tells_why() -> None:
    from benchmarks.links.processes import ProcessFailed

    with pytest.raises(ProcessFailed, match="KeyError: 'nothing'"):
        laboratory.measure_one(laboratory.Run("local", "nothing", 2, None, 2))
