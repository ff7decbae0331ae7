"""Workers that find each other, and what is said where they do not.

User problem W4, https://github.com/tensorflow/tensorflow/issues/39922: a wrong or missing peer is
named within the timeout. Workers are threads here; nothing starts TensorFlow's servers.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from parallel_keras.workers import cluster
from parallel_keras.workers.roll_call import call_roll, check_workers


def addresses(count: int) -> list[str]:
    """Loopback addresses with ports that are free, all of them different."""
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]


def workers(names: Sequence[str], index: int) -> cluster.Cluster:
    return cluster.read(cluster.write(names, index))


def call_all(clusters: Sequence[cluster.Cluster], timeout: float) -> list[BaseException | None]:
    """Runs the roll call of each worker in a thread, and returns how it ended."""
    with ThreadPoolExecutor(len(clusters)) as pool:
        calls = [pool.submit(call_roll, each, timeout) for each in clusters]
        return [call.exception(timeout + 30) for call in calls]


@contextlib.contextmanager
def server(reply: Callable[[bytes], bytes]) -> Iterator[str]:
    """Something that listens, hangs up after its reply to what a caller said, and never calls."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with listener.accept()[0] as connection:
                        connection.sendall(reply(connection.recv(1 << 16)))

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_all_find_each_other(count: int) -> None:
    names = addresses(count)
    assert call_all([workers(names, i) for i in range(count)], 30) == [None] * count
    for name in names:  # The ports are closed again, and free for TensorFlow.
        host, port = name.split(":")
        socket.create_server((host, int(port)), reuse_port=False).close()


def test_who_comes_later_is_waited_for() -> None:
    names = addresses(2)
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(call_roll, workers(names, 0), 30)
        time.sleep(0.5)
        assert not early.done()
        call_roll(workers(names, 1), 30)
        early.result(30)


def test_a_missing_worker_is_named_within_the_timeout() -> None:
    names = addresses(3)
    start = time.monotonic()
    ends = call_all([workers(names, 0), workers(names, 2)], 1.0)
    assert time.monotonic() - start >= 1.0
    for end in ends:
        assert isinstance(end, TimeoutError)
        assert "Not all workers found each other within 1 s" in str(end)
        assert f"Received: worker 1 ({names[1]}): Connection refused. Start the" in str(end)


def test_an_address_that_does_not_exist_is_named() -> None:
    names = [*addresses(1), "no-such-host.invalid:2222"]
    with pytest.raises(TimeoutError, match=r"worker 1 \(no-such-host.invalid:2222\): \w"):
        call_roll(workers(names, 0), 0.5)


@pytest.mark.parametrize(
    "text", [b"HTTP/1.1 400 Bad Request\r\n", b"[1]\n", b'{"rank": 0}\n', b"\xff\n", b""]
)
def test_something_else_at_an_address(text: bytes) -> None:
    expected = r"worker 1 .*: something else answers at this address"
    with server(lambda _: text) as other, pytest.raises(TimeoutError, match=expected):
        call_roll(workers([*addresses(1), other], 0), 0.5)


@pytest.mark.parametrize("rank", [b"2", b"-1", b'"1"', b"1.0"])
def test_a_rank_that_does_not_exist_is_no_worker(rank: bytes) -> None:
    expected = r"worker 1 .*: something else answers at this address"
    with (
        server(lambda said: said.replace(b'"rank": 0', b'"rank": ' + rank)) as other,
        pytest.raises(TimeoutError, match=expected),
    ):
        call_roll(workers([*addresses(1), other], 0), 0.5)


def test_one_worker_under_two_addresses() -> None:
    """The name of the second machine leads to the first one."""
    name = addresses(1)[0]
    names = [name, name.replace("127.0.0.1", "localhost")]
    with pytest.raises(TimeoutError, match=r"worker 1 .*worker 0 \(127\S* answers at this addr"):
        call_roll(workers(names, 0), 0.5)


def test_another_order_of_the_workers() -> None:
    names = addresses(2)
    # Both think that they are worker 0, and that the other one is worker 1.
    ends = call_all([workers(names, 0), workers(names[::-1], 0)], 20)
    for end in ends:
        assert isinstance(end, ValueError)
        assert "The workers do not have the same cluster in TF_CONFIG" in str(end)
        assert all(f"'worker 0 ({name})'" in str(end) for name in names)


def test_the_way_back_is_blocked() -> None:
    """The other one answers, but its calls do not come through."""
    expected = r"worker 1 .*: it answers, but has not reached worker 0"
    with (
        server(lambda said: said.replace(b'"rank": 0', b'"rank": 1')) as other,
        pytest.raises(TimeoutError, match=expected),
    ):
        call_roll(workers([*addresses(1), other], 0), 0.5)


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
def test_own_address_cannot_be_used(host: str) -> None:
    """Taken by another process with the same index, or that of another machine."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        name = f"{host}:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=rf"cannot listen on its own.*worker 0 \({name}\).*index"):
            call_roll(workers([name, *addresses(1)], 0), 5)


def test_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cluster.VARIABLE, cluster.write(addresses(1), 0))
    assert check_workers(5).rank == 0
    monkeypatch.delenv(cluster.VARIABLE)
    with pytest.raises(ValueError, match="TF_CONFIG is not set"):
        check_workers(5)
