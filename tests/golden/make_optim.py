"""Writes optim.npz: where AdamW and SGD of PyTorch and LAMB of timm take a few parameters in a few steps.

  python tests/golden/make_optim.py      (needs torch and timm; the tests that read the file need neither)

Everything is computed in float64, so that the file is the truth to float32's last digit. Each parameter is a group of
its own, with its weight decay and the learning rate that layer-wise decay leaves it. One matrix starts at zero, one
gets no gradient in the first step, and some gradients are longer than the norm that they are clipped to.
"""

from pathlib import Path

import numpy as np
import torch
from timm.optim.lamb import Lamb

RATES = (0.02, 0.05, 0.03, 0.01)  # learning rate of each step
WEIGHT_DECAY, BETAS, EPS, MOMENTUM, CLIP, LAYER_DECAY = 0.1, (0.8, 0.9), 1e-6, 0.9, 1.0, 0.65
# Name → shape and factor of the learning rate under layer-wise decay, for an encoder of two blocks.
PARAMETERS = {
    "encoder/cls_token": ((1, 1, 4), LAYER_DECAY**3),
    "encoder/pos_embed": ((1, 5, 4), LAYER_DECAY**3),
    "encoder/patch_embed/kernel": ((3, 4), LAYER_DECAY**3),
    "encoder/patch_embed/bias": ((4,), LAYER_DECAY**3),
    "encoder/block_00/mlp/fc1/kernel": ((4, 8), LAYER_DECAY**2),
    "encoder/block_01/mlp/fc1/kernel": ((4, 8), LAYER_DECAY),
    "encoder/block_01/norm1/scale": ((4,), LAYER_DECAY),
    "encoder/norm/scale": ((4,), 1.0),
    "head/kernel": ((4, 3), 1.0),
    "head/bias": ((3,), 1.0),
}
OPTIMISERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=BETAS, eps=EPS),
    "lamb": lambda groups: Lamb(groups, betas=BETAS, eps=EPS, max_grad_norm=CLIP),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=MOMENTUM),
}


def run(name: str, layered: bool, start: dict[str, np.ndarray], grads: list[dict[str, np.ndarray]]) -> dict:
    """Returns the parameters after the last step, float32."""
    params = {key: torch.nn.Parameter(torch.from_numpy(value).double()) for key, value in start.items()}
    decays = {key: WEIGHT_DECAY if key.endswith(("kernel", "cls_token")) else 0.0 for key in start}
    optimiser = OPTIMISERS[name]([{"params": [params[key]], "weight_decay": decays[key], "lr": 0.0} for key in start])
    for rate, grad in zip(RATES, grads, strict=True):
        for group, (key, (_, factor)) in zip(optimiser.param_groups, PARAMETERS.items(), strict=True):
            group["lr"] = rate * (factor if layered else 1)
            params[key].grad = torch.from_numpy(grad[key]).double()
        optimiser.step()
    return {key: value.detach().numpy().astype(np.float32) for key, value in params.items()}


def main() -> None:
    rng = np.random.default_rng(0)

    def draw(scale: float) -> dict[str, np.ndarray]:
        return {key: (scale * rng.normal(size=shape)).astype(np.float32) for key, (shape, _) in PARAMETERS.items()}

    start, grads = draw(0.5), [draw(scale) for scale in (0.01, 1.0, 0.1, 0.03)]
    start["head/kernel"][:] = grads[0]["encoder/block_00/mlp/fc1/kernel"][:] = 0
    arrays = {"rates": np.array(RATES)} | {f"start/{key}": value for key, value in start.items()}
    arrays |= {f"grad{i}/{key}": value for i, grad in enumerate(grads) for key, value in grad.items()}
    for name in OPTIMISERS:
        for case, layered in ((name, False), (f"{name}_layered", True)):
            arrays |= {f"{case}/{key}": value for key, value in run(name, layered, start, grads).items()}
    np.savez_compressed(Path(__file__).with_name("optim.npz"), **arrays)


if __name__ == "__main__":
    main()
