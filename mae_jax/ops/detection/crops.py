"""Packed crops of object masks, as the host sends them. It imports only NumPy, for worker processes."""

import numpy as np

CROP = 112  # cells per side of an object's mask, which is cropped and resized to its box (our choice, as TF Vision)
PACKED = CROP**2 // 8  # bytes per packed crop


def pack(crop: np.ndarray) -> np.ndarray:
    """Packs crops bool [..., CROP, CROP] into bits, uint8 [..., PACKED]."""
    return np.packbits(crop.reshape(*crop.shape[:-2], -1), -1)
