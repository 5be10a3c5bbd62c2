"""How processes find each other, over real sockets; and what is said to whom when they do not."""

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from mae_jax.errors import UserError
from mae_jax.runtime import discovery, peers, rendezvous
from mae_jax.runtime.discovery import ProcessInfo
from mae_jax.runtime.wire import Line, encode
from tests.faults.processes import free_port

SAME = {"--workdir": "/runs/one", "--config.optim.betas": (0.9, 0.95)}


def greeting(number: int, same=SAME) -> dict:
    return {"mae_jax": number, "where": f"host {number}", "same": same}


def meet(processes: int, callers: list[tuple[int, dict]], seconds: float = 0.8) -> dict[int | str, str]:
    """Lets process 0 and the callers, one after the other, find each other; returns what each was told at the end."""
    port, told = free_port(), {}

    def run(name, action) -> None:
        try:
            action()
            told[name] = "all there"
        except UserError as error:
            told[name] = str(error)

    def host() -> None:
        with rendezvous.listen(ProcessInfo("127.0.0.1", port, 0, processes)) as listener:
            lines = rendezvous.receive(ProcessInfo("127.0.0.1", port, 0, processes), listener, greeting(0), seconds)
            for line in lines.values():
                line.put(encode({"go": 1}))
                line.close()

    def guest(number: int, same: dict) -> None:
        line, _ = rendezvous.call(ProcessInfo("127.0.0.1", port, number, processes), greeting(number, same), seconds)
        line.close()

    threads = [threading.Thread(target=run, args=(0, host))]
    for index, (number, same) in enumerate(callers):
        name = number if (number, same) not in callers[:index] else f"second {number}"
        threads.append(threading.Thread(target=run, args=(name, lambda n=number, s=same: guest(n, s))))
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    return told


def test_all_meet():
    assert meet(3, [(2, SAME), (1, SAME)]) == {0: "all there", 1: "all there", 2: "all there"}


def test_the_absent_are_named_to_all_that_came():
    told = meet(4, [(2, SAME)])
    assert set(told) == {0, 2}
    for line in told.values():
        assert re.match(r"processes 1, 3 of 4 did not connect to 127\.0\.0\.1:\d+ within 0\.8 s; start the same", line)


def test_a_number_that_comes_twice_is_refused_and_the_missing_one_named():
    told = meet(3, [(1, SAME), (1, SAME)])
    assert told["second 1"].startswith("process 1 was started twice: host 1, and host 1; each needs its own --process")
    assert told[0] == told[1]
    assert told[0].startswith("process 2 of 3 did not connect")


def test_processes_that_were_started_differently_are_told_how():
    told = meet(2, [(1, SAME | {"--workdir": "/runs/two"})])
    assert told[0] == told[1] == ("process 1 and process 0 were started differently: --workdir='/runs/two' and "
                                  "'/runs/one'")


def test_a_coordinator_that_does_not_answer_gets_one_line_in_time():
    port, began = free_port(), time.monotonic()
    with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port} .*0\.5 s .*Connection refused"):
        rendezvous.call(ProcessInfo("127.0.0.1", port, 1, 2), greeting(1), 0.5)
    assert time.monotonic() - began < 2


def test_another_program_at_the_port_is_no_coordinator():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def web() -> None:
            line, _ = other.accept()
            line.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            line.close()

        threading.Thread(target=web, daemon=True).start()
        with pytest.raises(UserError, match=rf"coordinator 127\.0\.0\.1:{port} .*0\.5 s"):
            rendezvous.call(ProcessInfo("127.0.0.1", port, 1, 2), greeting(1), 0.5)
        with pytest.raises(UserError, match=rf"port {port} of --coordinator=127\.0\.0\.1:{port}"):
            rendezvous.listen(ProcessInfo("127.0.0.1", port, 0, 2))


def test_garbage_at_the_port_disturbs_nobody():
    port, told = free_port(), []
    here = ProcessInfo("127.0.0.1", port, 0, 2)
    with rendezvous.listen(here) as listener:
        thread = threading.Thread(target=lambda: told.append(rendezvous.receive(here, listener, greeting(0), 5)))
        thread.start()
        with socket.create_connection(("127.0.0.1", port)) as scanner:
            scanner.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(b"".join(encode(greeting(1))))
            thread.join()
            told[0][1].close()
    assert list(told[0]) == [1]


def test_strangers_that_come_and_go_by_hundreds_disturb_nobody(monkeypatch):
    monkeypatch.setattr(rendezvous, "STRANGERS", 8)
    port, told = free_port(), []
    here = ProcessInfo("127.0.0.1", port, 0, 2)
    with rendezvous.listen(here) as listener:
        thread = threading.Thread(target=lambda: told.append(rendezvous.receive(here, listener, greeting(0), 20)))
        thread.start()
        for _ in range(20):
            callers = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
            for caller in callers:
                caller.close()
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(b"".join(encode(greeting(1))))
            thread.join()
            told[0][1].close()
    assert list(told[0]) == [1]


