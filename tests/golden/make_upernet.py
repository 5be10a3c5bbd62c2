"""Writes upernet.npz: what Hugging Face's UperNetForSemanticSegmentation computes with tiny random weights.

  TORCHDYNAMO_DISABLE=1 python tests/golden/make_upernet.py     (needs torch and transformers; readers need neither)

The backbone is BEiT's with relative position biases, layer scale, and the transposed convolutions that make a pyramid
of four blocks. Everything is computed in float64. Biases, scales, running moments and tables are random: a zero or a
one would hide a wrong place. Once as it predicts, by the running moments; once as it trains, by those of the batch.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import BeitConfig, UperNetConfig, UperNetForSemanticSegmentation

SIDE, PATCH, WIDTH, CLASSES, IMAGES = 64, 16, 16, 5, 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GRADIENTS = (  # of which parameters
    "backbone.encoder.layer.0.attention.attention.relative_position_bias.relative_position_bias_table",
    "backbone.encoder.layer.3.attention.attention.relative_position_bias.relative_position_bias_table",
    "backbone.encoder.layer.1.lambda_1", "backbone.fpn1.0.weight", "backbone.fpn1.0.bias", "backbone.fpn1.1.weight",
    "backbone.fpn2.0.weight", "decode_head.psp_modules.2.1.conv.weight", "decode_head.bottleneck.conv.weight",
    "decode_head.lateral_convs.1.conv.weight", "decode_head.fpn_convs.0.conv.weight",
    "decode_head.fpn_bottleneck.batch_norm.bias", "auxiliary_head.convs.0.conv.weight",
    "auxiliary_head.classifier.weight", "backbone.embeddings.patch_embeddings.projection.bias",
)


def make_model() -> UperNetForSemanticSegmentation:
    backbone = BeitConfig(
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=2, intermediate_size=4 * WIDTH, image_size=SIDE,
        patch_size=PATCH, layer_norm_eps=1e-6, hidden_act="gelu", layer_scale_init_value=0.1, drop_path_rate=0.0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, use_relative_position_bias=True,
        use_absolute_position_embeddings=True, add_fpn=True, reshape_hidden_states=True, batch_norm_eps=1e-5,
        out_features=[f"stage{n}" for n in (1, 2, 3, 4)], attn_implementation="eager")
    config = UperNetConfig(backbone_config=backbone, hidden_size=12, auxiliary_in_channels=WIDTH,
                           auxiliary_channels=8, auxiliary_in_index=2, num_labels=CLASSES)
    return UperNetForSemanticSegmentation(config).double()


def randomized(model: torch.nn.Module, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Fills parameters and running moments; returns name → float32 of all of them."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        values = rng.standard_normal(tuple(tensor.shape))
        if name.endswith("running_var"):
            values = 0.5 + values**2
        elif tensor.dim() == 1:
            values = 0.3 * values + (name.endswith("weight") or "lambda" in name)
        elif "table" not in name and "token" not in name and "position" not in name:
            values *= np.sqrt(2 / np.prod(tensor.shape[1:]))
        weights[name] = values.astype(np.float32)
        tensor.copy_(torch.from_numpy(weights[name].astype(np.float64)))
    return weights


def main() -> None:
    rng = np.random.default_rng(0)
    model = make_model()
    with torch.no_grad():
        weights = randomized(model, rng)
    images = rng.integers(256, size=(IMAGES, SIDE, SIDE, 3)).astype(np.uint8)
    labels = rng.choice([*range(CLASSES), 255], size=(IMAGES, SIDE // 8, SIDE // 8)).repeat(8, 1).repeat(8, 2)
    pixels = torch.from_numpy(((images / 255 - MEAN) / STD).transpose(0, 3, 1, 2))
    found = {f"weights/{name}": value for name, value in weights.items()}
    found |= {"images": images, "labels": labels.astype(np.uint8)}
    wanted = torch.from_numpy(labels.astype(np.int64))
    with torch.no_grad():
        out = model.eval()(pixels, labels=wanted)
    found |= {"eval/loss": out.loss.numpy(), "eval/logits": out.logits.numpy().astype(np.float32)}
    out = model.train()(pixels, labels=wanted)
    out.loss.backward()
    named = dict(model.named_parameters())
    found |= {"train/loss": out.loss.detach().numpy()}
    found |= {f"train/gradient/{name}": named[name].grad.numpy().astype(np.float32) for name in GRADIENTS}
    found |= {f"train/moments/{name}": value.numpy().astype(np.float32) for name, value in model.state_dict().items()
              if "running" in name}
    np.savez_compressed(Path(__file__).with_name("upernet.npz"), **found)


if __name__ == "__main__":
    main()
