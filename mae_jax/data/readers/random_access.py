"""Batches from sources with random access: a pure function of the position, computed by threads or worker processes."""

import dataclasses
import functools
import itertools
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict

from mae_jax import recipe_version
from mae_jax.data.decode import BadImage
from mae_jax.data.readers import process_pool, thread_pool
from mae_jax.data.readers.makers import Batch, ExampleMaker
from mae_jax.data.sources.base import Source
from mae_jax.data.transforms.example import ExampleBuilder, Fields, Spec
from mae_jax.data.transforms.graph_builder import GraphBuilder
from mae_jax.errors import UserError
from mae_jax.rng import example_at, permutation, rng

log = logging.getLogger(__name__)
TRIES = 4  # images tried for a position before a gray stand-in: the drawn one and three more
FEW = 5000  # images below which the start of worker processes does not pay; our choice
MOST_WORKERS = 32  # largest number with data.workers=auto
SUBSET = 2**55  # epoch number, above any real one, whose order evaluations take the first examples of
PADDING = -1  # id of the padding rows in the last batch of an evaluation


def draw(position: int, batch: int, repeats: int) -> int:
    """Returns the index, among all draws of a run, that the row at a position of the run shows.

    With R repeats, a batch of B rows shows D = ceil(B / R) examples: row r the example r % D. Copies lie D rows apart,
    so that no D neighboring rows show an example twice. (Hoffer et al. 2020 also put the copies of an example in one
    batch; DeiT's sampler shows only 1/R of the examples in each of its epochs.)
    """
    step, row = divmod(position, batch)
    distinct = -(-batch // repeats)
    return step * distinct + row % distinct


def train_example(source: Source, builder: ExampleBuilder, config: ConfigDict, bad: deque[str],
                  position: int) -> Fields:
    """Returns all fields of the example at a position of the run.

    Every epoch visits each example once, in its own order; batches straddle epochs. A bad image is replaced by the next
    allowed one in the epoch's order (`_candidates`). With data.repeats = R, a pass over the data takes as many rows as
    R epochs of the config's durations, and shows each example R times, in different views.
    """
    candidates = _candidates(source.size, builder.group, config, position, source.drawn)
    for tries, index in enumerate(itertools.islice(candidates, TRIES)):
        try:
            fields = builder.train(source.read(index), position)
            return {**fields, "id": index, "valid": 1.0, "replaced": tries}
        except (BadImage, OSError) as error:
            bad.append(f"{source.name(index)}: {error}")
    return {**builder.gray_train(position), "id": index, "replaced": TRIES}


def train_examples(source: Source, builder: GraphBuilder, config: ConfigDict, bad: deque[str],
                   positions: Sequence[int]) -> list[Fields]:
    """Returns the result of `train_example` for each position; the examples are made together."""
    made: dict[int, Fields] = {}
    left = {position: enumerate(itertools.islice(
        _candidates(source.size, builder.group, config, position, source.drawn), TRIES)) for position in positions}
    last: dict[int, int] = {}
    while left:
        taken = []
        for position, candidates in list(left.items()):
            for tries, index in candidates:
                last[position] = index
                try:
                    taken.append((position, tries, index, source.read(index)))
                    break
                except (BadImage, OSError) as error:
                    bad.append(f"{source.name(index)}: {error}")
            else:
                made[position] = {**builder.gray_train(position), "id": last[position], "replaced": TRIES}
                del left[position]
        results = builder.train_many([(example, position) for position, _, _, example in taken])
        for (position, tries, index, _), result in zip(taken, results, strict=True):
            if isinstance(result, BadImage):
                bad.append(f"{source.name(index)}: {result}")
            else:
                made[position] = {**result, "id": index, "valid": 1.0, "replaced": tries}
                del left[position]
    return [made[position] for position in positions]


def _candidates(size: int, group: int, config: ConfigDict, position: int,
                other: Callable[[int, int], int] | None = None) -> Iterator[int]:
    """Yields the index of the example drawn for a position, then those of its possible replacements.

    If groups of neighboring rows are mixed, the replacements come from the same place in the next groups, without the
    examples of the row's own group, so that none is mixed with itself. (A group that straddles two epochs may show an
    image twice.)
    """
    computed = recipe_version.has(config, "computed_order")

    def drawn(position: int, ahead: int = 0) -> int:
        number = draw(position, config.batch_size, config.data.repeats)
        if other:  # a mixture
            return other(config.seed, number + ahead)
        epoch, place = divmod(number, size)
        place = (place + ahead) % size
        return example_at(config.seed, epoch, size, place) if computed else int(
            permutation(config.seed, epoch, size)[place])

    yield drawn(position)
    first = position // group * group
    shown = {drawn(member) for member in range(first, first + group)}
    for tries in range(1, size):
        if (index := drawn(position, tries * group)) not in shown:
            shown.add(index)
            yield index


def evaluate_example(source: Source, builder: ExampleBuilder, indices: np.ndarray, ratio: float, bad: deque[str],
                     position: int) -> Fields:
    """Returns all fields of the example at a position of an evaluation; padding past the end."""
    gray = builder.gray(position)
    if position >= len(indices):
        return {**gray, "id": PADDING, "replaced": 0}
    index = int(indices[position])
    try:
        fields = builder.evaluate(source.read(index), index, position, ratio)
        return {**fields, "id": index, "valid": 1.0, "replaced": 0}
    except (BadImage, OSError) as error:
        bad.append(f"{source.name(index)}: {error}")
        return {**gray, "id": index, "replaced": 1}


def subset(size: int, most: int, group: int = 1, computed: bool = True) -> np.ndarray:
    """Returns the indices of the examples that an evaluation reads, int64 [min(size, most)].

    They are all examples, or a random subset that is the same in every run, sorted. If neighboring rows are mixed, they
    are shuffled instead: files often lie in the order of their classes. With `computed` False, the subset is drawn as
    in runs of earlier versions.
    """
    if size <= most and group == 1:
        return np.arange(size)
    if computed:
        chosen = example_at(0, SUBSET, size, np.arange(min(most, size), dtype=np.uint64)).astype(np.int64)
    else:
        chosen = rng(0, "subset", 0).permutation(size)[:most]
    return np.sort(chosen) if group == 1 else chosen


def train(source: Source, step: int, builder: ExampleBuilder, config: ConfigDict, spec: Spec, rows: np.ndarray,
          bad: deque[str]) -> Iterator[Batch]:
    """Yields these rows of the batches step, step + 1, ... without end."""
    given = (_unlabeled(source), builder, config)
    example, together = functools.partial(train_example, *given), None
    if isinstance(builder, GraphBuilder):
        builder.look_at(source)
        together = functools.partial(train_examples, *given)

    def name(position: int) -> str:
        return source.name(next(_candidates(source.size, builder.group, config, position)))

    steps = range(step, sys.maxsize // config.batch_size)
    return batches(example, spec, rows, steps, config, bad, source.size, name, together)


def evaluate(source: Source, ratio: float, builder: ExampleBuilder, config: ConfigDict, spec: Spec, rows: np.ndarray,
             bad: deque[str]) -> Iterator[Batch]:
    """Yields these rows of at most eval.max_examples examples, the central `ratio` of each, padded to full batches."""
    indices = subset(source.size, config.eval.max_examples, builder.group,
                     recipe_version.has(config, "computed_order"))
    example = functools.partial(evaluate_example, _unlabeled(source), builder, indices, ratio)

    def name(position: int) -> str:
        return source.name(int(indices[position]))

    steps = range(-(-len(indices) // config.batch_size))
    return batches(example, spec, rows, steps, config, bad, len(indices), name)


def _unlabeled(source: Source) -> Source:
    """Returns the source without `label`, which worker processes do not need."""
    return dataclasses.replace(source, label=None)


def batches(example: Callable[[deque[str], int], Fields], spec: Spec, rows: np.ndarray, steps: range,
            config: ConfigDict, bad: deque[str], images: int, name: Callable[[int], str] = str,
            together: Callable[[deque[str], Sequence[int]], Sequence[Fields]] | None = None) -> Iterator[Batch]:
    """Yields these rows of the global batches of `steps`.

    Args:
      example: (list for names of bad images, position) → fields; called from many threads, or processes.
      spec: name → global shape and dtype of the fields.
      rows: global rows, each below the global batch size.
      steps: steps of the batches.
      config: the config.
      bad: receives the names of bad images.
      images: number of images; with data.workers=auto, threads make the examples of few images.
      name: position → name of an example that kills a worker process.
      together: `example` for several positions, if that is faster.

    Raises:
      UserError: memory is too small for data.workers, or the source cannot be sent to them.
    """
    data, size = config.data, next(iter(spec.values())).shape[0]
    maker = ExampleMaker(example, rows, size, steps.start, together)
    if processes := workers(data, images):
        try:
            return process_pool.batches(maker, spec, len(steps), processes, data.prefetch, config.plugins, bad,
                                        lambda number, row: name((steps.start + number) * size + int(rows[row])))
        except process_pool.NotPicklable as error:
            what = f"data.source={data.source!r} cannot be handed to worker processes ({error})"
            if data.workers != "auto":
                raise UserError(f"{what}; use data.workers=0") from None
            log.info("%s: threads make the examples", what)

    def fill(arrays: Batch, number: int, part: range) -> None:
        maker.fill(arrays, number, part, bad)

    all_rows = range(len(rows))
    parts = [part for _, part in maker.tasks(threads(data))] if together else maker.again(all_rows)
    return thread_pool.batches(fill, spec, parts, len(steps), threads(data), data.prefetch)


def workers(data: ConfigDict, images: int) -> int:
    """Returns the number of worker processes that make examples, 0 for threads of this process.

    Args:
      data: the config group `data`.
      images: number of images to make examples from.
    """
    if data.workers != "auto":
        return int(data.workers)
    count = min(threads(data), MOST_WORKERS)
    return count if count > 1 and images >= FEW else 0


def threads(data: ConfigDict) -> int:
    """Returns the number of host threads that make examples: data.threads, by default the cores of this process."""
    return data.threads or cores()


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
