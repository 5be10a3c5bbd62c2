"""The measurements of `bench`: the train step alone, the input alone, and both together."""

import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from mae_jax.runtime import progress
from mae_jax.runtime.memory import peak_memory

WARMUP = 3  # steps or batches before the measurement
GIB = 2**30


def measure(config: Any, parts: list[str], seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (part, figures) for each of `parts`, measured for about `seconds` each."""
    from mae_jax import config as configs
    from mae_jax import methods

    rows, needs_data = config.batch_size, bool({"input", "both"} & set(parts))
    opened = functools.cache(lambda: methods.with_data(configs.resolved(config)))
    step = functools.cache(lambda: TimedStep(config, opened()[1].info if needs_data else None))

    def batches() -> Iterator[Any]:
        method, data = opened()
        return data.batches(method.eval_spec(), method.patch_order(), method.views()).train(0)

    if "step" in parts:
        times = timed(lambda: step().run(step().batch), seconds)
        yield "step", step().figures(times)
    if "input" in parts:
        hosts = batches()
        times = timed(lambda: next(hosts), seconds)
        rate = rows * len(times) / sum(times)
        yield "input", {"images_per_sec": rate, "images_per_sec_per_core": rate / os.cpu_count(),
                        "host_memory_gib": peak_memory() / GIB}
    if "both" in parts:
        ready = step().prefetched(batches())
        times = timed(lambda: step().run(next(ready)), seconds)
        yield "both", {"images_per_sec": rows * len(times) / sum(times), "host_memory_gib": peak_memory() / GIB}


class TimedStep:
    """The jitted, donating train step of training, with a batch of random pixels on the device."""

    def __init__(self, config: Any, info: Any = None):
        """Initializes the state and compiles the step.

        Args:
          config: a valid config.
          info: the `data.DataInfo` for which the method is built; None: that of ImageNet-1K.
        """
        import jax

        from mae_jax.commands.bench import made_up
        from mae_jax.data import ASSUMED
        from mae_jax.runtime import sharding
        from mae_jax.training import throughput
        from mae_jax.training.train_step import build

        program = build(config, info or ASSUMED)
        self.config, self.mesh = config, program.mesh
        host = made_up.batch(program.method, program.batch)
        self.batch = sharding.to_devices(host, self.mesh, config.batch_size)
        with jax.set_mesh(self.mesh):
            self.state = program.init(self.batch)
            began = time.monotonic()
            with progress.doing("compiling the train step"):
                self.step = program.step.lower(self.state, self.batch).compile()
        self.compile_seconds = time.monotonic() - began
        self.flops_per_image = throughput.train_flops(program.method)
        self.peak = throughput.peak_flops(jax.devices()[0])

    def run(self, batch: Any) -> None:
        """Takes one step and blocks until it has finished."""
        import jax

        self.state, metrics = self.step(self.state, batch)
        jax.block_until_ready((self.state.step, metrics))

    def prefetched(self, batches: Iterator[Any]) -> Iterator[Any]:
        from mae_jax.runtime import sharding

        device = (sharding.to_devices(batch, self.mesh, self.config.batch_size) for batch in batches)
        ready = list(itertools.islice(device, self.config.data.prefetch))
        for batch in device:
            ready.append(batch)
            yield ready.pop(0)

    def figures(self, times: list[float]) -> dict[str, Any]:
        import jax

        seconds = statistics.median(times)
        rate = self.config.batch_size / seconds
        tflops = rate * self.flops_per_image / 1e12 / jax.device_count()
        stats = jax.devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use")
        return {
            "ms": seconds * 1e3, "ms_min": min(times) * 1e3, "steps": len(times), "images_per_sec": rate,
            "tflops_per_device": tflops, "mfu": tflops * 1e12 / self.peak if self.peak else None,
            "peak_tflops": self.peak / 1e12 if self.peak else None,
            "memory_gib": peak / GIB if peak else peak_memory() / GIB, "memory_of": "device" if peak else "process",
            "compile_seconds": self.compile_seconds,
        }


def timed(call: Callable[[], Any], seconds: float) -> list[float]:
    """Returns the durations of calls in seconds, after a warm-up; calls for about `seconds`, at least three times."""
    for _ in range(WARMUP):
        call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        began = time.monotonic()
        call()
        times.append(time.monotonic() - began)
    return times
