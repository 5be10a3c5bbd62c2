"""Cost of the link between processes for process 0, by the number of processes: start, idling, values, agreed stops.

  python benchmarks/link.py
  python benchmarks/link.py --processes=64,512 --idle=10        (a trial)

Process 0 and two others are real: `mae_jax.runtime.peers.launch` and jax.distributed with three processes, which sum an
array on their devices. One more process simulates the rest over loopback: it holds a connection for each, sends its
greeting and its heartbeats, and answers. All share this machine's cores. Seconds are wall-clock time; they start after
the three have imported JAX, and include the start of jax.distributed. Memory is that of process 0 in excess of its
imports. Idling is measured for the link's thread and for the whole process, which includes JAX's own threads. Writes
benchmarks/results/link.json and link.md.
"""

import argparse
import collections
import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
REAL = 3  # processes with JAX
ROUNDS = 20
STEPS = list(range(0, 200_000, 1000))  # 200 kept checkpoints
SAME = {f"--config.group.field_{number}": [0.5, "a value"] for number in range(150)}  # as many as a config has


def used() -> tuple[float, float]:
    """Returns the seconds of processor time that this process has used, and its resident memory in MiB (Linux)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return time.process_time(), int(line.split()[1]) / 1024


def used_by(thread: Any) -> float:
    """Returns the seconds of processor time that a thread of this process has used (Linux)."""
    return int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0]) / 1e9


def real(number: int, processes: int, port: int, idle: float, heartbeat: float) -> int:
    """A real process; process 0 prints what it saw."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mae_jax.runtime import peers
    from mae_jax.runtime.discovery import ProcessInfo

    initialize = jax.distributed.initialize
    # The others are not played to JAX.
    jax.distributed.initialize = lambda address, _, *more, **kwargs: initialize(address, REAL, *more, **kwargs)
    print("ready", flush=True)
    sys.stdin.readline()
    (_, memory), found = used(), {}
    began = time.monotonic()

    def timed(name: str, action: Any) -> None:
        before, (cpu, _) = time.monotonic(), used()
        action()
        found[f"{name}_seconds"] = round(time.monotonic() - before, 4)
        found[f"{name}_cpu_seconds"] = round(used()[0] - cpu, 4)

    def command() -> int:
        found["start_seconds"] = round(time.monotonic() - began, 3)
        mesh = jax.make_mesh((jax.device_count(),), ("data",))
        rows = jax.make_array_from_callback((jax.device_count(),), jax.NamedSharding(mesh, jax.P("data")),
                                            lambda index: np.arange(jax.device_count())[index])
        assert int(jax.jit(jnp.sum)(rows)) == sum(range(jax.device_count()))
        found["start_cpu_seconds"], found["mib"] = (round(now - then, 2) for now, then in zip(
            used(), (0.0, memory), strict=True))
        for _ in range(2):
            peers.broadcast(None)
        link = peers.peers()
        assert link
        thread = link._thread
        before = used_by(thread)
        timed("idle", lambda: time.sleep(idle))
        found["idle_share"] = round((used_by(thread) - before) / found["idle_seconds"], 5)
        found["idle_share_of_all_threads"] = round(found["idle_cpu_seconds"] / found["idle_seconds"], 5)
        timed("broadcast", lambda: [peers.broadcast(STEPS) for _ in range(ROUNDS)])
        timed("first", lambda: [peers.first_true("") for _ in range(ROUNDS)])
        if number == 0:
            link.request_stop()
        step = 0
        while not link.should_stop(step):
            time.sleep(0.01)
            step += 1
        found["stopped_after"], found["mib_at_the_end"] = step, round(used()[1] - memory, 1)
        return 0

    place = ProcessInfo("127.0.0.1", port, number, processes)
    code = peers.launch(command, place, SAME, 120, heartbeat)
    if number == 0:
        print(json.dumps(found), flush=True)
    return code


