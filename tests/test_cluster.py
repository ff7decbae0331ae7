"""TF_CONFIG: what is read from it, and what is said of a wrong one (user problem W4)."""

import json
from typing import Any

import pytest
import tensorflow as tf

from parallel_keras.workers import cluster

TWO = ["10.0.0.1:2222", "10.0.0.2:2222"]


def config(jobs: Any, job: Any = "worker", index: Any = 0) -> str:
    return json.dumps({"cluster": jobs, "task": {"type": job, "index": index}})


@pytest.mark.parametrize("index", [0, 1])
def test_reads_what_it_writes(index: int) -> None:
    found = cluster.read(cluster.write(TWO, index))
    assert [task.address for task in found.tasks] == TWO
    assert (found.rank, found.own.address) == (index, TWO[index])
    assert [task.address for task in found.others] == [TWO[1 - index]]


def test_tensorflow_reads_what_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cluster.VARIABLE, cluster.write(TWO, 1))
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    assert resolver.cluster_spec().as_dict() == {"worker": TWO}
    assert (resolver.task_type, resolver.task_id) == ("worker", 1)


def test_the_chief_has_the_first_rank() -> None:
    """As in tf.distribute, and as Kubeflow's TFJob with a chief writes it."""
    jobs = {"worker": TWO, "chief": ["[::1]:2222"]}
    found = cluster.read(config(jobs, "worker", "1"))  # TensorFlow takes the index as a string too
    assert [str(task) for task in found.tasks] == [
        "chief 0 ([::1]:2222)",
        "worker 0 (10.0.0.1:2222)",
        "worker 1 (10.0.0.2:2222)",
    ]
    assert found.rank == 2
    assert (found.tasks[0].host, found.tasks[0].port) == ("::1", 2222)
    assert cluster.read(config(jobs, "chief")).rank == 0


@pytest.mark.parametrize("text", [None, ""])
def test_missing(text: str | None) -> None:
    with pytest.raises(ValueError, match=r"TF_CONFIG is not set.*Received: TF_CONFIG=.*Set it"):
        cluster.read(text)


WRONG: list[tuple[str, str]] = [
    ("{", r"JSON, but Expecting property name.*Received: TF_CONFIG={\. A valid one"),
    ("[]", "an object with the keys 'cluster' and 'task'"),
    ("{}", "the key 'cluster', an object with the addresses"),
    (config([]), "the key 'cluster', an object with the addresses"),
    (config({}), "the key 'cluster', an object with the addresses"),
    (config({"worker": TWO, "ps": ["h:1"]}), r"no other jobs than \['chief', 'worker'\].*\['ps'\]"),
    (config({"worker": []}), "at least one address as 'cluster' / 'worker'"),
    (config({"worker": "10.0.0.1:2222"}), "a list of at least one address"),
    (config({"chief": TWO}), "at most one chief"),
    (config({"worker": ["10.0.0.1:2222", "10.0.0.2"]}), "host:port as the address of worker 1"),
    (config({"worker": ["host:0"]}), "host:port as the address of worker 0"),
    (config({"worker": ["host:65536"]}), "host:port as the address of worker 0"),
    (config({"worker": [":2222"]}), "host:port as the address of worker 0"),
    (config({"worker": ["grpc://host:2222"]}), "host:port as the address of worker 0"),
    (config({"worker": ["host:2222/"]}), "host:port as the address of worker 0"),
    (config({"worker": ["::1:2222"]}), "host:port as the address of worker 0"),
    (config({"worker": [2222]}), "host:port as the address of worker 0"),
    (config({"worker": [TWO[0], TWO[0]]}), r"worker 1 \(10\S* and worker 0 \(10\S* have the same"),
    (json.dumps({"cluster": {"worker": TWO}}), "the key 'task' with the 'type' and the 'index'"),
    (json.dumps({"cluster": {"worker": TWO}, "task": {"type": "worker"}}), "the key 'task' with"),
    (config({"worker": TWO}, index=2), r"\(worker 0, worker 1\), not worker 2"),
    (config({"worker": TWO}, index=-1), r"\(worker 0, worker 1\), not worker -1"),
    (config({"worker": TWO}, job="evaluator"), r"\(worker 0, worker 1\), not evaluator 0"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), WRONG)
def test_wrong(text: str, expected: str) -> None:
    """https://github.com/tensorflow/tensorflow/issues/39922."""
    with pytest.raises(ValueError, match=expected):
        cluster.read(text)
