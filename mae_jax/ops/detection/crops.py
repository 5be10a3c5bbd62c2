"""Masks of objects as the host sends them: cut to their boxes, and packed. NumPy alone, for worker processes."""

import numpy as np

CROP = 112  # cells per side of the crop of an object's mask, in the frame of its box (our choice; TF Vision's)
PACKED = CROP**2 // 8  # bytes of it


def pack(crop: np.ndarray) -> np.ndarray:
    """Returns uint8 [..., PACKED] for bool [..., CROP, CROP]."""
    return np.packbits(crop.reshape(*crop.shape[:-2], -1), -1)
