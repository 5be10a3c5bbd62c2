"""Mixture-of-experts layers: expert MLPs in place of a block's MLP (MoCE, arXiv 2402.05382), and a token-level gate."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.models.layers import GELUS, INITS, TOKEN_STD
from mae_jax.ops.expert_linear import expert_linear
from mae_jax.ops.routing import Choice, choose

GATES = "gates"  # the Flax collection in which token gates sow their probabilities, float32 [B, T, E]


@dataclass(frozen=True)
class Gating:
    """Routing of a block with experts.

    Attributes:
      experts: number of experts E.
      tokens: True: a gate inside the block routes each token; False: the caller routes each image.
      temperature: of the token gate's softmax.
      straight: see `routing.choose`.
    """

    experts: int
    tokens: bool = False
    temperature: float = 1.0
    straight: bool = True


class ExpertLinear(nn.Module):
    """A linear layer with one kernel per expert, [B, T, K] → [B, T, features]; `expert`, int32 [B], selects kernels."""

    experts: int
    features: int
    dtype: Any
    init: str = "xavier"

    @nn.compact
    def __call__(self, x: jax.Array, expert: jax.Array) -> jax.Array:
        def each(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jnp.stack([INITS[self.init](key, shape[1:]) for key in jax.random.split(key, shape[0])])

        kernel = self.param("kernel", each, (self.experts, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.experts, self.features))
        return expert_linear(x.astype(self.dtype), kernel, bias, expert)


class Experts(nn.Module):
    """E expert MLPs over tokens [B, T, D], routed per image or per token.

    Per image, `choice` is a `Choice` of B rows. Per token, it is noise [B, T, E] for the gate's logits, or None.

    Raises:
      ValueError: images are routed, and `choice` is None.
    """

    gating: Gating
    ratio: int
    gelu: str
    dtype: Any
    init: str = "xavier"

    @nn.compact
    def __call__(self, x: jax.Array, choice: Choice | jax.Array | None) -> jax.Array:
        shape, count = x.shape, self.gating.experts
        if self.gating.tokens:
            choice = TokenGate(self.gating, name="gate")(x, choice)
            x = x.reshape(-1, 1, shape[-1])
        elif choice is None:
            raise ValueError("experts block called without a routing choice")
        hidden = ExpertLinear(count, self.ratio * shape[-1], self.dtype, self.init, name="fc1")(x, choice.expert)
        hidden = GELUS[self.gelu](hidden)
        out = ExpertLinear(count, shape[-1], self.dtype, self.init, name="fc2")(hidden, choice.expert)
        weighted = out.astype(jnp.float32) * choice.weight[:, None, None]  # float32: the weight's gradient is a sum
        return weighted.astype(out.dtype).reshape(shape)


class TokenGate(nn.Module):
    """Routes each token of x [B, T, D] to one expert by a linear gate (V-MoE, arXiv 2106.05974); returns B · T choices.

    `noise` [B, T, E] is added to the logits of the choice. The probabilities that the module sows into GATES, for the
    regularizers, are without noise.
    """

    gating: Gating

    @nn.compact
    def __call__(self, x: jax.Array, noise: jax.Array | None = None) -> Choice:
        kernel = self.param("kernel", nn.initializers.normal(TOKEN_STD), (x.shape[-1], self.gating.experts))
        logits = jnp.matmul(x.astype(jnp.float32), kernel, precision="highest")
        probabilities = jax.nn.softmax(logits / self.gating.temperature)
        self.sow(GATES, "probabilities", probabilities)
        if noise is not None:
            probabilities = jax.nn.softmax((logits + noise) / self.gating.temperature)
        return choose(probabilities.reshape(-1, self.gating.experts), self.gating.straight)