def test_process_0_listens_at_the_address_that_it_is_named_by(caplog):
    for host in ("127.0.0.1", "127.0.0.2"):
        with rendezvous.listen(ProcessInfo(host, free_port(), 0, 2)) as listener:
            assert listener.getsockname()[0] == host
    with rendezvous.listen(ProcessInfo("192.0.2.1", free_port(), 0, 2)) as listener:  # of no machine: for documentation
        assert listener.getsockname()[0] in peers.ANY
    assert "192.0.2.1 is not an address of this machine" in caplog.text


GREETINGS = {
    "deep": b"[" * 99_000 + b"\n", "deep in a field": b'{"mae_jax": 1, "where": "x", "same": {"--workdir": %s}}\n' % (
        b"[" * 40_000 + b"]" * 40_000), "no JSON": b"GET / HTTP/1.1\r\n\r\n", "no object": b"[1, 2]\n",
    "nothing": b"{}\n",
    "number alone": b'{"mae_jax": 1}\n', "bytes": bytes(range(256)) + b"\n", "endless": b"x" * 300_000,
    "parts": (b"+" + b"x" * 50_000 + b"\n") * 6, "digits": b'{"mae_jax": %s}\n' % (b"9" * 5000), "empty line": b"\n",
    **{f"{name}={value!r}": (json.dumps(greeting(1) | {name: value}) + "\n").encode()
       for name, value in [("mae_jax", 2), ("mae_jax", -1), ("mae_jax", 10 ** 30), ("mae_jax", True), ("mae_jax", 1.0),
                           ("mae_jax", "1"), ("mae_jax", [1]), ("mae_jax", None), ("where", None), ("where", {"a": 1}),
                           ("same", None), ("same", [1]), ("same", "x"), ("same", {}), ("same", {"--other": 1})]},
}


def test_hostile_greetings_are_turned_away_one_by_one_and_the_others_meet():
    """Each comes alone, then all at once and without an end, and none is waited for."""
    port, told, began = free_port(), [], time.monotonic()
    here = ProcessInfo("127.0.0.1", port, 0, 2)
    with rendezvous.listen(here) as listener, contextlib.ExitStack() as open_ones:
        thread = threading.Thread(target=lambda: told.append(rendezvous.receive(here, listener, greeting(0), 30)))
        thread.start()
        for text in GREETINGS.values():
            with socket.create_connection(("127.0.0.1", port), timeout=10) as stranger, contextlib.suppress(OSError):
                stranger.sendall(text)
                assert b'"go"' not in stranger.recv(1 << 16)
        for text in [*GREETINGS.values(), *[b""] * 300]:
            stranger = open_ones.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            stranger.sendall(text[:len(text) // 2])
        line = Line(open_ones.enter_context(socket.create_connection(("127.0.0.1", port))))
        line.put(encode(greeting(1)))
        thread.join(20)
        assert list(told[0]) == [1]
        told[0][1].close()
    assert time.monotonic() - began < 10


def test_a_wrong_number_is_told_so_alone():
    told = meet(3, [(7, SAME | {"--processes": 8}), (2, SAME), (1, SAME)])
    assert "was started as process 7 of a run of 3" in told[7]
    assert "--processes=8 and None" in told[7]
    assert [told[number] for number in range(3)] == ["all there"] * 3


@pytest.mark.parametrize("text", [b"", b" "])
def test_the_start_ends_in_time_whoever_calls_and_says_nothing(text):
    """Silent callers, and some that dribble, come faster than one is given up."""
    port, stop, open_ones = free_port(), threading.Event(), []

    def strangers() -> None:
        while not stop.wait(0.05):
            with contextlib.suppress(OSError):
                open_ones.append(socket.create_connection(("127.0.0.1", port), timeout=1))
            for one in open_ones:
                with contextlib.suppress(OSError):
                    one.sendall(text)

    thread, began = threading.Thread(target=strangers), time.monotonic()
    here = ProcessInfo("127.0.0.1", port, 0, 2)
    with rendezvous.listen(here) as listener:
        thread.start()
        with pytest.raises(UserError, match=r"process 1 of 2 did not connect .* 1 s"):
            rendezvous.receive(here, listener, greeting(0), 1)
        assert time.monotonic() - began < 1.5
    stop.set()
    thread.join()
    for one in open_ones:
        one.close()


def test_who_dribbles_is_dropped_in_time(monkeypatch):
    monkeypatch.setattr(rendezvous, "ANSWER", 0.3)
    here = ProcessInfo("127.0.0.1", free_port(), 0, 2)

    def receive() -> None:
        with pytest.raises(UserError, match="process 1 of 2"):
            rendezvous.receive(here, listener, greeting(0), 1)

    with rendezvous.listen(here) as listener:
        thread = threading.Thread(target=receive)
        thread.start()
        with socket.create_connection(("127.0.0.1", here.coordinator_port)) as line:
            began = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() < began + 5:
                    line.sendall(b" ")
                    time.sleep(0.02)
            assert time.monotonic() - began < 1
        thread.join()


def test_many_absent_processes_are_named_in_a_short_line():
    here = ProcessInfo("127.0.0.1", free_port(), 0, 4096)
    with rendezvous.listen(here) as listener, pytest.raises(UserError) as error:
        rendezvous.receive(here, listener, greeting(0), 0.1)
    assert str(error.value).startswith("processes 1, 2, 3, ")
    assert "20 and 4075 more of 4096" in str(error.value)


def test_a_greeting_that_is_too_long_is_refused_by_its_sender():
    port = free_port()
    with rendezvous.listen(ProcessInfo("127.0.0.1", port, 0, 2)), pytest.raises(UserError, match="100000"):
        rendezvous.call(ProcessInfo("127.0.0.1", port, 1, 2), greeting(1, {"--x": "y" * 100_000}), 5)


DESCRIPTORS = """
import resource, sys
from mae_jax.errors import UserError
from mae_jax.runtime import rendezvous
soft, hard, processes = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    rendezvous.allow_descriptors(processes)
except UserError as error:
    print(error)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(("soft", "hard", "processes", "says"), [
    (256, 4096, 1000, "3024"), (256, 2500, 1000, "2500"), (256, 1024, 2, "1024"), (3500, 4096, 1000, "3500"),
    (256, 1024, 1000, "process 0 of 1000 needs 3024 open files, and may have 1024"),
])
def test_the_limit_of_open_files_is_raised_or_named(soft, hard, processes, says):
    done = subprocess.run([sys.executable, "-c", DESCRIPTORS, *map(str, (soft, hard, processes))], capture_output=True,
                          text=True, timeout=60)
    assert done.stdout.startswith(says), done.stderr


CROWDED = """
import resource, sys
from mae_jax.runtime import rendezvous
from mae_jax.runtime.discovery import ProcessInfo
resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))
here = ProcessInfo("127.0.0.1", int(sys.argv[1]), 0, 2)
with rendezvous.listen(here) as listener:
    print("listens", flush=True)
    print(list(rendezvous.receive(here, listener, {"where": "here", "same": {}}, 60)))
