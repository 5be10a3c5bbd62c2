"""Defaults and validation of the config.

A recipe under configs/ starts from `default()` and states only what differs. Every leaf can be overridden on the
command line (`--config.optim.lr=1e-4`), so no default is a list or None: ml_collections cannot override those.
"""

import copy
import logging
import re
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from mae_jax import methods, recipe_version
from mae_jax import plugins as plug_ins
from mae_jax.config import field_values
from mae_jax.durations import steps
from mae_jax.errors import UserError, did_you_mean
from mae_jax.presets import resolve as resolve
from mae_jax.presets import runlocal as runlocal

logger = logging.getLogger(__name__)
SIZES = {  # width, depth, heads: MAE section 4 (B, L, H), DeiT Table 1 (Ti, S)
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "H": (1280, 32, 16),
}
# Fields of config.model that the weights of an encoder decide. Recipes that start from one list them in model.auto.
SHAPE = ("width", "depth", "heads", "patch", "mlp_ratio", "gelu", "layer_scale", "positions")
OPTIMIZERS = {  # optim.name → module:rule, imported on demand by training/optim.py
    "adamw": "mae_jax.training.optim:adamw",
    "lamb": "mae_jax.training.optim:lamb",
    "lars": "mae_jax.training.optim:lars",
    "lion": "mae_jax.training.optim:lion",
    "sgd": "mae_jax.training.optim:sgd",
}


def vit(size: str, patch: int) -> dict[str, Any]:
    """Returns the encoder's shape fields for a named size and square patches of `patch` pixels; raises UserError."""
    if size not in SIZES:
        raise UserError(f"unknown model size {size!r}; {did_you_mean(size, SIZES)}")
    width, depth, heads = SIZES[size]
    return {"width": width, "depth": depth, "heads": heads, "patch": (patch, patch)}


