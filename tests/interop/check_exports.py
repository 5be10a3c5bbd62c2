r"""Exports loaded by timm and transformers, in environments of their own, and what these save read by us again.

  python -m tests.interop.check_exports make FOLDER       # here
  python tests/interop/check_exports.py load FOLDER       # where torch and transformers or timm are; once in each
  python -m tests.interop.check_exports read FOLDER       # here again: writes tests/interop/results/exports.{json,md}
  python -m tests.interop.check_exports onnx FOLDER       # with the extra `onnx`: ViT-B in onnxruntime

`make` exports random models, and keeps images and what ours computes of them. `load` needs nothing of ours.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

TOLERANCE = 1e-5  # of the largest value
IMAGES = 2
TINY = {"width": 96, "depth": 3, "heads": 3, "patch": (8, 8)}
BASE = {"width": 768, "depth": 12, "heads": 12, "patch": (16, 16)}
LARGE = {"width": 1024, "depth": 24, "heads": 16, "patch": (16, 16)}
HUGE = {"width": 1280, "depth": 32, "heads": 16, "patch": (14, 14)}
UPERNET = TINY | {"depth": 6, "patch": (16, 16), "positions": "learned", "layer_scale": 0.1}
CASES = {  # name → method, image side, fields of model, layouts
    "mae, tiny": ("mae", 32, TINY, ("hf", "timm")),
    "mae, tiny, tanh": ("mae", 32, TINY | {"gelu": "tanh"}, ("hf", "timm")),
    "dino, tiny": ("dino", 32, TINY, ("hf", "timm")),
    "class token, tiny": ("supervised", 32, TINY | {"pool": "cls", "positions": "learned"}, ("hf", "timm")),
    "mean, tiny": ("supervised", 32, TINY | {"pool": "mean", "positions": "learned"}, ("timm",)),
    "DeiT III, tiny": ("supervised", 32, TINY | {"pool": "cls", "layer_scale": 0.1, "positions": "random"}, ("timm",)),
    "mae, ViT-B/16": ("mae", 224, BASE, ("hf", "timm")),
    "class token, ViT-B/16": ("supervised", 224, BASE | {"pool": "cls"}, ("hf", "timm")),
    "UperNet, tiny": ("segment", 64, UPERNET, ("hf",)),
    "UperNet without biases, tiny": ("segment", 96, UPERNET | {"layer_scale": 0.0}, ("hf",)),
    "mean, ViT-B/16": ("supervised", 224, BASE | {"pool": "mean", "positions": "learned"}, ("timm",)),
    "mae, ViT-L/16": ("mae", 224, LARGE, ("hf", "timm", "mae")),
    "mae, ViT-H/14": ("mae", 224, HUGE, ("hf", "timm", "mae")),
    "class token, ViT-L/16": ("supervised", 224, LARGE | {"pool": "cls"}, ("hf", "timm", "mae")),
}
CLASSES = ("ant", "bee", "cat", "dog", "eel")
RESULTS = Path(__file__).parent / "results"


def make(folder: Path) -> None:
    """Exports random models of all cases."""
    import jax

    for number, (name, (method, side, fields, names)) in enumerate(CASES.items()):
        config = _config(method, side, fields)
        tree = _random(config, number)
        place = folder / f"case{number}"
        for layout in names:
            _export(tree, config, layout, name, place / layout)
        rng = np.random.default_rng(number)
        images = rng.integers(0, 256, (IMAGES, side, side, 3), np.uint8)
        found = _ours(config, tree, images, rng)
        np.savez(place / "ours.npz", images=images, **jax.device_get(found))


def onnx(folder: Path) -> None:
    """Exports ViT-B's features and logits as ONNX, and compares what onnxruntime makes of three images."""
    import jax
    import onnxruntime

    from mae_jax.interop.forward import forward

    for name in ("mae, ViT-B/16", "class token, ViT-B/16"):
        method, side, fields, _ = CASES[name]
        config = _config(method, side, fields)
        tree, place = _random(config, 0), folder / f"onnx_{method}"
        _export(tree, config, "onnx", name, place)
        images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
        outputs = onnxruntime.InferenceSession(place / "model.onnx").run(None, {"images": images})
        for found, (key, wanted) in zip(outputs, jax.device_get(jax.jit(forward(config))(tree, images)).items(),
                                        strict=False):
            print(f"{name}, {key}: off by {np.abs(found - wanted).max() / np.abs(wanted).max():.1e}")


def _export(tree, config, layout: str, name: str, place: Path) -> None:
    """Exports parameters by the code of `mae_jax export`."""
    from etils import epath

    from mae_jax.commands.export import card, publishing, weights
    from mae_jax.interop import layouts
    from mae_jax.training import workdir

    exported = weights.of_layout(tree, config, layout, name, CLASSES if config.method.name == "supervised" else ())
    texts = layouts.get(layout).beside(exported) | {
        "README.md": card.text(exported, layout, epath.Path(place.parent / "none"), -1)}
    print(publishing.publish(exported, layout, epath.Path(place), texts,
                             workdir.metadata(config, layout, exported.classes), False))


