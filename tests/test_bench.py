"""The arithmetic and the results of `bench` and of benchmarks/; nothing here depends on a time."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import parallel_keras as pk
from benchmarks import gpus, judge, tables
from benchmarks.names import ABOUT, ALONE, MERGE, NOTHING, PHASES, SIDE_BY_SIDE, UPDATE
from parallel_keras.commands import bench, speeds
from parallel_keras.measuring import models, rounds, subject
from parallel_keras.measuring.clock import Spread, StepClock, ratios
from parallel_keras.measuring.random_batch import random_batch
from parallel_keras.measuring.runner import Contender, forever, serve
from tests import made_up


class Ticking:
    """A clock that says what it is told."""

    def __init__(self, *times: float) -> None:
        self.times = list(times)

    def __call__(self) -> float:
        return self.times.pop(0)


class Pretended:
    """A worker that answers from a list of step times."""

    def __init__(self, step: float, slow_round: int = -1) -> None:
        self.step, self.slow_round, self.asked = step, slow_round, []
        self.start = {"first": 10 * step, "build": step}

    def ask(self, command: str, steps: int = 0) -> dict[str, Any]:
        self.asked.append((command, steps))
        if command == "memory":
            return {"peak": 3 * 2**20, "baseline": 2**20}
        slow = 5 if len(self.asked) == self.slow_round else 1
        return {"seconds": [slow * self.step] * steps, "cpu": 2 * self.step}


def test_a_step_lasts_from_end_to_end() -> None:
    clock = StepClock(now=Ticking(10.0, 10.5, 12.0))
    for step in range(3):
        clock.on_train_batch_end(step, {"loss": 0.0})
    assert clock.seconds() == [0.5, 1.5]


def test_the_first_step_does_not_count() -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    contender = Contender(model, np.ones((4, 3), "float32"), np.ones((4, 1), "float32"))
    assert len(contender.train(5)) == 5
    assert model.optimizer.iterations == 6
    assert len(contender.predict(3)) == 3


def test_the_batch_is_the_same_each_time_and_is_not_autotuned() -> None:
    data = forever((np.arange(3), np.ones(3)))
    assert not data.options().autotune.enabled
    for x, _ in data.take(2):
        np.testing.assert_array_equal(x, [0, 1, 2])


def test_spread_of_one_number() -> None:
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_a_ratio_is_taken_within_a_round() -> None:
    """A round in which the machine was slow changes no ratio; medians of each alone would."""
    assert ratios([1.0, 8.0, 8.0], [0.5, 0.5, 4.0]).median == 2.0


def test_workers_take_turns() -> None:
    fast, slow = Pretended(0.01), Pretended(0.1)
    results = rounds.take_turns({"fast": fast, "slow": slow}, "train", rounds=3, seconds=1.0)
    assert fast.asked == [("train", 3)] + [("train", 100)] * 3
    assert slow.asked == [("train", 3)] + [("train", 10)] * 3
    assert results["slow"] == {"seconds": [0.1] * 3, "cpu": [0.2] * 3}


def lines() -> list[speeds.Line]:
    base = subject.Subject("net", 1, False, 32, 128)
    specs = {"model": base, "2": subject.Subject("net", 2, True, 32, 128)}
    workers = {"model": Pretended(0.1), "2": Pretended(0.05, slow_round=3)}
    return speeds.measure(workers, specs, turns=3, seconds=1.0)


def test_lines_hold_what_the_table_needs() -> None:
    base, two = lines()
    assert (base.wrapped, two.wrapped, two.devices) == (False, True, 2)
    assert base.train_speed_up == Spread(1.0, 1.0, 1.0)
    # One of the three rounds was five times slower, which the median leaves out.
    assert two.train_speed_up.median == 2.0
    assert two.train_speed_up.low == pytest.approx(1.2)
    assert (two.first_step, two.memory) == (0.5, 2 * 2**20)


def test_the_table_tells_the_limit() -> None:
    heads, base, two = speeds.table(lines(), batch_size=32, limit=1).splitlines()
    assert heads.split()[:2] == ["ms", "a"]
    assert base.split()[:4] == ["without", "wrapper", "100", "320"]
    assert two.split()[2:6] == ["50.0", "640", "2.00", "(1.20-2.00)"]
    assert two.split()[6] == "1"
    assert speeds.table(lines(), 32, limit=None).splitlines()[2].split()[6] == "2"


def test_the_json_holds_what_the_table_needs() -> None:
    report = json.loads(json.dumps(speeds.report(lines(), {"batch_size": 32})))
    read = [
        speeds.Line(**{k: Spread(**v) if isinstance(v, dict) else v for k, v in line.items()})
        for line in report["lines"]
    ]
    assert speeds.table(read, 32, None) == speeds.table(lines(), 32, None)
    assert {"settings", "versions", "machine"} < set(report)


def test_a_worker_answers_line_by_line() -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x, y = np.ones((4, 3), "float32"), np.ones((4, 1), "float32")
    out = io.StringIO()
    extra = {"rows": lambda contender, steps: {"rows": len(contender.x) * steps}}
    asked = ["train 2\n", "predict 3\n", "memory\n", "rows 2\n"]
    serve(lambda: Contender(model, x, y), extra, asked, out)
    start, train, predict, memory, rows = map(json.loads, out.getvalue().splitlines())
    assert set(start) == {"build", "first"}
    assert (len(train["seconds"]), len(predict["seconds"])) == (2, 3)
    assert memory["peak"] >= memory["baseline"] > 2**20
    assert rows == {"rows": 8}


@pytest.mark.parametrize(
    ("loss", "targets"), [("sparse_categorical_crossentropy", (5, 7)), ("mse", (5, 7, 3))]
)
def test_a_random_batch_fits_the_model(loss: str, targets: tuple[int, ...]) -> None:
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(2, 4),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile("sgd", loss)
    x, y = random_batch(model, rows=5, open_size=7)
    assert x.shape == (5, 7)
    assert set(np.unique(x)) <= {0, 1}
    assert y.shape == targets
    assert np.isfinite(model.train_on_batch(x, y))


@keras.saving.register_keras_serializable("tests")
class OneLayer(keras.Model):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layer = keras.layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.layer(x)


def test_a_model_without_shapes(tmp_path: Path) -> None:
    model = OneLayer()
    model(np.ones((2, 3)))
    model.save(tmp_path / "net.keras")
    with pytest.raises(ValueError, match=r"shape of its inputs.*of type OneLayer"):
        models.load(str(tmp_path / "net.keras"))


def listed() -> keras.Model:
    inputs = [keras.Input((3,)), keras.Input((2,), dtype="int32")]
    sums = keras.layers.Dense(4)(inputs[0]) + keras.layers.Embedding(5, 4)(inputs[1])[:, 0]
    return keras.Model(inputs, [keras.layers.Dense(2)(sums), keras.layers.Dense(1)(sums)])


def named() -> keras.Model:
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((2,), name="b")}
    joined = keras.layers.Concatenate()([inputs["a"], inputs["b"]])
    return keras.Model(inputs, {"c": keras.layers.Dense(2, name="c")(joined)})


def nested() -> keras.Model:
    first, second = keras.Input((3,)), keras.Input((3,))
    return keras.Model({"pair": [first, second]}, [keras.layers.Dense(2)(first + second)])


def strings() -> keras.Model:
    inputs = keras.Input((1,), dtype="string")
    lookup = keras.layers.StringLookup(vocabulary=["a", "b"], output_mode="one_hot")
    return keras.Model(inputs, keras.layers.Dense(2)(lookup(inputs)))


@pytest.mark.parametrize("make", [listed, named, nested, strings])
def test_inputs_of_any_nest_can_be_measured(make: Any) -> None:
    """tf.data takes a list of inputs for one tensor to be stacked; `explain` was right."""
    model = make()
    subject.compile_with(model, None)
    contender = Contender(model, *random_batch(model, rows=5))
    assert len(contender.train(2)) == 2
    assert len(contender.predict(2)) == 2
    parallel = pk.DataParallelModel(model, 2)
    parallel.compile("sgd", "mse")
    assert len(Contender(parallel, *random_batch(model, rows=5)).train(2)) == 2


def test_a_model_keeps_its_own_optimizer_and_loss() -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    subject.compile_with(model, None)
    assert (model.loss, type(model.optimizer)) == ("mean_squared_error", keras.optimizers.Adam)
    model.compile("sgd", "mae")
    optimizer = model.optimizer
    subject.compile_with(model, None)
    assert (model.loss, model.optimizer) == ("mae", optimizer)
    subject.compile_with(model, "huber")
    assert model.loss == "huber"


def test_a_name_that_is_no_model() -> None:
    with pytest.raises(ValueError, match=r"Received: model='nothing'.*Xception"):
        models.check_name("nothing")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "parallel_keras", "bench", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_command_end_to_end(tmp_path: Path) -> None:
    """P1: https://github.com/tensorflow/tensorflow/issues/35687."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    file = tmp_path / "net.keras"
    model.save(file)
    given = (str(file), "--devices=2,1", "--batch-size=5", "--rounds=1", "--seconds=0.01")
    done = run(*given)
    assert done.returncode == 0, done.stderr
    assert "without wrapper" in done.stdout
    assert "2 device(s)" in done.stdout
    done = run(f"--model={file}", *given[1:], "--json")
    assert [line["devices"] for line in json.loads(done.stdout)["lines"]] == [1, 2, 1]


