"""Writes vitmae.npz: what Hugging Face's ViTMAEForPreTraining computes with tiny random weights.

  python tests/golden/make_vitmae.py      (needs torch and transformers; the tests that read the file need neither)

Two cases with the same weights: square images with normalized pixels, and images that are not square with plain
pixels. Everything is computed in float64, so that the file is the truth to float32's last digit. Biases, norm scales
and tokens are random too: a zero or a one would hide a wrong place.
"""

from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae import modeling_vit_mae as vit_mae

SHAPE = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96,
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64, "patch_size": 8, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
}
CASES = {
    "square": {"image_size": (32, 32), "mask_ratio": 0.75, "norm_pix_loss": True},
    "wide": {"image_size": (32, 48), "mask_ratio": 0.6, "norm_pix_loss": False},
}
IMAGES = 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def positions(rows: int, columns: int, width: int) -> torch.nn.Parameter:
    """Returns its own table [1, 1 + N, width], halves swapped as its released weights have them (columns first)."""
    table = vit_mae.build_2d_sinusoidal_position_embedding(rows, columns, width, cls_token=True, dtype=torch.float64)
    return torch.nn.Parameter(table.roll(width // 2, 1)[None], requires_grad=False)


def random_weights(model: ViTMAEForPreTraining, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns name → float32, for every trained parameter."""
    weights = {}
    for name, parameter in model.named_parameters():
        values = rng.standard_normal(parameter.shape)
        if parameter.dim() == 1:
            values = 0.3 * values + (name.endswith("weight"))  # norm scales around one, biases around zero
        elif "token" not in name:
            values /= np.sqrt(np.prod(parameter.shape[1:]))
        if parameter.requires_grad:
            weights[name] = values.astype(np.float32)
    return weights


def make_model(case: dict, weights: dict[str, np.ndarray]) -> ViTMAEForPreTraining:
    """Returns the model in float64.

    Made from a config, it has zeros for positions, which only its released weights fill; and its initialization and its
    loss take images to be square unless positions are interpolated, which these need not be.
    """
    config = ViTMAEConfig(**SHAPE, **case, attn_implementation="sdpa")
    with (mock.patch.object(vit_mae.ViTMAEEmbeddings, "initialize_weights"),
          mock.patch.object(vit_mae.ViTMAEDecoder, "initialize_weights")):
        model = ViTMAEForPreTraining(config).double().eval()
    grid = [side // config.patch_size for side in case["image_size"]]
    model.vit.embeddings.position_embeddings = positions(*grid, config.hidden_size)
    model.decoder.decoder_pos_embed = positions(*grid, config.decoder_hidden_size)
    patchify = model.patchify
    model.patchify = lambda pixels, interpolate_pos_encoding: patchify(pixels, interpolate_pos_encoding=True)
    for name, values in weights.items():
        model.get_parameter(name).data = torch.from_numpy(values).double()
    return model


def run(case: dict, weights: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    model = make_model(case, weights)
    pictures = rng.integers(0, 256, (IMAGES, *case["image_size"], 3), np.uint8)
    pixels = torch.from_numpy((pictures / 255 - MEAN) / STD).permute(0, 3, 1, 2)
    patches = np.prod(case["image_size"]) // SHAPE["patch_size"] ** 2
    order = rng.permuted(np.tile(np.arange(patches), (IMAGES, 1)), axis=1)
    noise = torch.from_numpy(np.argsort(order) / patches)  # its argsort is the order
    out = model(pixels, noise=noise)
    out.loss.backward()
    hidden = order[:, int(patches * (1 - case["mask_ratio"])):]
    results = {"pictures": pictures, "order": order.astype(np.int32), "loss": out.loss.detach().numpy(),
               "predictions": np.take_along_axis(out.logits.detach().numpy(), hidden[..., None], 1).astype(np.float32)}
    return results | {f"gradient/{name}": model.get_parameter(name).grad.numpy().astype(np.float32) for name in weights}


def main() -> None:
    rng = np.random.default_rng(0)
    weights = random_weights(make_model(CASES["square"], {}), rng)
    arrays = {f"weight/{name}": values for name, values in weights.items()}
    for name, case in CASES.items():
        arrays |= {f"{name}/{key}": values for key, values in run(case, weights, rng).items()}
    np.savez_compressed(Path(__file__).with_name("vitmae.npz"), **arrays)


if __name__ == "__main__":
    main()