DEFAULTS: dict[str, Any] = {  # besides the group `method`: its name, and the fields of that method
    # Version of a run's behavior, where versions differ (docs/migration.md); a resumed run keeps that of its start.
    "recipe_version": recipe_version.CURRENT,
    "seed": 0,  # of all random draws
    "batch_size": 256,  # images per step, over all devices
    "init_from": "",  # initial parameters: a workdir, a step folder in it, or weights of another library; '': random
    # Head of init_from. match: used if its classes are those of the data, or unknown; keep: used; new: not used.
    "init_head": "match",
    "plugins": (),  # installed modules to import, as ('package.module',) (docs/plugins.md)
    "data": {
        "source": "photo_crops",  # kind of data set (docs/data.md)
        "path": "",  # folder, TFRecord pattern, npz file or TFDS data_dir; local or gs://
        "mix": (),  # several paths with weights instead of data.path, as ('3:/data/a', '1:/data/b') (docs/data.md)
        # TFDS's name; for a folder, a name in data/sources/expected_sizes.py, whose number of images it must have.
        "name": "",
        # How a folder is read (docs/data.md). auto: detected, and refused if ambiguous; flat: without classes; classes,
        # splits: by its sub-folders; 0.1.0: as that version read folders, and numbers in data.classes.
        "layout": "auto",
        "train_split": "train",  # split to train on, as 'train' or 'train[:90%]'
        # Part of the training data that selects the checkpoint, as 'train[90%:]' with train_split='train[:90%]'; '':
        # none.
        "val_split": "",
        "eval_split": "test",  # split to evaluate on; '': no evaluation
        "classes": "",  # classes whose images are used: 'cat,dog', '0-9', imagenet_organisms, imagenet_rest; '': all
        "image_size": (224, 224),  # height, width in pixels
        # Crop of training images: none, fixed, random (MAE Table 1e), simple (DeiT III), single (BYOL), scaled (of any
        # size; mmsegmentation). Of images with objects: none, lsj (ViTDet), multi_scale (DETR; protocols of XCiT and
        # iBOT).
        "augment": "random",
        # Colors of training images: none, jitter (MAE Table 1e), three (3-Augment, DeiT III), rand (RandAugment),
        # distort (mmsegmentation's photometric distortion).
        "color": "none",
        "repeats": 1,  # views of each image in a batch (repeated augmentation; DeiT III: 3)
        "crop_scale": (0.2, 1.0),  # share of the image's area in a random crop: least, largest (MAE A.1)
        "crop_ratio": (3 / 4, 4 / 3),  # width / height of a random crop: least, largest (torchvision)
        "scales": (0.5, 2.0),  # of augment=scaled: size of the image, relative to one that the crop just fits
        "lsj_scale": (0.1, 2.0),  # of augment=lsj: least and largest size of images, as shares of image_size (ViTDet)
        "max_objects": 100,  # most objects of an image that are trained on; rows of the objects' batch fields
        # Crowds (iscrowd=1), many objects annotated as one. ignored: not trained on (COCO); objects: each is an object,
        # as CVAT writes masks that were drawn by brush.
        "crowds": "ignored",
        "flip": True,  # True: half of the training images are mirrored
        # EXIF orientation. apply: images are turned as it says; ignore: not; auto: apply, except in runs of an older
        # recipe_version.
        "exif": "auto",
        # Values of black and white in images of more than 8 bits. auto: 0 and the highest value of as many bits as 64
        # training images need, printed and stored; two numbers, as 0,4095; upper: the upper 8 bits, as before.
        "range": "auto",
        # Files that are read. all: JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF, HEIC; common: the first five; auto: all,
        # except in runs of an older recipe_version.
        "formats": "auto",
        # How training images are resized. exact: as PIL and torchvision do; fast: by OpenCV, not antialiased; graph:
        # exact's filter in TensorFlow's graph, many JPEGs at once (docs/performance.md).
        "resize": "exact",
        # Where the image is: name of a TFRecord feature, an npz array, a Parquet or table column, or the kind of a tar
        # member.
        "image_key": "image",
        "label_key": "label",  # where the label is, likewise; '': no labels are read
        # Where the mask is, likewise: in TFDS an image of classes; with source=folder a folder of PNGs like data.path;
        # '': no masks.
        "mask_key": "",
        "tokens": "",  # *.npz of token ids, for method.target=tokens (mae_jax/data/token_maps.py)
        "mask_offset": 0,  # subtracted from the values of a mask; values below it become 255, which is ignored
        "readers": 16,  # number of logical readers of a TFRecord stream
        "shuffle_mb": 1024,  # megabytes of encoded records held for shuffling, over all readers
        # Number of processes that make examples. 0: threads only; auto: as many as data.threads, but threads for a few
        # images.
        "workers": "auto",
        "threads": 0,  # number of host threads; 0: one per core
        "prefetch": 2,  # number of batches that are ready ahead, on the host and on the device
    },
    "model": {  # of the encoder; its shape is that of ViT-B/16
        "width": 768,  # width of the tokens, a multiple of model.heads and of 4
        "depth": 12,  # number of blocks
        "heads": 12,  # number of attention heads
        "patch": (16, 16),  # height, width of a patch in pixels
        # Fields of this group that are set from the weights of init_from, if given, as ('width', 'heads'); a field on
        # the command line takes precedence.
        "auto": (),
        "mlp_ratio": 4,  # width of a block's hidden layer, over that of the encoder
        "dtype": "auto",  # of activations; auto: bfloat16 on accelerators, float32 on CPUs
        "gelu": "erf",  # erf (exact) or tanh (its approximation)
        "pool": "cls",  # features of heads, probes and k-NN. cls: the class token; mean: the mean of the patch tokens
        # Position embedding. fixed: sine-cosine (MAE); learned: trained from these; random: trained from noise (DeiT).
        "positions": "fixed",
        "layer_scale": 0.0,  # initial scale of each branch (LayerScale); 0: none
        "drop_path": 0.0,  # highest rate of stochastic depth; 0: off
        "drop_path_rates": "linear",  # linear: from 0 to the highest over the blocks (timm); constant (DeiT III)
        # Initial kernels. xavier: as MAE; normal: as DeiT, standard deviation 0.02, or with method.name=beit as BEiT.
        "init": "xavier",
        "scan": False,  # True: blocks run as a loop over one compiled block; checkpoints are the same
        # Activations that the backward pass computes again. none; full: all of a block; dots: all but matrix products.
        "remat": "none",
    },
    "optim": {
        "name": "adamw",  # the optimizer (MAE Table 8)
        "lr": 1.5e-4,  # learning rate per 256 images: the peak is lr · batch_size / 256 (MAE Table 8)
        "schedule": "cosine",  # of the rate after the warm-up: half a cosine; poly: linear (mmsegmentation, power 1)
        "min_lr": 0.0,  # learning rate at the end of the schedule, as it is, for any batch
        "warmup": "40 epochs",  # duration in which the rate rises linearly (MAE Table 8)
        "warmup_lr": 0.0,  # learning rate at the start of the warm-up, likewise as it is
        "betas": (0.9, 0.95),  # of adamw, lamb and lion (MAE Table 8)
        "eps": 1e-8,  # of adamw and lamb
        "momentum": 0.9,  # of lars and sgd
        "weight_decay": 0.05,  # weight decay at the start, of the parameters that have any (MAE Table 8)
        "final_weight_decay": -1.0,  # weight decay at the end, reached by half a cosine (DINO); negative: constant
        "layer_decay": 1.0,  # factor of the learning rate from each block to the one before it; 1: off
        # Shares of the run after which the learning rate is divided by 10, as (8 / 9, 26 / 27); (): optim.schedule.
        "milestones": (),
        "clip": 0.0,  # largest global norm of the gradient; 0: no clipping
        "ema": 0.0,  # decay per step of averaged parameters, which evaluations then use; 0: off
    },
    "train": {
        "duration": "800 epochs",  # length of the run (MAE Table 8)
        # Duration without an improvement of checkpoint.best_metric after which a run ends, as '20 epochs'; '': off.
        "patience": "",
        "accumulate": 1,  # number of micro-batches per step (gradient accumulation)
        "deterministic": False,  # True: runs on GPUs are bit-identical, by slower kernels
        "compilation_cache": "auto",  # folder of compiled programs; auto: <workdir>/compiled; '': none
    },
    "mesh": {
        "data": -1,  # number of devices that share the rows of a batch; -1: all that the others leave
        "fsdp": 1,  # number of devices that share rows, and hold a part of each parameter; -1 likewise
        "tensor": 1,  # number of devices that share attention heads and hidden units; -1 likewise
        # ZeRO: on: parameters and optimizer state are sharded over `data`, too; off; auto: on, except on CPUs.
        "zero": "auto",
        # Number of TPU slices, joined by the data-center network; each holds all parts of sharded arrays; -1: all.
        "slices": -1,
        "reduce": "float32",  # dtype in which gradients of kernels are summed over devices: float32, bfloat16
    },
    "checkpoint": {
        "every": "20 epochs",  # period of checkpoints; one is also saved at the end
        "keep_last": 3,  # number of the last checkpoints that are kept, at least 2
        "keep_every": "",  # period of checkpoints that are never deleted, as '200 epochs'; '': none
        # Metric on data.val_split by which the best checkpoint is kept, as 'top1'; 'loss' and 'rankme' need no labels;
        # '': none.
        "best_metric": "",
        "best_mode": "auto",  # max: larger is better; min: smaller; auto: known for built-in metrics
    },
    "eval": {
        "every": "20 epochs",  # period, besides both ends of the run; at least train.duration: the last step only
        # Most images that evaluations read: of the training split, for probes and vocabularies, and of the evaluation
        # split.
        "max_examples": 100_000,
        "crop_ratio": (224 / 256,),  # share of the short side that the center crop keeps; several: a curve at the end
        # For method.test=slide and whole: sizes at which an image is seen, times that of the model's images; the
        # probabilities are averaged (docs/segmentation.md).
        "scales": (1.0,),
        "flip": False,  # for method.test=slide and whole: True: an image is seen mirrored, too
        "test": True,  # False: data.eval_split is held out, and not read
        "sets": (),  # further test sets of TFDS for the last evaluation, as ('imagenet_v2',)
        "knn_k": 20,  # number of neighbors of k-NN, as in DINO
        "knn_temperature": 0.07,  # of the neighbors' votes, as in DINO
        "pictures": 16,  # number of images in the grids of reconstructions and of attention
        "attention_block": -1,  # block whose attention is drawn; -1: the last
        "attention_query": "cls",  # query of the drawn attention. cls: the class token; mean: the mean of all patches
    },
    "log": {
        "every": "50 steps",  # period of training metrics, which are means over it
        "tensorboard": True,  # True: metrics and figures are also written for TensorBoard
        "sinks": (),  # further outputs of metrics and figures, by name (mae_jax/storage/metric_sinks.py)
        "profile_steps": "",  # first and last step of a profiler trace, as '20:25'; '': none
    },
    "guard": {
        "max_nonfinite": 10,  # number of steps in a row without a finite loss and gradient that stops a run
        "max_bad_fraction": 0.1,  # share of images that cannot be read above which a run stops
        # Deviations above the last 128 steps at which loss or gradient norm is a spike, whose step is skipped; 0: off;
        # OLMo: 6.
        "spike": 0.0,
        "stall_seconds": 1800.0,  # longest seconds of a step, a save, the input or an evaluation's batch; 0: off
    },
}


