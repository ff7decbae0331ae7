"""Which workers there are, and which of them this process is: TF_CONFIG, read and written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Final

VARIABLE: Final = "TF_CONFIG"
"""The environment variable from which TensorFlow's strategies learn of the cluster."""

_JOBS: Final = ("chief", "worker")
_EXAMPLE: Final = (
    '{"cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]}, '
    '"task": {"type": "worker", "index": 0}}'
)
_LARGEST_PORT: Final = 65535


@dataclasses.dataclass(frozen=True)
class Task:
    """One worker.

    Args:
        job: String, `"worker"`, or `"chief"`.
        index: Int, its number within the job.
        address: String, `"host:port"`.
    """

    job: str
    index: int
    address: str

    @property
    def host(self) -> str:
        """The host of the address, without the brackets of an IPv6 one."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port of the address."""
        return int(self.address.rpartition(":")[2])

    def __str__(self) -> str:
        """Names the worker as errors do."""
        return f"{self.job} {self.index} ({self.address})"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """All workers in the order of their ranks, and the one that this process is.

    Args:
        tasks: Tuple of `Task`, the chief first if there is one.
        rank: Int, the place of this process in `tasks`.
    """

    tasks: tuple[Task, ...]
    rank: int

    @property
    def own(self) -> Task:
        """The task of this process."""
        return self.tasks[self.rank]

    @property
    def others(self) -> tuple[Task, ...]:
        """The tasks of all other processes."""
        return (*self.tasks[: self.rank], *self.tasks[self.rank + 1 :])


def write(addresses: Sequence[str], index: int) -> str:
    """Returns the TF_CONFIG of one worker.

    Args:
        addresses: Sequence of strings `"host:port"`, those of all workers, in
            an order that is the same on all of them.
        index: Int, which of them the process is.

    Returns:
        String, for the environment variable `TF_CONFIG`.

    Example:
    >>> from parallel_keras.workers import cluster
    >>> cluster.write(["10.0.0.1:2222"], 0)
    '{"cluster": {"worker": ["10.0.0.1:2222"]}, "task": {"type": "worker", "index": 0}}'
    """
    task = {"type": "worker", "index": index}
    return json.dumps({"cluster": {"worker": list(addresses)}, "task": task})


def read(text: str | None) -> Cluster:
    """Reads a TF_CONFIG, and says what is wrong with it.

    TensorFlow itself reads it when the strategy is made, and a mistake there
    often shows as a wait without end.

    Args:
        text: String, the value of the environment variable `TF_CONFIG`, or
            `None` if it is not set. The fields are those that
            `tf.distribute.cluster_resolver.TFConfigClusterResolver` reads.

    Returns:
        The `Cluster`.

    Raises:
        ValueError: If it is missing or malformed, if an address is malformed
            or given twice, or if the task is not one of the cluster's.

    Example:
    >>> from parallel_keras.workers import cluster
    >>> found = cluster.read(cluster.write(["10.0.0.1:2222", "10.0.0.2:2222"], 1))
    >>> found.rank, str(found.own)
    (1, 'worker 1 (10.0.0.2:2222)')
    """
    config = _load(text)
    tasks = tuple(
        Task(job, index, address)
        for job, addresses in _jobs(config, text).items()
        for index, address in enumerate(addresses)
    )
    _check_addresses(tasks, text)
    return Cluster(tasks, _rank(config, tasks, text))


def _wrong(expected: str, text: str | None) -> ValueError:
    return ValueError(
        f"The environment variable {VARIABLE} does not describe a cluster. Expected: {expected}. "
        f"Received: {VARIABLE}={text}. A valid one, for the first of two workers: {_EXAMPLE}"
    )


def _load(text: str | None) -> dict[str, Any]:
    if not text:
        raise ValueError(
            f"The environment variable {VARIABLE} is not set, so this process knows of no other "
            "worker. Expected: JSON with the addresses of all workers and the number of this one. "
            f"Received: {VARIABLE}={text!r}. Set it before the script starts, for example to "
            f"{_EXAMPLE}"
        )
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise _wrong(f"JSON, but {error}", text) from error
    if not isinstance(config, dict):
        raise _wrong("an object with the keys 'cluster' and 'task'", text)
    return config


def _jobs(config: dict[str, Any], text: str | None) -> dict[str, list[str]]:
    """Returns the addresses of each job, those with the lower ranks first."""
    jobs = config.get("cluster")
    if not isinstance(jobs, dict) or not jobs:
        raise _wrong("the key 'cluster', an object with the addresses of the workers", text)
    unknown = sorted(set(jobs) - set(_JOBS))
    if unknown:
        raise _wrong(
            f"no other jobs than {list(_JOBS)}, because workers that train together need no other; "
            f"{unknown} are for other strategies",
            text,
        )
    for job, addresses in jobs.items():
        if not isinstance(addresses, list) or not addresses:
            raise _wrong(f"a list of at least one address as 'cluster' / {job!r}", text)
    if len(jobs.get("chief", [])) > 1:
        raise _wrong("at most one chief", text)
    return {job: jobs[job] for job in _JOBS if job in jobs}


def _check_addresses(tasks: tuple[Task, ...], text: str | None) -> None:
    taken: dict[str, Task] = {}
    for task in tasks:
        if not is_address(task.address):
            raise _wrong(f"host:port as the address of {task.job} {task.index}", text)
        if task.address in taken:
            raise _wrong(
                f"every address once, but {task} and {taken[task.address]} have the same", text
            )
        taken[task.address] = task


def is_address(address: Any) -> bool:
    """Returns whether something is a string `"host:port"`."""
    if not isinstance(address, str):
        return False
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    return (
        bool(host.strip("[]"))
        and (bracketed or ":" not in host)
        and "/" not in host
        and port.isascii()
        and port.isdigit()
        and 1 <= int(port) <= _LARGEST_PORT
    )


def _rank(config: dict[str, Any], tasks: tuple[Task, ...], text: str | None) -> int:
    task = config.get("task")
    if not isinstance(task, dict) or "type" not in task or "index" not in task:
        raise _wrong("the key 'task' with the 'type' and the 'index' of this process", text)
    job, index = task["type"], str(task["index"])
    for rank, each in enumerate(tasks):
        if (each.job, str(each.index)) == (job, index):
            return rank
    exist = ", ".join(f"{each.job} {each.index}" for each in tasks)
    raise _wrong(f"as 'task' one of the cluster's ({exist}), not {job} {index}", text)