"""


def test_silent_callers_that_take_all_descriptors_make_room_for_who_speaks():
    port = free_port()
    with contextlib.ExitStack() as open_ones:
        process_0 = open_ones.enter_context(subprocess.Popen([sys.executable, "-c", CROWDED, str(port)],
                                                             stdout=subprocess.PIPE, text=True))
        assert process_0.stdout.readline() == "listens\n"
        for _ in range(120):
            open_ones.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        line = open_ones.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        line.sendall(b"".join(encode(greeting(1, {}))))
        assert process_0.communicate(timeout=60)[0] == "[1]\n"


def test_a_thousand_callers_meet_past_descriptor_1024_in_seconds():
    processes, began = 1200, time.monotonic()
    rendezvous.allow_descriptors(2 * processes)  # this process has both ends
    here, told, callers = ProcessInfo("127.0.0.1", free_port(), 0, processes), [], []
    with rendezvous.listen(here) as listener:
        thread = threading.Thread(target=lambda: told.append(rendezvous.receive(here, listener, greeting(0), 30)))
        thread.start()
        for number in range(1, processes):
            callers.append(Line(socket.create_connection((here.coordinator_host, here.coordinator_port), timeout=10)))
            callers[-1].put(encode(greeting(number)))
        thread.join(30)
    assert sorted(told[0]) == list(range(1, processes))
    assert max(line.socket.fileno() for line in told[0].values()) > 1024
    assert time.monotonic() - began < 15
    for line in [*told[0].values(), *callers]:
        line.close()


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_processes_meet_at_an_ipv6_address():
    port, told = free_port(), []
    here = discovery.find(f"[::1]:{port}", 2, 0, {})
    assert (here.address, here.coordinator_host) == (f"[::1]:{port}", "::1")
    with rendezvous.listen(here) as listener:
        assert listener.getsockname()[0] == "::1"
        assert 0 < rendezvous.free_port(listener) < 65536
        thread = threading.Thread(target=lambda: told.append(rendezvous.receive(here, listener, greeting(0), 5)))
        thread.start()
        line = Line(socket.create_connection(("::1", port)))
        line.put(encode(greeting(1)))
        thread.join()
    line.close()
    told[0][1].close()
