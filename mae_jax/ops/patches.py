"""The grid of patches, conversion of images to patches and back, and normalization of pixels."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mae_jax.errors import UserError

if TYPE_CHECKING:
    import jax

# Per-channel statistics of ImageNet RGB in [0, 1], as torchvision and MAE (A.1) use them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class PatchGrid(NamedTuple):
    """The division of an RGB image into N = rows · columns patches in raster order."""

    rows: int
    columns: int
    patch_height: int  # pixels
    patch_width: int

    @classmethod
    def of(cls, config: ConfigDict) -> "PatchGrid":
        """Returns the grid of `config.data.image_size` and `config.model.patch`.

        Raises:
          UserError: a side of the image is not a multiple of the patch size.
        """
        sides = []
        for name, pixels, patch in zip(("height", "width"), config.data.image_size, config.model.patch, strict=True):
            if pixels <= 0 or pixels % patch:
                down, up = pixels // patch * patch, (pixels // patch + 1) * patch
                raise UserError(f"data.image_size: {name} {pixels} is not a multiple of the patch size {patch}; "
                                f"nearest: {up if down <= 0 else f'{down} and {up}'}")
            sides.append(pixels // patch)
        return cls(*sides, *config.model.patch)

    @property
    def shape(self) -> tuple[int, int]:
        """Patches along (height, width)."""
        return self.rows, self.columns

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return self.patch_height, self.patch_width

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.rows * self.patch_height, self.columns * self.patch_width

    @property
    def num_patches(self) -> int:
        """N, the number of patches."""
        return self.rows * self.columns

    @property
    def patch_dim(self) -> int:
        """P, the number of values of a patch, which are ordered by row, column and channel (fastest)."""
        return self.patch_height * self.patch_width * 3

    def patchify(self, image: np.ndarray) -> np.ndarray:
        """Cuts an image [height, width, C] into patches [N, patch height · patch width · C] in raster order (host)."""
        channels = image.shape[-1]
        tiles = image.reshape(self.rows, self.patch_height, self.columns, self.patch_width, channels).swapaxes(1, 2)
        return tiles.reshape(self.num_patches, self.patch_height * self.patch_width * channels)

    def unpatchify(self, patches: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Puts patches [B, N, P] in the order int32 [B, N] together to images [B, height, width, 3] (host)."""
        raster = np.empty_like(patches)
        np.put_along_axis(raster, order[..., None].astype(np.int64), patches, axis=1)
        tiles = raster.reshape(-1, *self.shape, *self.patch, 3)
        return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *self.image_size, 3)

    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the row and the column in the image of each value of the patches, int32 [N, P] each."""
        def spread(values: np.ndarray) -> np.ndarray:
            return np.repeat(self.patchify(values[..., None]), 3, axis=1)

        rows, columns = np.indices(self.image_size, np.int32)
        return spread(rows), spread(columns)


def normalize(patches: "jax.Array") -> "jax.Array":
    """Normalizes uint8 patches [..., P], channel fastest, with ImageNet's mean and standard deviation; float32."""
    repeats = patches.shape[-1] // 3
    # One multiply-add: x / 255 / std - mean / std.
    scale = np.tile(1 / (255 * np.array(STD)), repeats).astype(np.float32)
    shift = np.tile(np.array(MEAN) / np.array(STD), repeats).astype(np.float32)
    return patches.astype(np.float32) * scale - shift


def denormalize(patches: np.ndarray) -> np.ndarray:
    """Inverts `normalize` on the host: float [..., P] → float32 pixel values, 0 to 255 but not clipped."""
    repeats = patches.shape[-1] // 3
    return (patches * np.tile(STD, repeats) + np.tile(MEAN, repeats)).astype(np.float32) * 255
