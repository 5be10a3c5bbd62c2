"""README.md of an export, a model card: what the model is, how it was trained, and how to load it."""

import json
import re

from etils import epath
from ml_collections import ConfigDict

from mae_jax import __version__
from mae_jax.config import SIZES, changed
from mae_jax.errors import UserError, printable
from mae_jax.interop import layouts
from mae_jax.ops.patches import MEAN, STD
from mae_jax.storage import paths
from mae_jax.storage.metric_writer import values_of
from mae_jax.training import workdir

MAX_ORIGINS = 8  # length of the chain of runs that each start from another one
# Fields that hold paths of the machine on which the run was made.
PRIVATE = ("data.path", "data.mask_key", "data.tokens", "train.compilation_cache", "init_from")
# Published weights under CC-BY-NC 4.0, by the names of their files and repositories: MAE's, MoCo v3's.
NON_COMMERCIAL = re.compile(r"mae_(pretrain|finetuned?|visualize)_|vit-mae-(base|large|huge)|patch\d+_224[._]mae|moco")


def text(exported: layouts.Exported, layout: str, origin: epath.Path, step: int) -> str:
    """Returns the card as Markdown.

    Args:
      exported: the exported parameters and their config.
      layout: name of the layout.
      origin: the workdir that the checkpoint belongs to.
      step: step of the checkpoint; -1: not known.
    """
    config, chosen = exported.config, layouts.get(layout)
    parts = [_front(exported, chosen, origins(config)), f"# {title(config)}\n\n{_about(exported)}"]
    if loading := chosen.loading(exported):
        parts.append(f"## Loading\n\n```python\n{loading}\n```\n\n`FOLDER` is this folder.")
    parts += [_images(config), _training(config, origin, step)]
    if found := metrics(origin, step):
        lines = [f"| {name} | {value:.6g} | {at} |" for name, (value, at) in found.items()]
        parts.append("\n".join(["## Metrics\n", "| metric | value | step |", "|---|---|---|", *lines]))
    parts += [licence(origins(config)), _fields(config)]
    return "\n\n".join(parts) + "\n"


def title(config: ConfigDict) -> str:
    """Returns the title: model size, patch size and method."""
    m, (rows, columns) = config.model, config.model.patch
    size = next((name for name, shape in SIZES.items() if shape == (m.width, m.depth, m.heads)), f"{m.width}x{m.depth}")
    return f"ViT-{size}/{rows if rows == columns else f'{rows}x{columns}'}, method.name={config.method.name}"


def _front(exported: layouts.Exported, chosen: layouts.Layout, come_from: list[str]) -> str:
    said = {"library_name": chosen.library} if chosen.library else {}
    tasks = {"head": "image-classification", "upernet": "image-segmentation"}
    said["pipeline_tag"] = next((task for part, task in tasks.items() if part in exported.params),
                                "image-feature-extraction")
    said |= {"license": "cc-by-nc-4.0"} if any(map(NON_COMMERCIAL.search, come_from)) else {}
    lines = [f"{name}: {value}" for name, value in said.items()]
    return "\n".join(["---", *lines, f"tags: [mae_jax, vit, {exported.config.method.name}]", "---"])


def _about(exported: layouts.Exported) -> str:
    m = exported.config.model
    parts = {"encoder": f"an encoder of {m.depth} blocks of width {m.width} with {m.heads} heads",
             "decoder": "a decoder", "head": f"a classifier of {exported.outputs} classes",
             "upernet": f"an UperNet of {exported.config.method.get('classes', 0)} classes"}
    has = " and ".join(part for name, part in parts.items() if name in exported.params)
    pooled = "the class token" if m.pool == "cls" else "the mean of the patches"
    return f"It has {has}; its features are {pooled}. Written by mae_jax {__version__}."


def _images(config: ConfigDict) -> str:
    height, width = config.data.image_size
    return (f"## Images\n\n{height} x {width} pixels, RGB, in [0, 1] less the mean {MEAN}, over the deviation {STD}. "
            f"Evaluations resize the central {100 * config.eval.crop_ratio[0]:.4g}% of the image's shorter side, by "
            "bicubic filtering.")


def _training(config: ConfigDict, origin: epath.Path, step: int) -> str:
    data, known = config.data, workdir.recorded_data(origin)
    images = f", {known['pictures']:,} images to train on" if isinstance(known.get("pictures"), int) else ""
    classes = f", {len(known['classes'])} classes" if known.get("classes") else ""
    lines = [f"Method: `{config.method.name}`.",
             f"Data: `data.source={data.source}`{f', `{printable(data.name)}`' if data.name else ''}{images}{classes}.",
             f"Length: `train.duration={config.train.duration}` of {config.batch_size} images per step"
             + (f"; this is step {step:,}." if step >= 0 else ".")]
    if come_from := origins(config):
        lines.append(f"Started from: {', then '.join(f'`{name}`' for name in come_from)}, the nearest first.")
    return "\n".join(["## Training\n", *(f"- {line}" for line in lines)])


def origins(config: ConfigDict) -> list[str]:
    """Returns the names of the weights that a run started from, and of those that these started from, as far as known.
    """
    found: list[str] = []
    current: ConfigDict | None = config
    while current is not None and current.init_from and len(found) < MAX_ORIGINS:
        source = current.init_from
        found.append(source if source.startswith("hf://") else "/".join(source.rstrip("/").split("/")[-2:]))
        try:
            current = workdir.config_of(source)
        except (UserError, OSError):
            break
    return [printable(name) for name in found]


def licence(come_from: list[str]) -> str:
    """Returns the section on the license of the weights, by the names of the weights that they started from."""
    marked = [name for name in come_from if NON_COMMERCIAL.search(name)]
    if marked:
        return (f"## Licence\n\nIt started from `{marked[0]}`: published weights of that name are under CC BY-NC 4.0, "
                "which forbids commercial use, also of what is made of them.")
    rest = "Those that it started from may have one, which then holds. " if come_from else ""
    return f"## Licence\n\nmae_jax puts no licence on weights. {rest}That of the data may restrict their use."


def metrics(origin: epath.Path, step: int) -> dict[str, tuple[float, int]]:
    """Returns name → (value, step): the last value of each metric up to `step`; -1: of all."""
    found: dict[str, tuple[float, int]] = {}
    content = paths.read_bytes(origin / "metrics.jsonl") or b""
    for line in content.decode(errors="replace").splitlines():
        values = values_of(line)
        if values and (step < 0 or values["step"] <= step):
            found |= {printable(name): (float(value), int(values["step"])) for name, value in values.items()
                      if name.startswith(("eval/", "val/")) or name == "train/loss"
                      if isinstance(value, int | float)}
    return dict(sorted(found.items()))


def _fields(config: ConfigDict) -> str:
    """Returns the section on the recipe: the fields that differ from the defaults."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in changed(config).items()
             if name not in PRIVATE and not name.startswith(("log.", "mesh."))]
    return "\n".join(["## Recipe\n", f"The fields of `default({config.method.name!r})` that have other values, paths "
                      "left out:\n", "```", *lines, "```"])
