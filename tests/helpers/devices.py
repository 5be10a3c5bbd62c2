"""The environment of processes that tests start with simulated devices."""

import os


def simulated(count: int) -> dict[str, str]:
    """Returns the environment of a process that has so many devices, and compiles as this one does."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
