"""Shared code of the studies: stored cells, learning rates chosen on a validation part, figures by seed."""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mae_jax.runtime.discovery import has_accelerator
from mae_jax.runtime.memory import keep_freed

Cell = dict[str, Any]


def read(file: Path) -> list[Cell]:
    """Returns the cells that are done, one JSON line each."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def matches(cell: Cell, what: Cell) -> bool:
    """Says whether a cell has all values of `what`."""
    return all(cell.get(key) == value for key, value in what.items())


def of_seeds(cells: Iterable[Cell], seeds: Iterable[int]) -> list[Cell]:
    """Returns the cells of some seeds, so that a check looks at the same ones after an interruption."""
    wanted = set(seeds)
    return [cell for cell in cells if cell["seed"] in wanted]


def go_on(file: Path, cells: list[Cell], stages: Iterable[list[Cell]], run: Callable[[Cell], Cell],
          after: Callable[[], None], workers: int = 1) -> None:
    """Runs the cells that are not done, appends each to the file and to `cells`, and calls `after`.

    The cells of a stage need nothing of one another and may run at the same time, `workers` of them, which then share
    the device: such a study must not take times from them. Each has its own part of the cores where it can be set.
    """
    if workers > 1:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        context = multiprocessing.get_context("spawn")
        numbers = context.SimpleQueue()
        for number in range(workers):
            numbers.put(number)
        with ProcessPoolExecutor(workers, context, pin, (numbers, workers)) as pool:
            def run_all(todo: list[Cell]) -> Iterator[Cell]:
                """Yields all that succeed before it raises what did not."""
                failed, submitted = [], {pool.submit(run, cell): cell for cell in todo}
                for future in as_completed(submitted):
                    if error := future.exception():
                        print(f"{submitted[future]}: {error!r}", file=sys.stderr, flush=True)
                        failed.append(error)
                    else:
                        yield future.result()
                if failed:
                    raise failed[0]

            try:
                _go_on(file, cells, stages, run_all, after)
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what waits is not begun
                raise
    else:
        _go_on(file, cells, stages, lambda todo: map(run, todo), after)


def pin(numbers: "multiprocessing.SimpleQueue[int]", workers: int) -> None:
    """Gives this process every `workers`-th core, before JAX makes as many threads as it sees cores.

    It keeps what it frees, as commands do.
    """
    if not has_accelerator(os.environ):
        keep_freed(os.environ)
    number = numbers.get()
    if hasattr(os, "sched_setaffinity") and (mine := sorted(os.sched_getaffinity(0))[number::workers]):
        os.sched_setaffinity(0, mine)


def _go_on(file: Path, cells: list[Cell], stages: Iterable[list[Cell]],
           run_all: Callable[[list[Cell]], Iterable[Cell]], after: Callable[[], None]) -> None:
    for stage in stages:
        for done in run_all(missing(stage, cells)):
            cells.append(done)
            with open(file, "a") as opened:
                opened.write(json.dumps(done) + "\n")
            after()


def missing(stage: list[Cell], cells: list[Cell]) -> list[Cell]:
    """Returns the cells of a stage that are not done. A pilot, of another `kind`, has not done a cell without one."""
    return [cell for cell in stage if not any(matches(done, {"kind": None} | cell) for done in cells)]


def limited(stages: Iterable[list[Cell]], cells: list[Cell], count: int = 0, hours: float = 0.0,
            at_once: int = 1) -> Iterator[list[Cell]]:
    """Yields stages, cut into parts of `at_once` cells, until `count` are done or `hours` have passed; 0: no limit.

    What is begun is ended. Without a limit, stages are whole: a worker need not wait for the slower ones of its part.
    """
    if not count and not hours:
        yield from stages
        return
    begun, there = time.monotonic(), len(cells)
    for stage in stages:
        todo = missing(stage, cells)
        for first in range(0, len(todo), at_once):
            if (count and len(cells) - there >= count) or (hours and time.monotonic() - begun >= hours * 3600):
                print("A limit is reached; the same command goes on.", file=sys.stderr)
                return
            yield todo[first:first + at_once]


def chosen(cells: list[Cell], **what: Any) -> float:
    """Returns the rate of the best validation accuracy among the cells with seed 0; the lower one of two."""
    tried = [cell for cell in cells if matches(cell, {"seed": 0} | what)]
    return max(tried, key=lambda cell: (cell["val"], -cell["lr"]))["lr"]


def by_seed(cells: Iterable[Cell], key: str) -> dict[int, float]:
    """Returns seed → figure of an arm's cells, in the order of seeds; what `verdicts.judge` pairs."""
    return {cell["seed"]: cell[key] for cell in sorted(cells, key=lambda cell: cell["seed"])}


def mean_gain(higher: dict[int, float], lower: dict[int, float]) -> float:
    """Returns the mean difference of the seeds that both arms have; 0 without any."""
    return statistics.mean([higher[seed] - lower[seed] for seed in higher.keys() & lower.keys()] or [0.0])


def text(values: list[float], digits: int = 3) -> str:
    """Returns 'mean (least to most)', '-' for none."""
    if not values:
        return "-"
    mean, low, high = (f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def save(file: Path, arrays: dict[str, Any]) -> None:
    """Writes an npz that is whole or not there."""
    import numpy as np

    part = file.with_name(f"part_{file.name}")
    np.savez_compressed(part, **arrays)
    part.replace(file)


def positive(text: str) -> int:
    """Reads a whole number above 0, for argparse."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def trained(config: ConfigDict, folder: Path | None, work: Path) -> dict[str, float]:
    """Trains in a folder, or in one that is deleted. Returns the last value of each metric.

    Compiled programs are kept under `work`.
    """
    from mae_jax.training import loop  # imports JAX, which some studies leave to other processes

    programs = work / "programs"
    programs.mkdir(exist_ok=True)
    with config.unlocked():
        config.train.compilation_cache = str(programs)
    with tempfile.TemporaryDirectory(dir=work) as other:
        if loop.train(config, str(folder or other), alone=False):
            raise SystemExit(f"{folder or config.method.name} did not finish")
        return last_values(folder or Path(other))


def last_values(folder: Path) -> dict[str, float]:
    """Returns the last value of every metric of a workdir."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: value for line in lines for name, value in line.items()}


def first_values(folder: Path) -> dict[str, float]:
    """Returns the first value of every metric of a workdir: of evaluations, that of the untrained encoder."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: value for line in reversed(lines) for name, value in line.items()}


def speed(folder: Path) -> float:
    """Returns the median images per second of a workdir's log."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["train/images_per_sec"] for line in lines if "train/images_per_sec" in line)


def png(figure: Any) -> bytes:
    """Returns a matplotlib figure as a PNG, drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()