@pytest.mark.parametrize(
    ("values", "counts"),
    [(None, [1, 2]), (["2"], [1, 2]), (["6"], [1, 2, 4, 6]), (["1"], [1]), (["3", "1"], [3, 1])],
)
def test_numbers_of_devices(values: list[str] | None, counts: list[int]) -> None:
    """One number means here what it means to the other commands: how many to use."""
    assert bench._counts(values, gpus=0) == counts


def test_no_more_devices_than_there_are() -> None:
    assert bench._counts(None, gpus=3) == [1, 2, 3]
    with pytest.raises(bench.CommandError, match=r"at most 3\. Received: --devices=4"):
        bench._counts(["4"], gpus=3)


@pytest.mark.parametrize(
    ("values", "match"),
    [(["1", "x"], "--devices=1,x"), (["0"], "--devices=0"), (["2", "2"], "--devices=2,2")],
)
def test_numbers_of_devices_that_make_no_sense(values: list[str], match: str) -> None:
    with pytest.raises(bench.CommandError, match=match):
        bench._counts(values, gpus=0)


def test_a_runner_that_ends_tells_why() -> None:
    with (
        pytest.raises(rounds.RunnerFailed, match="No module named"),
        rounds.runners("no_such_module", {"one": {}}),
    ):
        pass


