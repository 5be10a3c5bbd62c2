"""Segmentation at the images' own size: windows through the devices, put together on the host, and mIoU."""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from mae_jax import recipe_version
from mae_jax.data.decode import BadImage, StoredImage
from mae_jax.data.readers.random_access import subset, threads
from mae_jax.data.reading import Reading
from mae_jax.data.sources.base import Source
from mae_jax.data.transforms.crop import mask_image
from mae_jax.errors import UserError
from mae_jax.evals import windows
from mae_jax.evals.base import Evaluation
from mae_jax.evals.context import Context
from mae_jax.evals.segmentation import iou
from mae_jax.methods.base import Method
from mae_jax.ops.patches import PatchGrid
from mae_jax.runtime import peers, progress, watchdog
from mae_jax.runtime.sharding import batch_sharding, local_rows, to_devices

FEWEST = 4  # patches along a side of a whole image: UperNet halves maps up to twice


class OwnSize(Evaluation):
    """mIoU, mean accuracy of the classes and accuracy of the pixels (mmsegmentation's mIoU, mAcc, aAcc), of all pixels
    of the part at the annotations' own size.
    """

    name = "segmentation_own_size"
    of_crops = False

    def applies(self, method: Method, data: Any) -> bool:
        if method.task != "segmentation" or method.test == "none":
            return False
        config = method.config
        for split in filter(None, (config.data.eval_split, config.data.val_split)):
            if not isinstance(data.parts.get(split), Source):
                raise UserError(f"method.test={method.test!r} asks for images by their numbers, which "
                                f"data.source={config.data.source!r} does not give here; use method.test=none, or "
                                "folders, Parquet, tars, or TFDS stored as array_record")
        return True

    def metric_names(self, method: Method, data: Any) -> list[str]:
        return list(named(np.zeros((1, 1), np.int64), method.config))

    def scalars(self, ctx: Context) -> dict[str, float]:
        data = ctx.method.config.data
        source = ctx.data.parts.get(data.val_split if ctx.part == "val" else data.eval_split)
        if source is None:
            return {}
        counts = np.zeros((ctx.method.classes,) * 2, np.int64)
        numbers = own_numbers(ctx.method.config, source.size)
        for found in predictions(ctx.method, ctx.params, ctx.extras, ctx.mesh, source, numbers, Reading.of(data)):
            if found.error:
                ctx.data.bad.append(f"{source.name(found.number)}: {found.error}")
            elif found.mask is not None:
                progress.advance(jax.process_count())
                counts += confusion(found.mask, found.classes, ctx.method.classes)
        return named(summed(counts), ctx.method.config)


def own_numbers(config: Any, size: int) -> np.ndarray:
    """Returns the numbers of the examples that this process evaluates: of those that all do, every so many-th."""
    numbers = subset(size, config.eval.max_examples, computed=recipe_version.has(config, "computed_order"))
    return numbers[jax.process_index()::jax.process_count()]


