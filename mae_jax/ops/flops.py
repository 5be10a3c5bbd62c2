"""Analytic FLOPs of Transformer blocks and convolutions."""


def blocks_flops(tokens: int, width: int, depth: int, mlp_ratio: int) -> int:
    """Returns the forward FLOPs of Transformer blocks for one sequence; each multiply-add of a matrix product counts 2.
    """
    linears = (4 + 2 * mlp_ratio) * tokens * width**2
    attention = 2 * tokens**2 * width
    return 2 * depth * (linears + attention)


def conv_flops(cells: float, side: int, inputs: int, features: int) -> int:
    """Returns the forward FLOPs of a side x side convolution at `cells` positions, zero padding included."""
    return int(2 * cells * side**2 * inputs * features)