def _config(method: str, side: int, fields: dict):
    from mae_jax.config import default

    config = default(method)
    config.batch_size, config.data.image_size = IMAGES, (side, side)
    config.model.update(dtype="float32", **fields)
    if method == "supervised":
        config.method.classes = len(CLASSES)
    if method == "segment":
        config.method.update(head="upernet", classes=len(CLASSES), head_width=24, aux_width=16,
                             relative_position_bias=bool(config.model.layer_scale))
    if method == "mae" and side < 224:
        config.method.update(decoder_width=64, decoder_depth=2, decoder_heads=4)
    if method == "dino":
        config.method.update(out_dim=32, head_width=24, bottleneck=8, local_views=2, local_size=(16, 16))
    return config


def _random(config, seed: int):
    """Returns random parameters that keep the scale of tokens; scales lie around one, and no bias is like another."""
    import jax

    from tests.helpers.tiny import tiny_method

    rng, method = np.random.default_rng(seed), tiny_method(config)
    shapes, extras = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())
    shapes |= {"extras": extras} if config.method.name == "segment" else {}

    def draw(keys, leaf):
        scale = leaf.shape[0] ** -0.5 if len(leaf.shape) == 2 else 0.3
        values = scale * rng.standard_normal(leaf.shape) + (keys[-1].key in ("scale", "gamma"))
        return (0.5 + values**2 if keys[-1].key == "var" else values).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _ours(config, tree, images: np.ndarray, rng: np.random.Generator) -> dict:
    import jax

    from mae_jax.interop.forward import forward
    from tests.helpers.tiny import tiny_method

    method = tiny_method(config)
    patches = np.stack([method.grid.patchify(image) for image in images])
    order = np.tile(np.arange(patches.shape[1], dtype=np.int32), (IMAGES, 1))
    if config.method.name == "segment":
        batch = {"patches": patches, "order": order}
        logits = jax.jit(method.pixel_logits)(tree, tree["extras"], batch)
        return {"logits": logits.transpose(0, 3, 1, 2)}
    found = dict(jax.jit(forward(config))(tree, images))
    found["tokens"] = jax.jit(method.encode)(tree, {}, {"patches": patches, "order": order})
    if config.method.name == "mae":
        order = rng.permuted(order, axis=1)
        batch = {"patches": np.take_along_axis(patches, order[..., None], 1), "order": order, "valid": np.ones(IMAGES)}
        found |= {"order": order, "predictions": jax.jit(method.predict)(tree, batch)}
    return found


def load(folder: Path) -> None:
    """Loads the exports as a user does, compares, and has the library save what it loaded."""
    lines = []
    for number, (name, (method, _, _, layouts)) in enumerate(CASES.items()):
        place = folder / f"case{number}"
        with np.load(place / "ours.npz") as file:
            ours = dict(file)
        for layout, check in (("hf", _transformers), ("timm", _timm)):
            if layout in layouts and find_spec({"hf": "transformers"}.get(layout, layout)):
                lines += [{"case": name, **line} for line in check(place, ours, method)]
    library = "_".join(sorted({line["library"].replace(" ", "-") for line in lines}))
    (folder / f"loaded_{library}.json").write_text(json.dumps(lines, indent=1))
    print(*lines, sep="\n")


