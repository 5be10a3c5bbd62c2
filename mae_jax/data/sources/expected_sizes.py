"""Numbers of examples in the splits of well-known data sets, to detect incomplete copies.

The numbers are from TFDS's catalog; Caltech-101's split is the usual one of 30 training images per class. FGVC
Aircraft, iNaturalist 2019 and ADE20K's scene parsing are read from folders, under these names (data.name), with their
authors' numbers.
"""

from mae_jax.errors import UserError

SIZES = {
    "ade20k": {"train": 20_210, "val": 2000},
    "aircraft": {"train": 6667, "test": 3333},
    "caltech101": {"train": 3060, "test": 6084},
    "cars196": {"train": 8144, "test": 8041},
    "coco/2017": {"train": 118_287, "validation": 5000},
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "domainnet/clipart": {"train": 33_525, "test": 14_604},
    "domainnet/painting": {"train": 50_416, "test": 21_850},
    "domainnet/sketch": {"train": 48_212, "test": 20_916},
    "dtd": {"train": 1880, "validation": 1880, "test": 1880},
    "food101": {"train": 75_750, "validation": 25_250},
    "i_naturalist2018": {"train": 437_513, "validation": 24_426},
    "inaturalist2019": {"train": 265_240, "validation": 3003},
    "imagenet2012": {"train": 1_281_167, "validation": 50_000},
    "imagenet2012_subset/1pct": {"train": 12_811, "validation": 50_000},
    "imagenet2012_subset/10pct": {"train": 128_116, "validation": 50_000},
    "imagenet_a": {"test": 7500},
    "imagenet_r": {"test": 30_000},
    "imagenet_sketch": {"test": 50_889},
    "imagenet_v2/matched-frequency": {"test": 10_000},
    "oxford_flowers102": {"train": 1020, "validation": 1020, "test": 6149},
    "oxford_iiit_pet": {"train": 3680, "test": 3669},
    "scene_parse150": {"train": 20_210, "test": 2000},
    "sun397/standard-part1-120k": {"train": 19_850, "test": 19_850},
    "voc/2007": {"train": 2501, "validation": 2510, "test": 4952},
}


def check_size(name: str, split: str, size: int) -> None:
    """Raises UserError if a whole split of a data set in the table has another number of examples.

    Args:
      name: TFDS's name, with the config after the slash if there are several; for a folder, data.name.
    """
    expected = SIZES.get(name, {}).get(split, size)
    if size != expected:
        raise UserError(f"the data set {name} has {size} of the expected {expected} examples in {split!r}; prepare "
                        "it again")
