"""The flags of the commands that several processes run as one, and what such a command does with them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from mae_jax.runtime.discovery import ProcessInfo, find

COORDINATOR = flags.DEFINE_string("coordinator", "auto", "HOST:PORT of process 0; off: one process; auto: several "
                                  "under srun and on TPU VMs of more than one host, else one")
PROCESSES = flags.DEFINE_integer("processes", -1, "how many processes, with --coordinator=HOST:PORT")
PROCESS = flags.DEFINE_integer("process", -1, "the number of this one, from 0, with --coordinator=HOST:PORT")
START_SECONDS = flags.DEFINE_float("start_seconds", 300, "how long to wait for all processes", lower_bound=1,
                                   upper_bound=86_400)
HEARTBEAT = flags.DEFINE_float("heartbeat_seconds", 100, "a process that is silent for so long is lost, and all end",
                               lower_bound=1, upper_bound=86_400)


@functools.cache
def here() -> ProcessInfo | None:
    """Returns this process's place, None where it runs alone; raises UserError for flags that do not fit together."""
    return find(COORDINATOR.value, PROCESSES.value, PROCESS.value)


def run(command: Callable[[], int], same: Mapping[str, Any], config: ConfigDict | None) -> int:
    """Runs the command alone or as one of several. Returns the exit code.

    Args:
      command: returns the exit code.
      same: what all processes must have been started with, by the name of the flag.
      config: --config, likewise.
    """
    place = here()
    if place is None:
        return command()
    from mae_jax.param_tree import flat
    from mae_jax.runtime.peers import launch

    fields = {f"--config.{name}": value for name, value in flat(config).items()} if config is not None else {}
    same = {"--processes": place.num_processes, "--heartbeat_seconds": HEARTBEAT.value, **same, **fields}
    return launch(command, place, same, START_SECONDS.value, HEARTBEAT.value)
