"""`connect` and `serve`: what they refuse, what they notice, whom they let in.

One process stands for each machine, or only a port that behaves as one would; other hosts are in
test_namespaces_servers.py.
"""

import contextlib
import ipaddress
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
import tensorflow as tf

import parallel_keras as pk
from parallel_keras.workers import heartbeat, listening, server_checks, servers, sockets
from parallel_keras.workers.cluster import Task
from tests.processes import Program, free_ports

START = 120.0
IP = ipaddress.ip_address


def task(port: int, index: int = 0) -> Task:
    return Task("worker", index, f"127.0.0.1:{port}")


@contextlib.contextmanager
def port_that(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port whose process does something else than TensorFlow."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    kept.append(server.accept()[0])
                    answer(kept[-1])

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        for one in kept:
            one.close()


@contextlib.contextmanager
def server_of(names: str, status: Callable[[], bytes] | None = None) -> Iterator[int]:
    """A server of gRPC that says of itself what one of TensorFlow would."""
    said = f"\n){names}\x12\x03CPU".encode() if names else b""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            assert details.method == "/tensorflow.WorkerService/GetStatus"
            return grpc.unary_unary_rpc_method_handler(
                lambda request, context: status() if status else said
            )

    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait(10)


@pytest.mark.parametrize(
    "addresses", [[], "10.0.0.1:2222", ["10.0.0.1"], ["10.0.0.1:2222", "http://h:1"], [2222], None]
)
def test_addresses_are_malformed(addresses: Any) -> None:
    with pytest.raises(ValueError, match=r'strings "host:port", one for each.*Received: addresses'):
        pk.connect(addresses)


def test_a_server_is_given_twice() -> None:
    with pytest.raises(ValueError, match=r"every server once. Received: addresses=\['h:1', 'h:1'"):
        pk.connect(["h:1", "h:1"])


@pytest.mark.parametrize("timeout", [0, -1.0, "60", True, None, float("nan")])
def test_timeout_is_wrong(timeout: Any) -> None:
    with pytest.raises(ValueError, match=r"seconds above 0. Received: timeout="):
        pk.connect(["127.0.0.1:1"], timeout=timeout)


@pytest.mark.parametrize("own", ["10.0.0.9", "2223", "10.0.0.9:0", ":2223"])
def test_own_address_is_malformed(own: str) -> None:
    with pytest.raises(ValueError, match=r'string "host:port", by which.*own_address='):
        pk.connect(["127.0.0.1:1"], own)


def test_too_late() -> None:
    tf.constant(1)
    with pytest.raises(ValueError, match=r"before TensorFlow starts.*right after the imports"):
        pk.connect(["127.0.0.1:1"], "127.0.0.1:2")


def test_own_address_is_found() -> None:
    found = listening.own_address(task(9))
    assert re.fullmatch(r"127\.0\.0\.1:\d+", found)
    assert listening.own_address(Task("worker", 0, "[::1]:9")).startswith("[::1]:")


def test_there_is_no_way_to_a_server() -> None:
    with pytest.raises(OSError, match=r"no way to worker 0 \(no.such.host.invalid:9\).*give own_"):
        listening.own_address(Task("worker", 0, "no.such.host.invalid:9"))


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1", "no.such.host.invalid"])
def test_own_address_cannot_be_used(host: str) -> None:
    """Taken by another process; of another machine; of none."""
    with port_that(lambda _: None) as port:
        own = Task("localhost", 0, f"{host}:{port}")
        with pytest.raises(OSError, match=rf"cannot listen on {host}:{port}: .*ss -tlnp"):
            listening.check_own_address(own)


def test_who_does_not_answer_is_named_with_the_reason() -> None:
    """W4: https://github.com/tensorflow/tensorflow/issues/39922."""
    (refused,) = free_ports(1)
    with (
        port_that(lambda _: None) as frozen,
        port_that(lambda one: one.sendall(b"HTTP/1.1 400 Bad")) as other,
        port_that(lambda one: one.close()) as closing,
        server_of("/job:worker/replica:0/task:0/device:CPU:0") as fine,
    ):
        ports = [refused, frozen, other, closing, fine]
        tasks = [task(port, index) for index, port in enumerate(ports)]
        tasks.append(Task("worker", 5, "no.such.host.invalid:9"))
        with pytest.raises(TimeoutError) as caught:
            server_checks.wait_for(tasks, 1.0)
    text = str(caught.value)
    assert f"worker 0 (127.0.0.1:{refused}): calls are refused" in text
    assert f"worker 1 (127.0.0.1:{frozen}): it is frozen" in text
    assert f"worker 2 (127.0.0.1:{other}): what listens there is no TensorFlow server" in text
    assert f"worker 3 (127.0.0.1:{closing}): " in text
    assert "worker 4" not in text
    assert "worker 5 (no.such.host.invalid:9): " in text
    assert "Start the missing servers" in text


@pytest.mark.parametrize(
    ("names", "received"),
    [
        ("/job:worker/replica:0/task:1/device:CPU:0", "/job:worker/task:1, which may belong to an"),
        ("/job:ps/replica:0/task:0/device:CPU:0", "/job:ps/task:0"),
        ("/job:chief/replica:0/task:0/device:CPU:0", "/job:chief/task:0"),
        (f"/job:{listening.SERVES}1_2_3/replica:0/task:0/device:CPU:0", "of TensorFlow 1.2.3"),
        ("", "no TensorFlow server"),
    ],
)
def test_another_cluster(names: str, received: str) -> None:
    with server_of(names) as port, pytest.raises(ValueError, match=received):
        server_checks.check_server(task(port))


@pytest.mark.parametrize("job", ["worker", listening.JOB])
def test_servers_that_fit(job: str) -> None:
    with server_of(f"/job:{job}/replica:0/task:0/device:CPU:0") as port:
        server_checks.check_server(task(port))


def test_what_is_not_the_connections_fault_stays_what_it_is() -> None:
    with server_of("/job:worker/replica:0/task:0/device:CPU:0") as port:
        found = servers.Servers([task(port)], task(1), 60)
        try:
            assert found.failures(tf.errors.CancelledError(None, None, "by the user")) == {}
        finally:
            found.stop()


def test_a_server_that_was_started_anew_is_no_longer_the_same() -> None:
    told = iter([b"first", b"second"])
    with server_of("", lambda: next(told)) as port:
        found = servers.Servers([task(port)], task(1), 60)
        try:
            error = tf.errors.InvalidArgumentError(None, None, "Unable to find a context_id")
            gone = found.failures(error)
            assert "it was started anew" in gone[task(port)]
            text = str(found.error(gone, error))
            assert f"a server is gone: worker 0 (127.0.0.1:{port}): it was started anew" in text
            assert "Received: InvalidArgumentError: Unable to find a context_id" in text
        finally:
            found.stop()


def test_whatever_comes_after_a_loss_names_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    error = tf.errors.UnavailableError(None, None, "Socket\nclosed")
    with server_of("/job:worker/replica:0/task:0/device:CPU:0") as port:
        found = servers.Servers([task(port)], task(1), 60)
        found.stop()
        monkeypatch.setattr(servers, "_connected", [found])
        with pytest.raises(tf.errors.UnavailableError), servers.naming_faults():
            raise error  # From elsewhere, as the server answers.
        told = "From remote target /job:worker/replica:0/task:0 while calling RecvTensor: reset"
        broken = tf.errors.UnavailableError(None, None, told)
        with (
            pytest.raises(ConnectionError, match=r"worker 0 .*it answers now, but its connection"),
            servers.naming_faults(),
        ):
            raise broken
    with (
        pytest.raises(ConnectionError, match=r"refused.*Received: UnavailableError: Socket closed"),
        servers.naming_faults(),
    ):
        raise error
    found._pulses[0].failure = "it is frozen"
    with (
        pytest.raises(ConnectionError, match=r"worker 0 .*it is frozen.*Received: an earlier fail"),
        servers.naming_faults(),
    ):
        raise AssertionError("This must not be reached.")


def test_a_server_that_falls_silent_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """W2: https://github.com/tensorflow/tensorflow/issues/35878. Who waits for it is released."""
    silent = threading.Event()
    frame = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])

    def answer(one: socket.socket) -> None:
        if not silent.is_set():
            one.sendall(frame)

    with port_that(answer) as port, port_that(answer) as bystander:
        pulse = heartbeat.Pulse(task(port), 1, 1.5)
        pulse.start()
        try:
            with (
                socket.create_connection(("127.0.0.1", port)) as waiting,
                socket.create_connection(("127.0.0.1", bystander)) as other,
            ):
                assert waiting.recv(9, socket.MSG_WAITALL) == frame
                assert other.recv(9, socket.MSG_WAITALL) == frame
                waiting.settimeout(2.5)
                with pytest.raises(TimeoutError):  # As long as it answers, nobody is cut off.
                    waiting.recv(1)
                assert pulse.failure is None
                assert waiting.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert not other.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                silent.set()
                waiting.settimeout(60)
                assert waiting.recv(1) == b""  # It waited for the server, and no longer does.
                assert pulse.failure is not None
                assert "frozen" in pulse.failure
                other.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    other.recv(1)
        finally:
            pulse.stop()
            pulse.join(30)
        assert not pulse.is_alive()


