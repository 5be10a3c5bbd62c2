"""What methods and data tell each other before a batch is made: what a method needs, and what the data have."""

from typing import NamedTuple

from mae_jax.data.cluster_ids import Clusters


class DataNeeds(NamedTuple):
    """What a method's own config fields ask of the data; the data read none of these fields themselves."""

    mixing_group: int = 1  # so many neighbours of a batch are mixed with one another
    clusters: str | None = None  # the folder that the batch field `cluster` is of
    vocabulary: int = 0  # the batch field `tokens` is below it


class DataInfo(NamedTuple):
    """What a method is built from besides the config."""

    num_train: int = 0  # examples of an epoch
    classes: tuple[str, ...] = ()
    multi_label: bool = False  # an image has any number of classes
    clusters: Clusters | None = None  # where the method needs them
    wide_ids: bool = False  # a split has more examples than 31 bits count: `id` has two words (ops/example_ids.py)

    @property
    def single_label_classes(self) -> tuple[str, ...]:
        """The classes, where every image has one at most."""
        return () if self.multi_label else self.classes


NO_NEEDS = DataNeeds()
NO_DATA = DataInfo()
# ImageNet-1K: what plan and bench, which open no data, take the data for.
ASSUMED = DataInfo(1_281_167, tuple(map(str, range(1000))))
