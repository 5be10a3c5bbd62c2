"""The flags of commands that run as several processes, and the start of such a command."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from mae_jax.runtime.discovery import ProcessInfo, find

COORDINATOR = flags.DEFINE_string("coordinator", "auto", "HOST:PORT of process 0; off: one process; auto: several "
                                  "under srun and on TPU VMs of more than one host, else one")
PROCESSES = flags.DEFINE_integer("processes", -1, "number of processes, with --coordinator=HOST:PORT")
PROCESS = flags.DEFINE_integer("process", -1, "index of this process, from 0, with --coordinator=HOST:PORT")
START_SECONDS = flags.DEFINE_float("start_seconds", 300, "how long to wait for all processes", lower_bound=1,
                                   upper_bound=86_400)
HEARTBEAT = flags.DEFINE_float("heartbeat_seconds", 100, "a process that sends nothing for so long counts as lost, and "
                               "all processes end", lower_bound=1, upper_bound=86_400)


@functools.cache
def here() -> ProcessInfo | None:
    """Returns this process among several by the flags, or None for a single process; see `discovery.find`."""
    return find(COORDINATOR.value, PROCESSES.value, PROCESS.value)


def run(command: Callable[[], int], same: Mapping[str, Any], config: ConfigDict | None) -> int:
    """Runs a command as a single process or as one of several, and returns its exit code.

    Args:
      command: returns the exit code.
      same: flags by name, with their values, which must be equal on all processes.
      config: the config, which must be equal on all processes too; None: the command has none.
    """
    place = here()
    if place is None:
        return command()
    from mae_jax.param_tree import flat
    from mae_jax.runtime.peers import launch

    fields = {f"--config.{name}": value for name, value in flat(config).items()} if config is not None else {}
    same = {"--processes": place.num_processes, "--heartbeat_seconds": HEARTBEAT.value, **same, **fields}
    return launch(command, place, same, START_SECONDS.value, HEARTBEAT.value)
