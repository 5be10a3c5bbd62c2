"""Transforms of one example on the host: crop, color, RandAugment, patchify."""
