"""What the processes of a run tell each other to its end, over real sockets, and who is named when one does not."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mae_jax.runtime import link as runtime_link
from mae_jax.runtime import rendezvous, wire
from mae_jax.runtime.discovery import ProcessInfo
from mae_jax.runtime.link import Link
from mae_jax.runtime.wire import Line, encode
from tests.faults.processes import free_port

HEARTBEAT = 1.0


class Peer:
    """The other end of a connection, played by the test."""

    def __init__(self, end: socket.socket):
        self.line, self.end, self.heard = Line(end), end, []

    def say(self, **message) -> None:
        self.line.put(encode(message))

    def hear(self, kind: str, seconds: float = 5.0):
        """Returns the value of the next message of this kind; the others stay to be heard."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for message in self.heard:
                if kind in message:
                    self.heard.remove(message)
                    return message[kind]
            self.line.read()
            while message := self.line.next():
                self.heard.append(message)
            time.sleep(0.005)
        raise AssertionError(f"no {kind!r} came")


@contextlib.contextmanager
def linked(number: int = 0, processes: int = 2, listener: socket.socket | None = None, port: int = 1) -> Iterator:
    """Yields the link of process `number` and the other ends of its connections, by their numbers."""
    others = range(1, processes) if number == 0 else [0]
    pairs = {other: socket.socketpair() for other in others}
    place = ProcessInfo("127.0.0.1", port, number, processes)
    link = Link(place, {other: Line(ours) for other, (ours, _) in pairs.items()}, listener, HEARTBEAT)
    try:
        yield link, {other: Peer(theirs) for other, (_, theirs) in pairs.items()}
    finally:
        link._post(link._hang_up)
        link._leaving = link._ended = True
        link._post(lambda: None)
        link._thread.join(5)
        assert not link._thread.is_alive()
        for end in (theirs for _, theirs in pairs.values()):
            end.close()
        for line in link.lines.values():
            line.close()


@pytest.fixture
def exits(monkeypatch) -> list[int]:
    """With which codes the link would have ended the process."""
    codes = []

    def leave(code: int) -> None:
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(runtime_link, "exit_now", leave)
    return codes


def alive(*others: Peer, seconds: float) -> None:
    """Lets peers live on for a while."""
    for _ in range(int(seconds / 0.2)):
        for other in others:
            other.say(alive=None)
        time.sleep(0.2)


def test_a_late_caller_is_turned_away_though_it_says_nothing_and_others_stay_in_touch():
    here = ProcessInfo("127.0.0.1", free_port(), 0, 2)
    with linked(0, 2, rendezvous.listen(here), here.coordinator_port) as (link, others):
        with socket.create_connection(("127.0.0.1", here.coordinator_port), timeout=5) as silent:
            assert b"a run has begun" in silent.recv(1000)
            alive(others[1], seconds=1.5 * HEARTBEAT)
        assert link.verdict is None
        others[1].hear("alive")
        others[1].say(bye=None)
        with pytest.raises(RuntimeError, match="process 1"):
            link.meet("more", list)


def test_all_get_what_process_0_makes_of_all_values_and_the_value_is_encoded_once(monkeypatch):
    encoded = []
    monkeypatch.setattr(runtime_link, "encode", lambda message: encoded.append(message) or encode(message))
    with linked(0, 9) as (link, others):
        for number, other in others.items():
            other.say(value=["main", number])
        assert link.meet(0, max) == 8
        assert [other.hear("value") for other in others.values()] == [["main", 8]] * 8
        assert [message for message in encoded if "value" in message] == [{"value": ["main", 8]}]


def test_another_process_says_its_value_and_gets_the_answer_of_its_thread():
    with linked(1) as (link, others):
        others[0].say(value=["save", "for save"])
        others[0].say(value=["main", "x" * 3 * wire.PART])
        assert link.meet("mine", max) == "x" * 3 * wire.PART
        assert link.meet("mine", max, "save") == "for save"
        assert [others[0].hear("value") for _ in range(2)] == [["main", "mine"], ["save", "mine"]]