def series(**seconds: list[float]) -> dict[str, Any]:
    return {name.replace("_", "-"): {"seconds": s, "cpu": s} for name, s in seconds.items()}


@pytest.fixture
def results() -> dict[str, Any]:
    """What a full run would give, made up."""
    train = series(
        bare_1=[1.0, 1.0, 1.0],
        half_1=[0.5, 0.53, 0.6],
        ours_1=[1.0] * 3,
        ours_2=[0.5, 0.54, 0.55],
        spread_2=[0.5, 0.54, 0.55],
        ours_4=[0.5] * 3,
        mirrored_2=[0.8, 0.9, 1.0],
    )
    shares = {SIDE_BY_SIDE: 0.8, ALONE: 0.05, UPDATE: 0.1, MERGE: 0.03, NOTHING: 0.02}
    speed = {
        "train": train,
        "predict": series(bare_1=[0.2], ours_2=[0.11]),
        "phases": {"bare-1": shares, "ours-2": shares},
    }
    sizes = {"tokens": 64, "words": 8192, "weights": 10, "batch": 1, "outputs": 100}
    bytes_ = [
        {**sizes, "crossing": 30},
        {**sizes, "tokens": 16, "outputs": 25, "crossing": 29},
        {**sizes, "words": 10, "crossing": 12},
    ]
    start = {"build": [1.0], "first": [10.0], "memory": [100.0]}
    return {
        "speed": dict.fromkeys(ABOUT, speed),
        "overhead": {"bare": [1.0, 1.0], "ours": [1.02, 1.04]},
        "graph": {
            "towers": 2,
            "bytes": {"auto": bytes_, "merged": bytes_},
            "traces": {"step": 2, "template": 2},
            "spread": {"messages": 121, "state": [1, 1, 1, 1, 1, 1, 1, 1.2]},
        },
        "start": {
            "bare-1": start,
            "ours-8": {**start, "first": [16.0], "memory": [39.0]},
            "mirrored-8": start,
        },
        "steady": {
            peer: {"epochs": [100] * 50, "wraps": [100] * 20 + [103] * 30}
            for peer in ("ours", "bare")
        },
        "machine": {
            "cores": 2,
            "processor": "x",
            "system": "x",
            "python": "x",
            "tensorflow": "x",
            "keras": "x",
            "parallel_keras": "x",
        },
        "sections": {"core": {"command": "x", "date": "x", "minutes": 1, "load": [0, 0]}},
        "links": {"runs": made_up.runs()},
        "frameworks": made_up.frameworks(),
    }


