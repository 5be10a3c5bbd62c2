"""Segmentation at the original size of images: windows are run on the devices and merged on the host; mIoU."""

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

FEWEST = 4  # minimum number of patches along a side of a whole image: UperNet halves maps up to twice


class OwnSize(Evaluation):
    """mIoU, mean class accuracy and pixel accuracy (mmsegmentation's mIoU, mAcc, aAcc) at the size of the annotations.
    """

    name = "segmentation_own_size"
    of_crops = False

    def applies(self, method: Method, data: Any) -> bool:
        if method.task != "segmentation" or method.test == "none":
            return False
        config = method.config
        for split in filter(None, (config.data.eval_split, config.data.val_split)):
            if not isinstance(data.parts.get(split), Source):
                raise UserError(f"method.test={method.test!r} needs random access, which "
                                f"data.source={config.data.source!r} does not have here; use method.test=none, or "
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
    """Returns the numbers of the examples that this process evaluates: every process_count-th of the evaluated ones."""
    numbers = subset(size, config.eval.max_examples, computed=recipe_version.has(config, "computed_order"))
    return numbers[jax.process_index()::jax.process_count()]


def confusion(mask: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Returns the confusion matrix int64 [C, C], true classes as rows, of two uint8 [height, width].

    Pixels whose true value is not below C do not count.
    """
    known = mask < classes
    pairs = mask[known].astype(np.int64) * classes + predicted[known]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def summed(counts: np.ndarray) -> np.ndarray:
    """Returns the sum of the counts of all processes, on every process."""
    told = peers.gather(counts.tolist())
    return np.array(peers.broadcast(sum(np.array(each, np.int64) for each in told).tolist()), np.int64)


def figures(counts: np.ndarray) -> dict[str, float]:
    """Returns 'miou', 'mean_accuracy' and 'pixel_accuracy' in 0..1 of a confusion matrix [C, C]; NaN without counts.

    The mean IoU is over the classes that occur in truth or prediction, the mean accuracy over those in truth.
    """
    there = counts.sum(1)
    accuracies = np.diag(counts)[there > 0] / there[there > 0]
    ious = iou(counts)
    ious = ious[~np.isnan(ious)]
    return {"miou": float(ious.sum() / (len(ious) or np.nan)),
            "mean_accuracy": float(accuracies.sum() / (len(accuracies) or np.nan)),
            "pixel_accuracy": float(np.trace(counts) / (there.sum() or np.nan))}


def named(counts: np.ndarray, config: Any) -> dict[str, float]:
    """Returns the metrics of `figures` with a prefix: 'own_size/', or 'multi_scale/' with several scales or flips."""
    plain = tuple(config.eval.scales) == (1.0,) and not config.eval.flip
    return {f"{'own_size' if plain else 'multi_scale'}/{name}": value for name, value in figures(counts).items()}


class Predicted(NamedTuple):
    """The prediction for one image.

    Attributes:
      number: number of the example.
      classes: predicted class of each pixel, uint8 [height, width] at the original size; None if the image is
        unreadable.
      mask: true class of each pixel, uint8 [height, width]; None without an annotation.
      error: why the image is unreadable; '' if it is readable.
    """

    number: int
    classes: np.ndarray | None = None
    mask: np.ndarray | None = None
    error: str = ""


class Opened(NamedTuple):
    """A decoded image on the host.

    Attributes:
      number: number of the example.
      image: the image, with the EXIF orientation applied.
      mask: true classes uint8 [height, width], in the same orientation; None without an annotation.
      views: the views (scales and flips) that are evaluated.
    """

    number: int
    image: Image.Image
    mask: np.ndarray | None
    views: tuple[windows.View, ...]


def views_of(method: Any, size: tuple[int, int]) -> tuple[windows.View, ...]:
    """Returns the views of an image of a size (height, width), by method.test, eval.scales and eval.flip."""
    own, model, asked = method.grid, method.grid.image_size, method.config.eval
    layouts = [windows.whole(size, model, own.patch, FEWEST, scale) if method.test == "whole" else
               windows.sliding(size, model, method.stride, scale) for scale in asked.scales]
    return tuple(windows.View(layout, flipped) for layout in layouts for flipped in (False, True)[:1 + asked.flip])


def predictions(method: Any, params: Any, extras: Any, mesh: Mesh, source: Source, numbers: np.ndarray,
                reading: Reading) -> Iterator[Predicted]:
    """Yields the predictions for examples, in the order of `numbers`.

    Every process calls it, each with its own numbers, possibly of different counts. All processes run the same batches;
    a batch has windows of one shape, and may have unused rows.

    Args:
      method, params, extras: a segmentation method and its state.
      mesh: the devices.
      source: the part of the data.
      numbers: int [n], numbers of the examples of this process.
      reading: how images are decoded.
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
        if more := waiting.someone_waits():  # a collective: once per iteration on every process
            done |= {found.number: found for found in waiting.run(params, extras)}
        while order and order[0] in done:
            yield done.pop(order.popleft())


class Waiting:
    """Queues of this process's windows by shape, and the logits of images whose windows have not all been run."""

    def __init__(self, method: Any, mesh: Mesh):
        self.method, self.mesh, self.size = method, mesh, method.config.batch_size
        self.rows = len(local_rows(mesh, self.size))
        self.queues: dict[tuple[int, int], deque[tuple[Opened, tuple[int, int], np.ndarray]]] = {}
        self.found: dict[int, dict[tuple[int, int], np.ndarray]] = {}  # example → (view, window) → logits

    @property
    def full(self) -> bool:
        """Whether a queue fills this process's rows of a batch."""
        return any(len(queue) >= self.rows for queue in self.queues.values())

    def add(self, opened: Opened) -> None:
        for number, view in enumerate(opened.views):
            queue = self.queues.setdefault(view.layout.shape, deque())
            queue.extend((opened, (number, place), window) for place, window in enumerate(view.cut(opened.image)))

    def someone_waits(self) -> bool:
        """Returns whether any process has queued windows; a collective, called on every process."""
        return bool(peers.first_true(any(self.queues.values())))

    def run(self, params: Any, extras: Any) -> Iterator[Predicted]:
        """Runs one batch and yields the predictions for images whose windows are now complete."""
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
                of_views = [np.stack([there[number, n] for n in range(len(view.layout))])
                            for number, view in enumerate(opened.views)]
                yield Predicted(opened.number, windows.predicted(opened.views, of_views), opened.mask)


@functools.lru_cache(maxsize=64)
def _program(method: Any, mesh: Mesh, grid: tuple[int, int]) -> Callable[..., jax.Array]:
    """Returns the compiled `cell_logits` for a grid, sharded by rows and cached across evaluations."""
    return jax.jit(functools.partial(method.cell_logits, grid=grid), out_shardings=batch_sharding(mesh))


def _local(array: jax.Array) -> np.ndarray:
    """Returns the rows of a global array on this process's devices, float32, ascending and without duplicates."""
    parts = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start].data, np.float32) for start in sorted(parts)])


def _read_ahead(method: Any, source: Source, numbers: np.ndarray, reading: Reading) -> Iterator[Opened | Predicted]:
    """Yields examples in order; threads decode up to two examples per thread in advance."""
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
    """Returns a decoded example, or a `Predicted` with the error for an unreadable one."""
    try:
        example = source.read(number)
        stored = StoredImage(example.image, reading=reading)
        mask = mask_image(stored, example.mask)
        views = views_of(method, (stored.height, stored.width))
        return Opened(number, stored.whole(), None if mask is None else np.asarray(mask), views)
    except (BadImage, OSError) as error:
        return Predicted(number, error=str(error))