def choices() -> dict[str, Collection[str]]:
    """Returns dotted name → allowed values for fields with a few named values, including those of plug-ins.

    data.color is missing: its table, `mae_jax.data.transforms.color`, imports JAX.
    """
    return {**field_values.CHOICES, "optim.name": plug_ins.table("optimizers", OPTIMIZERS)}


def default(method: str = "mae", plugins: tuple[str, ...] = ()) -> ConfigDict:
    """Returns the default config, with the fields of `method` under `config.method`.

    It is locked: a misspelled field in a recipe raises an error with the most similar name.

    Args:
      method: name of the method.
      plugins: installed modules to import first, as ('package.module',).
    """
    plug_ins.load(plugins)
    own = {"name": method, **methods.defaults(method)}
    return ConfigDict({**copy.deepcopy(DEFAULTS), "plugins": plugins, "method": own}).lock()


def changed(config: ConfigDict) -> dict[str, Any]:
    """Returns dotted name → value for the fields that differ from the defaults of the config's method."""
    from mae_jax.param_tree import flat

    before = flat(default(config.method.name))
    return {name: value for name, value in sorted(flat(config).items()) if value != before.get(name)}


def profile_steps(config: ConfigDict) -> tuple[int, int]:
    """Returns the first and the last step of the profiler trace; (0, 0): no trace. Raises UserError."""
    text = config.log.profile_steps
    match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
    if text and (not match or int(match[1]) > int(match[2])):
        raise UserError(f"log.profile_steps={text!r}; write the first and the last step, as '20:25'")
    return (int(match[1]), int(match[2])) if match else (0, 0)


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """Returns a locked config from parsed JSON; lists become tuples."""
    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tuples(item) for key, item in value.items()}
        return tuple(value) if isinstance(value, list) else value

    return ConfigDict(tuples(values)).lock()


