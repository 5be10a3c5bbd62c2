"""A trained encoder for inference: loading from runs, exports and other libraries, and compiled forward passes."""

import operator
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax import methods, param_tree
from mae_jax.config import default, resolved
from mae_jax.data import DataInfo
from mae_jax.data.transforms.example import ExampleBuilder
from mae_jax.errors import UserError, did_you_mean
from mae_jax.evals.frozen_encoder import frozen
from mae_jax.inference import foreign, forward
from mae_jax.inference.images import ImageLike, as_list, patches_of
from mae_jax.interop import layouts
from mae_jax.methods.base import Batch, Method, pool
from mae_jax.ops.patches import PatchGrid
from mae_jax.runtime import sharding
from mae_jax.storage import paths
from mae_jax.storage.checkpoint import load_params
from mae_jax.training import workdir

# pool: as in the run's config (model.pool); cls: the class token; mean: the mean of the patch tokens; patches: the map
# of patch tokens; tokens: all tokens, class token first.
FEATURES = ("pool", "cls", "mean", "patches", "tokens")
ROWS = {"cpu": 32}  # platform → default rows of a batch per device
ROWS_ELSEWHERE = 128
UNUSED = ("norm/scale", "norm/bias", "mask_token")  # optional parameters of an encoder


class Encoder:
    """An encoder of any method, with the image transform of its evaluations.

    Attributes:
      config: of the run that trained it, with 'auto' resolved and the batch size of inference.
      method: with its heads, if it has any.
      params, extras: on the devices.
      class_names: names of the head's classes; () without a head, or if they are unknown.
      classes: the same, but their indices as text if the names are unknown.
      step: of the checkpoint; -1 if unknown.
      source: where it was loaded from.
      of_run: whether the config is of a mae_jax run, and therefore names its data.
    """

    def __init__(self, config: ConfigDict, params: Any, extras: Any, mesh: Mesh, classes: Sequence[str] = (),
                 step: int = -1, source: str = "", of_run: bool = True):
        self.of_run = of_run
        self.config, self.mesh, self.step, self.source = config, mesh, step, source
        self.classes = _named(params, classes)
        several = bool(config.method.get("multi_label"))
        self.method = methods.build(config, DataInfo(0, self.classes, several))
        if self.method.extra_encode_fields:
            raise UserError(f"{source} is of method.name={config.method.name}, which has no single encoder; mae_jax "
                            "export --for-task=vote makes one")
        self.grid = PatchGrid.of(config)
        _check(self.method, params, source)
        self.class_names = self.classes if self.classes == tuple(classes) else ()
        self.params, self.extras = forward.placed((params, extras), mesh)
        self._builder = ExampleBuilder(config, Method.patch_order(self.method), Method.eval_spec(self.method))
        self._programs: dict[Any, Callable[..., Any]] = {}

    @property
    def batch_size(self) -> int:
        """Images per batch, over all devices."""
        return self.config.batch_size

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the input images, after resizing and cropping."""
        return self.grid.image_size

    @property
    def width(self) -> int:
        """D, the width of a token."""
        return self.config.model.width

    def shape(self, features: str = "pool") -> tuple[int, ...]:
        """Returns the shape of one image's features; raises UserError for unknown features."""
        check_features(features)
        return {"tokens": (1 + self.grid.num_patches, self.width), "patches": (*self.grid.shape, self.width)}.get(
            features, (self.width,))

    def patches(self, images: Sequence[ImageLike]) -> np.ndarray:
        """Returns the patches of the images after the evaluation's transform, uint8 [n, N, P].

        Raises:
          UserError: an image cannot be used.
        """
        ratio, upright = self.config.eval.crop_ratio[0], self.config.data.exif != "ignore"
        with ThreadPoolExecutor(self.config.data.threads or os.cpu_count() or 1) as pool:
            made = pool.map(lambda image: patches_of(self._builder, image, ratio, upright), images)
            return np.stack(list(made))

    def program(self, features: str = "pool", block: int = -1) -> Callable[..., jax.Array]:
        """Returns the compiled function (params, extras, batch) → features, float32 [B, ...].

        Raises:
          UserError: unknown features, or the encoder has no such block or no class token.
        """
        check_features(features)
        if not isinstance(block, int | np.integer) or not -1 <= block < self.config.model.depth:
            raise UserError(f"block={block}; the encoder has the blocks 0 to {self.config.model.depth - 1}, -1 is the "
                            "last")
        if features == "cls" and not self.method.encoder.class_token:
            raise UserError(f"{self.source} has no class token; take the features mean")
        return self.compiled((features, block), partial(_features, self.method, features, block))

    def compiled(self, key: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles a function of (params, extras, batch) with replicated outputs, once per key."""
        if key not in self._programs:
            self._programs[key] = jax.jit(function, out_shardings=sharding.replicated(self.mesh))
        return self._programs[key]

    def run(self, program: Callable[..., Any], images: Sequence[ImageLike]) -> list[Any]:
        """Returns the outputs of a compiled function for each batch of the images, trees of host arrays [n, ...].

        The last batch is padded. With less than one batch of images, the batch size is halved while they fit.
        """
        devices = self.mesh.devices.size
        size = self.batch_size
        while size % 2 == 0 and size // 2 >= max(len(images), devices) and size // 2 % devices == 0:
            size //= 2
        starts = range(0, len(images), size)
        batches = (self._batch(images[start:start + size], size) for start in starts)
        found = forward.outputs(program, self.params, self.extras, batches, self.mesh, size)
        return [jax.tree.map(operator.itemgetter(slice(len(images) - start)), output)
                for start, output in zip(starts, found, strict=True)]

    def _batch(self, images: Sequence[ImageLike], size: int) -> dict[str, np.ndarray]:
        """Returns a batch of `size` rows with patches in raster order, padded with black images."""
        patches = self.patches(images)
        empty = np.zeros((size - len(patches), *patches.shape[1:]), np.uint8)
        order = np.broadcast_to(np.arange(self.grid.num_patches, dtype=np.int32), (size, self.grid.num_patches))
        return {"patches": np.concatenate([patches, empty]), "order": order}

    def __call__(self, images: ImageLike | Sequence[ImageLike], features: str = "pool", block: int = -1) -> np.ndarray:
        """Returns the features of images.

        Args:
          images: one or several arrays, PIL images or paths, of any sizes (`images.ImageLike`); an array
            [B, height, width, 3] holds several.
          features: one of FEATURES.
          block: index of the block whose output tokens are used, without a norm; -1: the encoder's output.

        Returns:
          float32 [B, D]; for 'patches' [B, rows, columns, D], for 'tokens' [B, 1 + N, D].

        Raises:
          UserError: an image cannot be used, or as in `program`.
        """
        program, given = self.program(features, block), as_list(images)
        if not given:
            return np.zeros((0, *self.shape(features)), np.float32)
        return np.concatenate(self.run(program, given))


def check_features(features: str) -> None:
    """Raises UserError, with the nearest name, for unknown features."""
    if features not in FEATURES:
        raise UserError(f"features={features!r}; {did_you_mean(str(features), FEATURES)}")


def open_encoder(source: str, batch_size: int = 0, image_size: tuple[int, int] | None = None, heads: int = 0,
                 mesh_of: Sequence[jax.Device] | None = None) -> Encoder:
    """Loads an encoder.

    Args:
      source: a workdir (whose newest undamaged checkpoint is read), a step folder in it, its best/, an export, or
        weights of another library as a file or a folder.
      batch_size: images per batch, over all devices; 0: 32 per CPU device, 128 per accelerator.
      image_size: height and width in pixels, only for weights of another library; None: as in their files.
      heads: number of attention heads, only for weights whose files do not have it; 0: as in their files.
      mesh_of: the devices to use; None: all.

    Raises:
      UserError: there is no encoder at `source`, it is damaged, or the method has no single encoder.
    """
    if batch_size < 0:
        raise UserError(f"batch_size={batch_size}; expected images per batch, or 0")
    folder = paths.locate_checkpoints(str(source), "from")
    theirs = workdir.config_of(str(folder))
    loaded = load_params(folder, ema=True, extras=True, step=True)
    step = int(loaded.pop("step", -1))
    params, extras = param_tree.split_eval_params(loaded)
    stored = params
    params, more = param_tree.split_eval_params(layouts.read(stored, theirs))
    extras = {**extras, **more}
    if theirs is None:
        config = foreign.config_of(str(folder), params, image_size, heads, stored)
        params = foreign.fitted(str(folder), params, config)
    elif image_size or heads:
        raise UserError(f"{source} has its own image size and heads; leave them out")
    else:
        config = theirs
    devices = list(mesh_of or jax.devices())
    config = for_devices(config, batch_size, devices)
    kept = {name: value for name, value in extras.items() if name != "teacher"}  # `params` are the teacher's
    classes = workdir.classes_of(str(folder)) if _outputs(params) else ()
    return Encoder(config, params, kept, sharding.make_mesh(config, devices), classes, step, str(source),
                   theirs is not None)


def for_devices(config: ConfigDict, batch_size: int, devices: Sequence[jax.Device]) -> ConfigDict:
    """Returns a run's config for inference, with batches that are sharded over all devices.

    Args:
      config: of the run.
      batch_size: images per batch, rounded up to a multiple of the devices; 0: as in `open_encoder`.
      devices: of one kind.
    """
    config = config.copy_and_resolve_references().unlock()
    rows = batch_size or ROWS.get(devices[0].platform, ROWS_ELSEWHERE) * len(devices)
    config.batch_size = -(-rows // len(devices)) * len(devices)
    config.train.accumulate = 1
    config.mesh = default(config.method.name).mesh
    config.mesh.zero = "off"
    config.data.resize = "exact"  # as evaluations always do
    config.data.threads = 0
    return resolved(frozen(config.lock(), -1)).lock()


def _named(params: Any, classes: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the head's classes; their indices as text if the number of names does not match."""
    count = _outputs(params)
    return tuple(classes) if len(classes) == count else tuple(map(str, range(count)))


def _outputs(params: Any) -> int:
    """Returns the number of classes of a classifier or a detector; 0 without either head."""
    flat = param_tree.flatten(params)
    return max((flat[name].shape[-1] for name in ("head/kernel", "masks/logits/kernel") if name in flat), default=0)


def _check(method: Method, params: Any, source: str) -> None:
    """Raises UserError if the shapes of the encoder's parameters, or of the head's if any, are not the method's."""
    wanted, _ = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())
    ours, theirs = ({name: leaf.shape for name, leaf in param_tree.flatten(tree).items()} for tree in (wanted, params))
    heads = [] if "head/kernel" not in ours or "head/kernel" not in theirs else [
        name for name in {**ours, **theirs} if name.startswith(("head/", "fc_norm/"))]
    encoder = [name for name in {**ours, **theirs} if name.startswith("encoder/")
               and name.removeprefix("encoder/") not in UNUSED]
    for name in encoder + heads:
        if ours.get(name) != theirs.get(name):
            had, needed = (f"has the shape {found[name]}" if name in found else "is missing"
                           for found in (theirs, ours))
            raise UserError(f"{source}: {name} {had}, and in the model of its config it {needed}")


def _features(method: Method, features: str, block: int, params: Any, extras: Any, batch: Batch) -> jax.Array:
    tokens = method.encode(params, extras, batch, block)
    if features in ("pool", "cls", "mean"):
        return pool(tokens, method.config.model.pool if features == "pool" else features)
    found = tokens.astype(jnp.float32)
    return found if features == "tokens" else found[:, 1:].reshape(len(found), *method.grid.shape, -1)