def confusion(mask: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts pixels by true class (down) and predicted class, int64 [C, C]; true ones that are no class do not count.
    """
    known = mask < classes
    pairs = mask[known].astype(np.int64) * classes + predicted[known]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def summed(counts: np.ndarray) -> np.ndarray:
    """Returns the sum of what all processes counted, on all of them."""
    told = peers.gather(counts.tolist())
    return np.array(peers.broadcast(sum(np.array(each, np.int64) for each in told).tolist()), np.int64)


def figures(counts: np.ndarray) -> dict[str, float]:
    """Returns 'miou', 'mean_accuracy' and 'pixel_accuracy' in 0..1 of confusions [C, C]; NaN where nothing was counted.

    The means are over the classes that occur: of IoU in truth or prediction, of accuracy in truth.
    """
    there = counts.sum(1)
    accuracies = np.diag(counts)[there > 0] / there[there > 0]
    ious = iou(counts)
    ious = ious[~np.isnan(ious)]
    return {"miou": float(ious.sum() / (len(ious) or np.nan)),
            "mean_accuracy": float(accuracies.sum() / (len(accuracies) or np.nan)),
            "pixel_accuracy": float(np.trace(counts) / (there.sum() or np.nan))}


def named(counts: np.ndarray, config: Any) -> dict[str, float]:
    """Returns the figures by the names that the evaluation gives them: others where images are not seen once as they
    are, which is another protocol.
    """
    plain = tuple(config.eval.scales) == (1.0,) and not config.eval.flip
    return {f"{'own_size' if plain else 'multi_scale'}/{name}": value for name, value in figures(counts).items()}


class Predicted(NamedTuple):
    """What is said of an image.

    Attributes:
      number: of the example.
      classes: of each pixel, uint8 [height, width] in its own size; None where it cannot be read.
      mask: the true ones, likewise; None where they are not known.
      error: why it cannot be read; '' where it can.
    """

    number: int
    classes: np.ndarray | None = None
    mask: np.ndarray | None = None
    error: str = ""


class Opened(NamedTuple):
    """An image on the host.

    Attributes:
      number: of the example.
      image, mask: upright; the mask, uint8, is None where there is none.
      views: as which it is seen.
    """

    number: int
    image: Image.Image
    mask: np.ndarray | None
    views: tuple[windows.View, ...]


def views_of(method: Any, size: tuple[int, int]) -> tuple[windows.View, ...]:
    """Returns as what an image of a size (height, width) is seen, by method.test, eval.scales and eval.flip."""
    own, model, asked = method.grid, method.grid.image_size, method.config.eval
    layouts = [windows.whole(size, model, own.patch, FEWEST, scale) if method.test == "whole" else
               windows.sliding(size, model, method.stride, scale) for scale in asked.scales]
    return tuple(windows.View(layout, flipped) for layout in layouts for flipped in (False, True)[:1 + asked.flip])


def predictions(method: Any, params: Any, extras: Any, mesh: Mesh, source: Source, numbers: np.ndarray,
                reading: Reading) -> Iterator[Predicted]:
    """Yields what is said of the examples of these numbers, in their order.

    All processes go along, each with numbers of its own, more or fewer; every batch is of one shape of windows, on
    which they agree, and rows may be left over in it.
    """
    waiting, images = Waiting(method, mesh), _read_ahead(method, source, numbers, reading)
    done: dict[int, Predicted] = {}
    order = deque(numbers.tolist())
    more = True
    while more:
        while not waiting.full and (opened := next(images, None)) is not None:
            if isinstance(opened, Predicted):
                done[opened.number] = opened
            else:
                waiting.add(opened)
        if more := waiting.someone_waits():  # once a turn, in all processes
            done |= {found.number: found for found in waiting.run(params, extras)}
        while order and order[0] in done:
            yield done.pop(order.popleft())


class Waiting:
    """Windows of this process that wait for a batch of their shape, and the logits of images that are not complete."""

    def __init__(self, method: Any, mesh: Mesh):
        self.method, self.mesh, self.size = method, mesh, method.config.batch_size
        self.rows = len(local_rows(mesh, self.size))
        self.queues: dict[tuple[int, int], deque[tuple[Opened, tuple[int, int], np.ndarray]]] = {}
        self.found: dict[int, dict[tuple[int, int], np.ndarray]] = {}  # by the view and the window

    @property
    def full(self) -> bool:
        """Whether this process's rows of a batch are full."""
        return any(len(queue) >= self.rows for queue in self.queues.values())

    def add(self, opened: Opened) -> None:
        for number, view in enumerate(opened.views):
            queue = self.queues.setdefault(view.layout.shape, deque())
            queue.extend((opened, (number, place), window) for place, window in enumerate(view.cut(opened.image)))

    def someone_waits(self) -> bool:
        """Whether windows wait in any process; all of them ask alike."""
        return bool(peers.first_true(any(self.queues.values())))

    def run(self, params: Any, extras: Any) -> Iterator[Predicted]:
        """Runs a batch, and yields the images that are complete with it."""
        longest = max(self.queues, key=lambda shape: len(self.queues[shape]), default=(0, 0))
        shape: tuple[int, int] = tuple(peers.first_true(list(longest) if self.queues.get(longest) else []))
        queue = self.queues.setdefault(shape, deque())
        taken = [queue.popleft() for _ in range(min(self.rows, len(queue)))]
        grid = PatchGrid(shape[0] // self.method.grid.patch_height, shape[1] // self.method.grid.patch_width,
                         *self.method.grid.patch)
        patches = np.zeros((self.rows, grid.num_patches, grid.patch_dim), np.uint8)
        for row, (_, _, window) in enumerate(taken):
            patches[row] = grid.patchify(window)
        order = np.broadcast_to(np.arange(grid.num_patches, dtype=np.int32), patches.shape[:2])
        batch = to_devices({"patches": patches, "order": order}, self.mesh, self.size)
        logits = _local(_program(self.method, self.mesh, grid.shape)(params, extras, batch))
        watchdog.heartbeat()
        for (opened, place, _), cells in zip(taken, logits[:len(taken)], strict=True):
            there = self.found.setdefault(opened.number, {})
            there[place] = cells
            if len(there) == sum(len(view.layout) for view in opened.views):
                del self.found[opened.number]
                logits = [np.stack([there[number, n] for n in range(len(view.layout))])
                          for number, view in enumerate(opened.views)]
                yield Predicted(opened.number, windows.predicted(opened.views, logits), opened.mask)


@functools.lru_cache(maxsize=64)
def _program(method: Any, mesh: Mesh, grid: tuple[int, int]) -> Callable[..., jax.Array]:
    """Returns the compiled function to logits of cells, each device's rows its own; kept likewise."""
    return jax.jit(functools.partial(method.cell_logits, grid=grid), out_shardings=batch_sharding(mesh))


def _local(array: jax.Array) -> np.ndarray:
    """Returns the rows that this process's devices hold, ascending, each once."""
    parts = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start].data, np.float32) for start in sorted(parts)])


def _read_ahead(method: Any, source: Source, numbers: np.ndarray, reading: Reading) -> Iterator[Opened | Predicted]:
    """Yields examples in order, decoded by threads that are a few ahead."""
    count = threads(method.config.data)
    with ThreadPoolExecutor(count, "own-size") as pool:
        ahead: deque[Future[Opened | Predicted]] = deque()
        left = iter(numbers.tolist())
        while True:
            while len(ahead) < 2 * count and (number := next(left, None)) is not None:
                ahead.append(pool.submit(_open, method, source, number, reading))
            if not ahead:
                return
            yield ahead.popleft().result()


def _open(method: Any, source: Source, number: int, reading: Reading) -> Opened | Predicted:
    """Returns an example, or why it cannot be read."""
    try:
        example = source.read(number)
        stored = StoredImage(example.image, reading=reading)
        mask = mask_image(stored, example.mask)
        views = views_of(method, (stored.height, stored.width))
        return Opened(number, stored.whole(), None if mask is None else np.asarray(mask), views)
    except (BadImage, OSError) as error:
        return Predicted(number, error=str(error))