class Players:
    """All processes that are not real, as one."""

    def __init__(self, numbers: range, port: int, heartbeat: float):
        self.pause, self.selector = heartbeat / (8 if len(numbers) < 1000 else 2), selectors.DefaultSelector()
        self.heard: dict[socket.socket, bytes] = {}
        self.due: collections.deque[tuple[float, socket.socket]] = collections.deque()  # of signs of life
        for number in numbers:
            line = socket.create_connection(("127.0.0.1", port), timeout=60)
            self.say(line, {"mae_jax": number, "where": f"player {number}", "same": SAME})
            self.selector.register(line, selectors.EVENT_READ)
            self.heard[line] = b""

    def say(self, line: socket.socket, message: dict) -> None:
        with contextlib.suppress(OSError):  # at the end
            line.sendall(json.dumps(message).encode() + b"\n")

    def run(self) -> None:
        """Plays until all connections are closed."""
        while self.heard:
            now = time.monotonic()
            while self.due and self.due[0][0] < now:
                _, line = self.due.popleft()
                if line in self.heard:
                    self.say(line, {"alive": None})
                    self.due.append((now + self.pause, line))
            for key, _ in self.selector.select(0.2):
                self.hear(key.fileobj)

    def hear(self, line: Any) -> None:
        try:
            data = line.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self.selector.unregister(line)
            line.close()
            del self.heard[line]
            return
        *messages, self.heard[line] = (self.heard[line] + data).split(b"\n")
        for message in messages:
            self.answer(line, message)

    def answer(self, line: socket.socket, message: bytes) -> None:
        if message.startswith(b'{"go"'):
            # Spread, as processes that began at different moments are.
            self.due.append((time.monotonic() + len(self.due) / len(self.heard) * self.pause, line))
            self.say(line, {"value": ["main", ""]})
        elif message.startswith(b'{"value"'):
            self.say(line, {"value": ["main", ""]})
        elif message.startswith(b'{"where"'):
            self.say(line, {"at": 7})
        elif message.startswith((b'{"bye"', b'{"leave"')):
            self.say(line, {"bye": None})
            with contextlib.suppress(OSError):  # the other end was faster
                line.shutdown(socket.SHUT_WR)


def measured(processes: int, idle: float, heartbeat: float) -> dict[str, Any]:
    """Starts all programs, and returns what process 0 saw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, __file__, f"--processes={processes}", f"--port={port}", f"--idle={idle}",
               f"--heartbeat={heartbeat}", "--role"]
    programs = [subprocess.Popen([*command, str(role)], env=environment, text=True, stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE) for role in (*range(REAL), "players")]
    try:
        for program in programs:
            assert program.stdout.readline() == "ready\n"
        for program in programs:
            program.stdin.write("go\n")
            program.stdin.flush()
        out = programs[0].communicate(timeout=600)[0]
        codes = [program.wait(60) for program in programs]
        assert codes == [0] * len(programs), codes
        return {"processes": processes, "heartbeat_seconds": heartbeat, **json.loads(out.splitlines()[-1])}
    finally:
        for program in programs:
            program.kill()
            program.communicate()


def play(processes: int, port: int, heartbeat: float) -> None:
    from mae_jax.runtime.rendezvous import allow_descriptors

    allow_descriptors(processes)
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(600):  # until process 0 listens
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.05)
    Players(range(REAL, processes), port, heartbeat).run()


def table(lines: list[dict[str, Any]]) -> str:
    """Returns the results in Markdown."""
    columns = {
        "processes": lambda line: str(line["processes"]),
        "start, s": lambda line: f"{line['start_seconds']:.1f}",
        "of process 0's processor time, s": lambda line: f"{line['start_cpu_seconds']:.1f}",
        "idle, share of a core": lambda line: f"{100 * line['idle_share']:.2f} %",
        "with JAX's threads": lambda line: f"{100 * line['idle_share_of_all_threads']:.2f} %",
        "memory, MiB": lambda line: f"{line['mib_at_the_end']:.0f}",
        "broadcast of 200 steps, s": lambda line: f"{line['broadcast_seconds'] / ROUNDS:.3f}",
        "processor time, s": lambda line: f"{line['broadcast_cpu_seconds'] / ROUNDS:.3f}",
        "whether one failed, s": lambda line: f"{line['first_seconds'] / ROUNDS:.3f}",
    }
    rows = [columns, ["---"] * len(columns), *([show(line) for show in columns.values()] for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="4,512,1024,2048,4096")
    parser.add_argument("--idle", type=float, default=50, help="seconds; half a heartbeat has a sign of life of each")
    parser.add_argument("--heartbeat", type=float, default=100)
    parser.add_argument("--to", type=Path, default=RESULTS)
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role == "players":
        play(int(given.processes), given.port, given.heartbeat)
    elif given.role:
        sys.exit(real(int(given.role), int(given.processes), given.port, given.idle, given.heartbeat))
    else:
        lines = []
        for count in map(int, given.processes.split(",")):
            lines.append(measured(count, given.idle, given.heartbeat))
            print(lines[-1], flush=True)
        (given.to / "link.json").write_text(json.dumps({"cores": os.cpu_count(), "lines": lines}, indent=1) + "\n")
        (given.to / "link.md").write_text(table(lines))