def _pixels(ours: dict):
    import torch

    pixels = (ours["images"] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.from_numpy(pixels).float().permute(0, 3, 1, 2)


def _line(library: str, kind: str, names: list[str], found, wanted: np.ndarray) -> dict:
    found = found.detach().numpy()
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return {"library": library, "model": kind, "names_that_do_not_fit": names,
            "error": float(np.abs(found - wanted).max() / np.abs(wanted).max())}


def _transformers(place: Path, ours: dict, method: str) -> list[dict]:
    import torch
    import transformers

    library, lines = f"transformers {transformers.__version__}", []
    kind = json.loads((place / "hf" / "config.json").read_text())["architectures"][0]

    def loaded(cls, **more):
        model, said = cls.from_pretrained(place / "hf", output_loading_info=True, **more)
        return model.eval(), sorted(f"{what}: {name}" for what in said for name in said[what])

    model, names = loaded(getattr(transformers, kind))
    with torch.no_grad():
        if kind == "ViTMAEForPreTraining":
            noise = torch.from_numpy(np.argsort(ours["order"]).astype(np.float32))
            logits = model(_pixels(ours), noise=noise).logits
            masked = torch.from_numpy(ours["order"][:, -ours["predictions"].shape[1]:].astype(np.int64))
            picked = torch.take_along_dim(logits, masked[..., None], 1)
            lines.append(_line(library, kind, names, picked, ours["predictions"]))
            encoder, _ = loaded(transformers.ViTModel, add_pooling_layer=False)  # the decoder is left over
            tokens = encoder(_pixels(ours)).last_hidden_state
            lines.append(_line(library, "ViTModel of it", [], tokens, ours["tokens"]))
        elif kind == "UperNetForSemanticSegmentation":
            lines.append(_line(library, kind, names, model(_pixels(ours)).logits, ours["logits"]))
        elif kind == "ViTForImageClassification":
            lines.append(_line(library, kind, names, model(_pixels(ours)).logits, ours["logits"]))
            assert tuple(model.config.id2label.values()) == CLASSES
        else:
            automatic, names = loaded(transformers.AutoModel)
            out = automatic(_pixels(ours))
            lines += [_line(library, "AutoModel", names, out.last_hidden_state, ours["tokens"]),
                      _line(library, "AutoModel's pooler_output", names, out.pooler_output, ours["features"])]
    model.save_pretrained(place / f"saved_{library.replace(' ', '-')}")
    whole = ours["images"].shape[1] * 256 % 224 == 0  # else the processor's larger side is rounded
    return [*lines, *([_prepared(place, library, ours)] if whole else [])]


def _prepared(place: Path, library: str, ours: dict) -> dict:
    """How far the processor is from the same resizing by PIL, on an image of another size."""
    from PIL import Image
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(place / "hf")
    side = ours["images"].shape[1]
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    image = Image.fromarray(pixels).resize((3 * side, 2 * side), Image.Resampling.BICUBIC)  # smooth
    found = processor(image, return_tensors="np")["pixel_values"][0]
    cut, (width, height) = 2 * side * 224 / 256, image.size
    box = ((width - cut) / 2, (height - cut) / 2, (width + cut) / 2, (height + cut) / 2)
    wanted = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box)) / 255
    wanted = (wanted - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert found.shape == (3, side, side)
    return {"library": library, "model": type(processor).__name__, "names_that_do_not_fit": [],
            "mean_difference_of_pixels": float(np.abs(found.transpose(1, 2, 0) - wanted).mean())}


def _timm(place: Path, ours: dict, method: str) -> list[dict]:
    import timm
    import torch

    library = f"timm {timm.__version__}"
    model = timm.create_model(f"local-dir:{place / 'timm'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    key = "logits" if method == "supervised" else "features"
    with torch.no_grad():
        line = _line(library, type(model).__name__, [], model(_pixels(ours)), ours[key])
    labels = model.pretrained_cfg.get("label_names")
    assert (tuple(labels) == CLASSES) if method == "supervised" else not labels
    assert f"{ours['images'].shape[1]}" in str(transform)
    timm.models.save_for_hf(model, place / f"saved_{library.replace(' ', '-')}", safe_serialization=True)
    return [line]


def read(folder: Path) -> None:
    """Reads what the libraries saved, compares it bit for bit, and writes the results."""
    from etils import epath

    from mae_jax.interop import layouts
    from mae_jax.param_tree import flatten
    from mae_jax.storage import weight_files

    lines = [line for file in sorted(folder.glob("loaded_*.json")) for line in json.loads(file.read_text())]
    for number, (name, (method, side, fields, _)) in enumerate(CASES.items()):
        config = _config(method, side, fields)
        wanted = flatten(layouts.get("hf").part(_random(config, number), config))
        for saved in sorted((folder / f"case{number}").glob("saved_*")):
            found = flatten(layouts.read(weight_files.load(weight_files.file_of(epath.Path(saved)))[0], config))
            same = sum(np.array_equal(leaf, wanted[key]) for key, leaf in found.items())
            lines.append({"case": name, "library": saved.name.removeprefix("saved_").replace("-", " "),
                          "model": "saved by it, read by us", "arrays": len(found), "equal_bit_for_bit": same})
    RESULTS.mkdir(exist_ok=True)
    lines.sort(key=lambda line: (list(CASES).index(line["case"]), line["library"]))
    (RESULTS / "exports.json").write_text(json.dumps(lines, indent=1) + "\n")
    bad = [line for line in lines if line.get("error", 0) > TOLERANCE or line.get("names_that_do_not_fit")
           or line.get("arrays") != line.get("equal_bit_for_bit")]
    (RESULTS / "exports.md").write_text(_table(lines))
    print(f"{len(lines)} checks, {len(bad)} failed", *bad, sep="\n")
    sys.exit(bool(bad))


def _table(lines: list[dict]) -> str:
    rows = ["# Exports in timm and transformers", "",
            "Random models, exported, loaded by the libraries and compared in float32 on CPUs",
            "(`tests/interop/check_exports.py`). Errors are of the largest value. What a library saved of what it",
            "had loaded, our reader read again.", "",
            "| model | library | as | result |", "|---|---|---|---|"]
    for line in lines:
        result = (f"off by {line['error']:.1e}" if "error" in line else
                  f"pixels differ by {line['mean_difference_of_pixels']:.1e} on average, of ±2" if
                  "mean_difference_of_pixels" in line else
                  f"{line['equal_bit_for_bit']} of {line['arrays']} arrays are equal bit for bit")
        if line.get("names_that_do_not_fit"):
            result += f"; {len(line['names_that_do_not_fit'])} names do not fit"
        rows.append(f"| {line['case']} | {line['library']} | {line['model']} | {result} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    {"make": make, "load": load, "read": read, "onnx": onnx}[sys.argv[1]](Path(sys.argv[2]).resolve())
