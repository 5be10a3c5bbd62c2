"""How processes find each other, over real sockets; and what is said to whom when they do not."""

import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mae_jax.errors import UserError
from mae_jax.runtime import peers, rendezvous
from mae_jax.runtime.discovery import ProcessInfo
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
                rendezvous.send(line, {"go": 1})
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
        assert re.match(r"processes 1, 3 of 4 did not come to 127\.0\.0\.1:\d+ within 0\.8 s; start the same", line)


def test_a_number_that_comes_twice_is_refused_and_the_missing_one_named():
    told = meet(3, [(1, SAME), (1, SAME)])
    assert told["second 1"].startswith("process 1 was started twice: host 1, and host 1; each needs its own --process")
    assert told[0] == told[1]
    assert told[0].startswith("process 2 of 3 did not come")


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
            rendezvous.send(line, greeting(1))
            thread.join()
            told[0][1].close()
    assert list(told[0]) == [1]


def test_who_dribbles_is_dropped_in_time(monkeypatch):
    monkeypatch.setattr(rendezvous, "ANSWER", 0.3)
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def dribble() -> None:
        while not stop.wait(0.05):
            theirs.sendall(b" ")

    thread, began = threading.Thread(target=dribble), time.monotonic()
    thread.start()
    assert rendezvous.greeting_of(ours) == {}
    assert time.monotonic() - began < 1
    stop.set()
    thread.join()
    ours.close()
    theirs.close()


def test_a_late_caller_is_turned_away_though_it_says_nothing_and_others_stay_in_touch():
    here = ProcessInfo("127.0.0.1", free_port(), 0, 2)
    listener, (line, peer) = rendezvous.listen(here), socket.socketpair()
    link = peers.Peers(here, {1: line}, listener, heartbeat=1.0)
    peer.settimeout(5)
    with socket.create_connection(("127.0.0.1", here.coordinator_port), timeout=5) as silent:
        assert b"a run has begun" in silent.recv(1000)
        for _ in range(8):  # longer than a heartbeat
            rendezvous.send(peer, {"alive": None})
            time.sleep(0.2)
    assert link.verdict is None
    assert b"alive" in peer.recv(1000)
    rendezvous.send(peer, {"bye": None})
    with pytest.raises(RuntimeError, match="process 1"):
        link.gather("more")
    link._hang_up()
    link._leaving = True
    rendezvous.send(link._self, {"bye": None})
    link._thread.join(5)
    assert not link._thread.is_alive()
    for end in (peer, *link.lines.values(), link._self):
        end.close()


def test_process_0_listens_at_the_address_that_it_is_named_by(caplog):
    for host in ("127.0.0.1", "127.0.0.2"):
        with rendezvous.listen(ProcessInfo(host, free_port(), 0, 2)) as listener:
            assert listener.getsockname()[0] == host
    with rendezvous.listen(ProcessInfo("192.0.2.1", free_port(), 0, 2)) as listener:  # of no machine: for documentation
        assert listener.getsockname()[0] in peers.ANY
    assert "192.0.2.1 is no address of this machine" in caplog.text


FAILING = """
import socket, sys
from mae_jax.runtime import peers
from mae_jax.runtime.discovery import ProcessInfo
line = socket.socket(fileno=int(sys.argv[1]))
peers.Peers(ProcessInfo("127.0.0.1", 1, 1, 2), {0: line}, None, 5.0).fail(OSError(28, "No space left on device"))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_an_error_that_cannot_be_printed_is_told_to_the_others_all_the_same():
    ours, theirs = socket.socketpair()
    with ours, theirs, Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", FAILING, str(theirs.fileno())], stderr=full, timeout=60,
                              pass_fds=[theirs.fileno()])
        assert done.returncode == 2
        assert '{"leave": [2, "error: [Errno 28] No space left on device"]}' in ours.recv(1 << 16).decode()
