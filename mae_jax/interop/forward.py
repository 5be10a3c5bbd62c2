"""The encoder and its classifier as one function of images, for exported programs and for their verification."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.models.heads import Classifier
from mae_jax.models.layers import sincos_positions
from mae_jax.models.vit import make_encoder
from mae_jax.ops.patches import PatchGrid, normalize

Outputs = dict[str, jax.Array]


def forward(config: ConfigDict) -> Callable[[Any, jax.Array], Outputs]:
    """Returns the function (parameters, images uint8 [B, height, width, 3]) → outputs by name, float32.

    The outputs are 'features' [B, D] and, with a head, 'logits' [B, C]. Everything is computed in float32 with float32
    products on every device. Features are pooled as in evaluations (model.pool): the class token, or the mean of the
    patches before a classifier's norm.
    """
    config = config.copy_and_resolve_references()
    config.model.update(dtype="float32", scan=False, remat="none")
    grid, m = PatchGrid.of(config), config.model
    # Fixed positions are passed as a learned table, so that the program has no platform-dependent look-up.
    encoder = make_encoder(config).clone(positions="learned")

    def outputs(params: Any, images: jax.Array) -> Outputs:
        tree = params["encoder"]
        tree = {**tree, "pos_embed": tree["pos_embed"] if "pos_embed" in tree
                else jnp.asarray(sincos_positions(grid.shape, m.width))}
        tiles = images.reshape(-1, grid.rows, grid.patch_height, grid.columns, grid.patch_width, 3)
        patches = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, grid.num_patches, grid.patch_dim)
        order = jnp.arange(grid.num_patches, dtype=jnp.int32)[None]
        with jax.default_matmul_precision("float32"):
            tokens: Any = encoder.apply({"params": tree}, normalize(patches), order, block=-1 if "norm" in tree else
                                   m.depth - 1)
            features = tokens[:, 0] if m.pool == "cls" else tokens[:, 1:].mean(1)
            if "bias" not in params.get("head", {}):  # no head, or DINO's projection head
                return {"features": features}
            own = {name: params[name] for name in ("fc_norm", "head") if name in params}
            classifier = Classifier(np.shape(params["head"]["bias"])[0], "fc_norm" in own, 0.0)
            logits: Any = classifier.apply({"params": own}, features)
            return {"features": features, "logits": logits}

    return outputs
