"""Expert perceptrons in place of a block's own (MoCE, arXiv 2402.05382), and the gate of tokens beside it."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.models.layers import GELUS, INITS, TOKEN_STD
from mae_jax.ops.expert_linear import expert_linear
from mae_jax.ops.routing import Choice, choose

GATES = "gates"  # the Flax collection of what gates inside blocks give each token: probabilities [B, T, E]


@dataclass(frozen=True)
class Gating:
    """The experts of a block. Who chooses is outside of it, or with `tokens`, a gate that reads each token."""

    experts: int
    tokens: bool = False
    temperature: float = 1.0  # of that gate
    straight: bool = True  # see `routing.choose`


class ExpertLinear(nn.Module):
    """A linear layer with one kernel per expert, [B, T, K] → [B, T, F]; each image goes through that of its own."""

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
    """E perceptrons over tokens [B, T, D]: each image goes through the one of its choice, or each token.

    Where tokens choose, `choice` is the noise of their gate, [B, T, E], or None.
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
            raise ValueError("whose expert? the block was given no choice")
        hidden = ExpertLinear(count, self.ratio * shape[-1], self.dtype, self.init, name="fc1")(x, choice.expert)
        hidden = GELUS[self.gelu](hidden)
        out = ExpertLinear(count, shape[-1], self.dtype, self.init, name="fc2")(hidden, choice.expert)
        weighted = out.astype(jnp.float32) * choice.weight[:, None, None]  # whose gradient sums in float32
        return weighted.astype(out.dtype).reshape(shape)


class TokenGate(nn.Module):
    """Chooses an expert for each token [B, T, D] by what it is, as sparse mixtures do (V-MoE, arXiv 2106.05974).

    Noise [B, T, E] joins the logits of the choice; what is sown, for the regularisers, has none.
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