def test_a_script_that_was_stopped_itself_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call that took long is no silence, however long this process was stopped in it."""
    answers = iter(["no answer", None])
    clock = iter([0.0, 1000.0, 1000.0, 1000.0, 1001.0, 1001.0])
    pulse = heartbeat.Pulse(task(9), 1, 10.0)

    def call(server: Task, timeout: float) -> str | None:
        answer = next(answers)
        if answer is None:
            pulse.stop()
        return answer

    monkeypatch.setattr(heartbeat, "call", call)
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: next(clock))
    pulse.run()
    assert pulse.failure is None


HOSTS = [
    # own, callers, called at, by, gets through
    (["127.0.0.1"], None, "127.0.0.1", "127.0.0.1", True),
    (["127.0.0.1"], None, "127.0.0.2", "127.0.0.1", False),
    (None, ["127.0.0.5"], "127.0.0.2", "127.0.0.5", True),
    (["127.0.0.1"], ["127.0.0.5"], "127.0.0.1", "127.0.0.6", False),
    (["127.0.0.1", "127.0.0.2"], ["::1", "127.0.0.5"], "127.0.0.2", "127.0.0.5", True),
    (["::1"], ["::1"], "127.0.0.1", "127.0.0.1", False),
    (["127.0.0.1"], ["127.0.0.1"], "::1", "::1", False),
    (["::1"], ["::2", "::1"], "::1", "::1", True),
    (["::1"], ["::2"], "::1", "::1", False),
    (["127.0.0.1"], [f"10.0.{i // 250}.{i % 250}" for i in range(900)] + ["127.0.0.5"],
     "127.0.0.1", "127.0.0.5", True),
]  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Only Linux filters by socket.")
@pytest.mark.parametrize(("own", "callers", "at", "by", "gets_through"), HOSTS)
def test_only_who_is_let_in(own: Any, callers: Any, at: str, by: str, gets_through: bool) -> None:
    if ":" in at and not socket.has_dualstack_ipv6():
        pytest.skip("This machine has no IPv6.")
    # As TensorFlow listens: at all addresses of both kinds.
    listening = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    with listening:
        port = listening.getsockname()[1]
        addresses = [None if each is None else set(map(IP, each)) for each in (own, callers)]
        assert sockets.listens_to(port, *addresses)
        try:
            socket.create_connection((at, port), 0.5, source_address=(by, 0)).close()
        except TimeoutError:
            assert not gets_through
        else:
            assert gets_through


def test_nobody_listens_on_the_port() -> None:
    (port,) = free_ports(1)
    assert not sockets.listens_to(port, None, None)


WRONG = {
    "no port": (["--address=10.0.0.1"], r"Expected --address=host:port.*'10.0.0.1'"),
    "all": (["--address=0.0.0.0:2222"], r"stands for all of them.*--all_interfaces"),
    "foreign": (["--address=192.0.2.1:2222"], r"cannot listen on 192.0.2.1:2222"),
    "caller": (["--address=127.0.0.1:PORT", "--client=127.0.0.1,no.such.host.invalid"],
               r"Expected --client to be.*client='no.such.host.invalid'"),
    "taken": (["--address=127.0.0.1:TAKEN"], r"cannot listen on 127.0.0.1:\d+.*ss -tlnp"),
    "taken, all": (["--address=127.0.0.1:TAKEN", "--all_interfaces"], r"cannot listen on 0.0.0.0:"),
}  # fmt: skip


@pytest.mark.slow
def test_serve_says_what_is_wrong(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with port_that(lambda _: None) as taken:
        programs = {
            name: serve(
                tmp_path,
                [each.replace("PORT", str(port)).replace("TAKEN", str(taken)) for each in flags],
            )
            for name, (flags, _) in WRONG.items()
        }
        try:
            for name, program in programs.items():
                assert program.wait(START) == 1, (name, program.said)
        finally:
            for program in programs.values():
                program.end()
    for name, (_, expected) in WRONG.items():
        said = [line for line in programs[name].said.splitlines() if line.startswith("parallel_k")]
        assert len(said) == 1, (name, programs[name].said)
        assert re.search(expected, said[0]), (name, said)


_COUNT = iter(range(1000))


def serve(folder: Path, flags: list[str], prefix: tuple[str, ...] = ()) -> Program:
    command = [*prefix, sys.executable, "-m", "parallel_keras", "serve", *flags]
    return Program(command, folder / f"serve_{next(_COUNT)}.txt", {"TF_CPP_MIN_LOG_LEVEL": "2"})


@pytest.mark.slow
def test_a_script_and_servers_on_loopback(tmp_path: Path) -> None:
    """The numbers of one device; then a server is started anew, which is named."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
    running = [serve(tmp_path, [f"--address={each}", "--client=127.0.0.1"]) for each in addresses]
    command = [sys.executable, "-m", "tests.servers_client", "anew", "20", "-", *addresses[:2]]
    try:
        for each in running:
            each.wait_for("Ctrl-C ends it", START)
            assert each.said.count("Security: TensorFlow's servers have no authentication") == 1
            assert re.search(r"Serving CPU:0 on 127.0.0.1:\d+ to 127.0.0.1\.", each.said)
        script = Program(command, tmp_path / "script.txt", {})
        running.append(script)
        script.wait_for("epoch 0 batch 2", START)
        assert "equal" in script.said
        assert script.said.count("servers have no authentication") == 1
        running[1].end()
        running.append(serve(tmp_path, [f"--address={addresses[1]}"]))
        running[-1].wait_for("Ctrl-C ends it", START)
        assert "Serving CPU:0 on 127.0.0.1" in running[-1].said
        assert "to everyone" in running[-1].said
        assert script.wait(START) == 3, script.said
        assert f"server is gone: worker 1 ({addresses[1]})" in script.said
        running[0].send(signal.SIGINT)
        assert running[0].wait(20) == 0
    finally:
        for each in running:
            each.end()


# Sends a signal once more at each line of what handles the first one, up to ten times.
TOLD_TWICE = """
import os, signal, sys, threading
from parallel_keras.commands import serve

left = 10

def tell(frame, event, argument):
    global left
    outer = frame
    while outer is not None and outer.f_code.co_name != "end":
        outer = outer.f_back
    if outer is not None and left:
        left -= 1
        signal.raise_signal(signal.SIGTERM)
    return tell

sys.settrace(tell)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
serve.run_until_ended()
"""


def test_a_server_ends_however_often_it_is_told() -> None:
    """Ctrl-C once more, before the first one was through, left it waiting for its own lock."""
    command = [sys.executable, "-c", TOLD_TWICE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_without_connect_nothing_changes(caplog: pytest.LogCaptureFixture) -> None:
    error = tf.errors.UnavailableError(None, None, "somewhere else")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(tf.errors.UnavailableError) as caught,
        servers.naming_faults(),
    ):
        raise error
    assert caught.value is error
    assert not caplog.records