def for_platform(config: ConfigDict, platform: str) -> ConfigDict:
    """Returns a copy with 'auto' fields resolved for a platform, 'cpu', 'gpu' or 'tpu'.

    The stored config keeps 'auto', since a run may be resumed on another platform.
    """
    config = config.copy_and_resolve_references()
    if config.model.dtype == "auto":
        config.model.dtype = "float32" if platform == "cpu" else "bfloat16"
    if config.mesh.zero == "auto":
        config.mesh.zero = "off" if platform == "cpu" else "on"
    return read_as_begun(config)


def read_as_begun(config: ConfigDict) -> ConfigDict:
    """Resolves the 'auto' fields of config.data to the behavior of its recipe_version, in place; returns the config."""
    if config.data.layout == "auto" and not recipe_version.has(config, "folder_layouts"):
        config.data.layout = "0.1.0"
    if config.data.exif == "auto":
        config.data.exif = "apply" if recipe_version.has(config, "exif_orientation") else "ignore"
    if config.data.range == "auto" and not recipe_version.has(config, "range_of_16_bits"):
        config.data.range = "upper"
    if config.data.formats == "auto":
        config.data.formats = "all" if recipe_version.has(config, "more_formats") else "common"
    return config


def resolved(config: ConfigDict) -> ConfigDict:
    """Returns a copy with 'auto' fields resolved for the platform of this process's devices."""
    import jax

    return for_platform(config, jax.devices()[0].platform)