def test_the_bars(results: dict[str, Any]) -> None:
    found = {row.measure: row for row in judge.rows(results)}
    verdict = {measure.split(":")[0]: row.verdict for measure, row in found.items()}
    assert found["Training, 2 towers over the bare model on one core: CNN 32x32, batch 128"].figure
    assert verdict["Training, 2 towers over the bare model on one core"] == "-"  # the last of them
    cnn = judge.speed_up(results, "cnn", "train", 2)
    assert cnn is not None
    assert cnn.median == pytest.approx(1 / 0.54)
    limit = "Training, the bare model on half the rows, a limit of 2 towers"
    assert found[f"{limit}: CNN 32x32, batch 128"].figure == "1.89 (1.78-1.94)"
    assert verdict[limit] == "-"
    predicting = limit.replace("Training", "Predicting")
    assert found[f"{predicting}: CNN 32x32, batch 128"].figure == "not measured"
    half = "2 towers beside the bare model on half the rows"
    assert (verdict[f"Training, {half}"], verdict[f"Predicting, {half}"]) == ("pass", "-")
    assert verdict['Step on 2 devices, weights_on="spread" beside "unmoved"'] == "pass"
    behind_links = "Tensors into one device in a step of Xception on 8 devices behind links"
    assert (verdict[behind_links], found[behind_links].figure) == ("short", "121")
    state = next(row for measure, row in found.items() if measure.startswith("Optimizer state"))
    assert (state.verdict, state.figure) == ("pass", "1.17")
    words = next(row for m, row in found.items() if m.startswith("Predicting, 2") and "8k" in m)
    assert (words.verdict, words.bar) == ("pass", ">= 1.7")
    assert verdict["Of these, at least 1.5 times as fast"] == "pass"
    assert verdict["Step of the wrapper on one device beside the bare model"] == "pass"
    assert verdict["Time to the first training step of Xception, 8 towers beside 1"] == "short"
    assert verdict["Peak memory of Xception, 8 towers beside MirroredStrategy"] == "pass"
    large = "Bytes over the merge device, from the traced graph, for each further byte of outputs"
    assert (verdict[large], found[large].figure) == ("pass", "0.013")
    assert verdict["Memory after more epochs of fit, evaluate and predict"] == "pass"
    assert verdict["Memory after more cycles of wrapping and training"] == "short"


def test_bytes_that_follow_the_outputs_fall_short(results: dict[str, Any]) -> None:
    results["graph"]["bytes"]["auto"][0]["crossing"] = 40
    large = next(row for row in judge.rows(results) if row.measure.startswith("Bytes"))
    assert large.verdict == "short"


def test_what_was_not_measured_has_no_verdict() -> None:
    rows = judge.rows({"speed": {}})
    assert {row.verdict for row in rows} == {"-"}


def test_documents_are_filled_again_and_again(results: dict[str, Any]) -> None:
    names = [*tables.SECTIONS, *(f"plot-{name}" for name in tables.PLOTS)]
    document = "".join(
        f"before\n<!-- bench:{name} -->\nold\n<!-- /bench -->\nafter\n" for name in names
    )
    once = tables.fill(document, results, "here")
    assert "old" not in once
    assert "](here/memory.svg)" in once
    assert once.count("before\n") == once.count("after\n") == len(names)
    assert tables.fill(once, results, "here") == once


