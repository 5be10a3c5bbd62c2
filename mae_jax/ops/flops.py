"""Analytic FLOPs of transformer blocks."""


def blocks_flops(tokens: int, width: int, depth: int, mlp_ratio: int) -> int:
    """Forward FLOPs of Transformer blocks over one sequence: 2 per multiply-add of every matrix product."""
    linears = (4 + 2 * mlp_ratio) * tokens * width**2
    attention = 2 * tokens**2 * width
    return 2 * depth * (linears + attention)


def conv_flops(cells: float, side: int, inputs: int, features: int) -> int:
    """Returns the FLOPs of a convolution by side x side cells at so many places, zeros around the map included."""
    return int(2 * cells * side**2 * inputs * features)