def fitting_mesh(config: ConfigDict, devices: Any = None) -> Any:
    """Returns the mesh of a config without 'auto'; raises UserError if devices or the method's heads do not fit it."""
    from mae_jax.runtime import sharding

    mesh = sharding.make_mesh(config, devices)
    for field, count in methods.get(config.method.name).heads(config).items():
        if count % mesh.shape["tensor"]:
            raise UserError(f"{field}={count} does not divide over mesh.tensor={mesh.shape['tensor']}; heads are "
                            "shared among its devices")
    return mesh


def with_fitting_mesh(config: ConfigDict) -> ConfigDict:
    """Returns the config of a run, with all devices along mesh.data if its own mesh does not fit these devices."""
    try:
        fitting_mesh(resolved(config))
    except UserError:
        config = config.copy_and_resolve_references()
        config.mesh = default(config.method.name).mesh
        logger.info("the mesh of the run does not fit here; looking at it with all devices along mesh.data")
    return config


def validate(config: ConfigDict, for_training: bool = True) -> None:
    """Raises UserError for the first invalid field, independent of the data.

    Args:
      config: a config, with or without 'auto' resolved.
      for_training: False to use the encoder alone; the method's own fields are then not checked.
    """
    from mae_jax.data.reading import span
    from mae_jax.data.transforms import color
    from mae_jax.ops.patches import PatchGrid  # imports JAX, which recipes and --help do not need
    from mae_jax.param_tree import flat
    from mae_jax.storage import metric_sinks
    from mae_jax.storage.paths import check_fields

    plug_ins.load(config.plugins)
    plug_ins.check("color_policies", config.data.color, color.COLOR_POLICIES, "data.color")
    plug_ins.check("optimizers", config.optim.name, OPTIMIZERS, "optim.name")
    values = flat(config)
    field_values.check_types(values, flat({**DEFAULTS, "method": methods.own_defaults(config.method)}))
    field_values.check_ranges(values)
    recipe_version.check(config.recipe_version)
    for field in config.model.auto:
        if field not in SHAPE:
            raise UserError(f"model.auto: {field!r} is none of its fields; {did_you_mean(field, SHAPE)}")
    PatchGrid.of(config)
    if config.checkpoint.keep_last < 2:
        raise UserError("checkpoint.keep_last=1; keep at least 2, so that a damaged checkpoint has a predecessor")
    if config.model.width % config.model.heads:
        raise UserError(f"model.width={config.model.width} is not a multiple of model.heads={config.model.heads}")
    if config.model.width % 4:
        raise UserError(f"model.width={config.model.width}; sin-cos positions need a multiple of 4")
    if config.batch_size % (parts := config.train.accumulate):
        raise UserError(f"batch_size={config.batch_size} is not a multiple of train.accumulate={parts}")
    marks = config.optim.milestones
    if not all(isinstance(mark, float) and 0 < mark < 1 for mark in marks) or list(marks) != sorted(set(marks)):
        raise UserError(f"optim.milestones={tuple(marks)}; expected shares of the run between 0 and 1, ascending")
    for key in field_values.DURATIONS:
        steps(values[key], config.batch_size, 1)
    check_fields(values)
    span(config.data.range)
    profile_steps(config)
    if not re.fullmatch(r"auto|\d{1,4}", config.data.workers):
        raise UserError(f"data.workers={config.data.workers!r}; expected 'auto' or how many, 0 for threads alone")
    if not config.log.every:
        raise UserError("log.every is ''; write how often to log, as '50 steps'")
    for name in config.log.sinks:
        metric_sinks.find(name)
    if config.train.patience and not config.checkpoint.best_metric:
        raise UserError(f"train.patience={config.train.patience!r} needs checkpoint.best_metric, the figure that is to "
                        "get better")
    if config.checkpoint.best_metric and not (config.data.val_split and config.eval.every):
        raise UserError(f"checkpoint.best_metric={config.checkpoint.best_metric!r} needs data.val_split and eval.every")
    if not -1 <= config.eval.attention_block < config.model.depth:
        raise UserError(f"eval.attention_block={config.eval.attention_block}; expected -1 to {config.model.depth - 1}")
    if (tuple(config.eval.scales) != (1.0,) or config.eval.flip) and config.method.get("test", "none") == "none":
        raise UserError("eval.scales and eval.flip are of images at their own size, which method.test=slide or "
                        "whole asks for")
    if for_training:
        methods.get(config.method.name).validate(config)