def test_the_documents_name_parts_that_exist() -> None:
    root = Path(__file__).parent.parent
    for name in tables.DOCUMENTS:
        text = (root / name).read_text()
        names = [piece.partition(" -->")[0] for piece in text.split("<!-- bench:")[1:]]
        assert names
        assert set(names) <= {*tables.SECTIONS, *(f"plot-{plot}" for plot in tables.PLOTS)}
        assert text.count("<!-- /bench -->") == len(names)


def test_plots_are_drawn(results: dict[str, Any], tmp_path: Path) -> None:
    plots = pytest.importorskip("benchmarks.plots", reason="matplotlib draws")
    written = plots.draw(results, tmp_path)
    assert {path.stem for path in written} == set(tables.PLOTS)
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in plots.draw(results, tmp_path)] == before


def test_phases_of_a_trace() -> None:
    phases = pytest.importorskip("benchmarks.phases", reason="the profiler's format may move")
    events = [
        (0.0, 2.0, "tower"),
        (1.0, 4.0, "tower"),
        (4.0, 5.0, "merge"),
        (6.0, 8.0, "update"),
    ]
    spent = phases.sweep(events, towers=2)
    assert spent == {ALONE: 3.0, SIDE_BY_SIDE: 1.0, MERGE: 1.0, NOTHING: 1.0, UPDATE: 2.0}
    assert set(spent) == set(PHASES)


def machine(**wanted: Any) -> gpus.Machine:
    """The first machine of the cost model with these attributes."""
    return next(
        machine
        for machine in gpus.MACHINES
        if all(getattr(machine, name) == value for name, value in wanted.items())
    )


def test_the_cost_model_by_hand() -> None:
    """25 GB of weights, which take a second over PCIe; messages then count for nothing."""
    network = gpus.Network("", 25e9 / 4, large=0, flops=gpus.FLOPS, batch=1)
    memory = 25 / 1400
    on_cpu, on_gpu = machine(weights="cpu"), machine(weights="gpu")
    spread, overlap = machine(weights="spread"), machine(weights="spread", overlap=True)
    ring = machine(weights="ring")
    found = {
        each.name: gpus.step_on(network, each, 2, 1) - 1
        for each in (on_cpu, on_gpu, spread, overlap, ring)
    }
    # To each GPU over its own link; there and back; added up and updated by the CPU.
    assert found[on_cpu.name] == pytest.approx(1 + 1 + (3 + 7) * 25 / 50, abs=1e-3)
    # To the other GPU and back, added up and updated there.
    assert found[on_gpu.name] == pytest.approx(1 + 1 + (3 + 7) * memory, abs=1e-3)
    # Half of it to the other GPU while the other half comes; likewise back.
    assert found[spread.name] == pytest.approx(0.5 + 0.5 + (3 + 7) * memory / 2, abs=1e-3)
    # Gradients hide behind two thirds of the second that the towers compute.
    assert found[overlap.name] == pytest.approx(0.5 + (3 + 7) * memory / 2, abs=1e-3)
    # All gradients once around, hidden likewise, and every GPU updates all weights.
    assert found[ring.name] == pytest.approx(1 - 2 / 3 + 7 * memory, abs=1e-3)


def test_one_gpu_is_the_bare_model() -> None:
    for network in gpus.NETWORKS:
        for each in gpus.MACHINES:
            if each.weights != "cpu":
                assert gpus.speed_up(network, each, 1, 1) == 1.0


def test_messages_take_time() -> None:
    few, many = (gpus.Network("", 1e6, large, 1e9, 1) for large in (10, 1000))
    each = machine(weights="spread")
    apart = gpus.step_on(many, each, 4, 1) - gpus.step_on(few, each, 4, 1)
    # Out and back, three quarters of the tensors for each device.
    assert apart == pytest.approx(2 * 0.75 * 990 * gpus.MESSAGE)


def test_the_cost_model_gains_with_the_batch_and_never_more_than_devices() -> None:
    for network in gpus.NETWORKS:
        for each in gpus.MACHINES:
            gains = [gpus.speed_up(network, each, 8, rows) for rows in (1, 16, 256, 4096)]
            assert gains == sorted(gains)
            assert gains[-1] <= 8