def test_the_end_of_a_link_is_told_behind_its_last_answer(monkeypatch, exits):
    monkeypatch.setattr(runtime_link.jax.distributed, "shutdown", lambda: None)
    monkeypatch.setattr(runtime_link.signal, "signal", lambda number, handler: None)
    monkeypatch.setitem(globals(), "HEARTBEAT", 60.0)  # on a busy machine the other end may read late
    answer = "x" * (wire.LIMIT // 4)  # more than the connection holds
    with linked() as (link, others):
        others[1].say(value=["main", 1])
        assert link.meet(0, lambda values: answer) == answer
        link._wait(lambda: bool(link._unsent), 5)
        assert link._unsent == {1}
        reading = threading.Thread(target=lambda: others[1].hear("bye"))
        reading.start()
        link.shutdown()
        reading.join()
        assert [kind for message in others[1].heard for kind in message if kind != "alive"] == ["value"]
        assert others[1].hear("value") == ["main", answer]
        assert link.verdict is None
    assert not exits


def test_who_parts_is_not_lost_when_it_says_so_twice_and_hangs_up(exits):
    with linked(0, 3) as (link, others):
        others[1].say(bye=None)
        others[1].say(bye=None)
        others[1].end.close()
        alive(others[2], seconds=1.5 * HEARTBEAT)
        assert link.verdict is None
        assert list(link.lines) == [2]
    assert not exits


def test_signs_of_life_come_between_the_parts_of_a_large_value():
    ours, theirs = socket.socketpair()
    line, other = Line(ours), Peer(theirs)
    line.put(encode({"value": ["main", "é" * (wire.LIMIT // 8)]}))
    assert line.waits
    line.put(encode({"alive": None}), urgent=True)
    kinds = []
    while len(kinds) < 2:
        line.flush()
        other.line.read()
        while message := other.line.next():
            kinds.extend(message)
    assert kinds == ["alive", "value"]
    assert not line.waits
    for end in (line, other.line):
        end.close()


def test_who_stops_reading_is_named_and_the_others_hear_of_process_0_meanwhile(exits):
    with linked(0, 3) as (link, others):
        for _ in range(4):  # of which the second process reads nothing
            link.tell({"value": ["main", "x" * (wire.LIMIT // 16)]}, urgent=False)
        began, signs = time.monotonic(), 0
        while not link.verdict and time.monotonic() < began + 5 * HEARTBEAT:
            for other in others.values():
                other.say(alive=None)
            with contextlib.suppress(AssertionError):
                others[1].hear("alive", 0.1)
                signs += 1
        code, line = link.verdict
        assert code == 134
        assert line.startswith("process 2 of 3 was lost: it does not read")
        assert signs >= 2  # in one heartbeat
        assert others[1].hear("leave") == [134, line]
    assert set(exits) <= {134}


def test_what_waits_for_a_peer_is_bounded(exits, monkeypatch):
    monkeypatch.setattr(wire, "UNREAD", 1 << 20)
    with linked(0, 2) as (link, _):
        for _ in range(8):
            link.tell({"value": ["main", "x" * (1 << 19)]}, urgent=False)
        assert link._over.wait(5)
        assert "process 1 of 2 was lost: it does not read" in link.verdict[1]


def send(end: socket.socket, data: bytes) -> None:
    end.settimeout(10)
    with contextlib.suppress(OSError):  # closed before all is sent
        end.sendall(data)


GARBAGE = {
    "deep": b"[" * 99_000 + b"\n", "no JSON": b"GET / HTTP/1.1\r\n\r\n", "no object": b"[1]\n",
    "unknown": b'{"x": 1}\n',
    "code": b'{"leave": [1000000000000, "x"]}\n', "no code": b'{"leave": null}\n', "no thread": b'{"value": [[], 1]}\n',
    "not asked": b'{"at": 1}\n', "not from 0": b'{"after": 1}\n', "bytes": b"\xff\xfe\n", "digits": b'{"at": %s}\n' % (
        b"9" * 5000), "endless": b"x" * (wire.LIMIT + 100_000), "endless parts": b"".join(
            b"+" + b"x" * 60_000 + b"\n" for _ in range(wire.LIMIT // 60_000 + 2)),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_peer_that_talks_garbage_is_named_and_the_link_lives_on(exits, kind):
    with linked(0, 3) as (link, others):
        sender = threading.Thread(target=send, args=(others[2].end, GARBAGE[kind]))
        sender.start()
        assert link._over.wait(10)
        assert link.verdict[0] == 134
        assert link.verdict[1].startswith("process 2 of 3 was lost: it sent an invalid message")
        assert others[1].hear("leave")[0] == 134
        assert link._thread.is_alive() or exits == [134]
        sender.join(10)


def test_all_stop_after_the_same_step_one_past_the_farthest():
    with linked(0, 3) as (link, others):
        assert not link.should_stop(5)
        others[2].say(stop=None)
        for number, other in others.items():
            other.hear("where")
            other.say(at=5 + number)
        assert [other.hear("after") for other in others.values()] == [8, 8]
        assert [link.should_stop(step) for step in (7, 8)] == [False, True]


def test_a_message_beyond_the_limit_is_refused_where_it_is_made():
    with linked(1) as (link, _), pytest.raises(ValueError, match=str(wire.LIMIT)):
        link.tell({"value": ["main", "x" * wire.LIMIT]})


FAILING = """
import socket, sys
from mae_jax.runtime.discovery import ProcessInfo
from mae_jax.runtime.link import Link
from mae_jax.runtime.wire import Line
line = Line(socket.socket(fileno=int(sys.argv[1])))
Link(ProcessInfo("127.0.0.1", 1, 1, 2), {0: line}, None, 5.0).fail(OSError(28, "No space left on device"))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_an_error_that_cannot_be_printed_is_told_to_the_others_all_the_same():
    ours, theirs = socket.socketpair()
    with ours, theirs, Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", FAILING, str(theirs.fileno())], stderr=full, timeout=60,
                              pass_fds=[theirs.fileno()])
        assert done.returncode == 2
        said = [json.loads(line) for line in ours.recv(1 << 16).splitlines()]
        assert {"leave": [2, "error: [Errno 28] No space left on device"]} in said
