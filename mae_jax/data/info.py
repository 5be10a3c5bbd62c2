"""Information that methods and data exchange before a batch is made: needs of the method, properties of the data."""

from typing import NamedTuple

from mae_jax.data.cluster_ids import Clusters


class DataNeeds(NamedTuple):
    """Needs of a method, from its own config fields; this package does not read those fields."""

    mixing_group: int = 1  # rows of a batch that are mixed with one another
    clusters: str | None = None  # folder that defines the batch field `cluster`
    vocabulary: int = 0  # exclusive upper bound of the batch field `tokens`


class DataInfo(NamedTuple):
    """Properties of the data that a method is built from, besides the config."""

    num_train: int = 0  # examples per epoch
    classes: tuple[str, ...] = ()
    multi_label: bool = False  # an image can have any number of classes
    clusters: Clusters | None = None  # None unless the method needs them
    wide_ids: bool = False  # a split has more examples than 31 bits count: `id` has two words (ops/example_ids.py)

    @property
    def single_label_classes(self) -> tuple[str, ...]:
        """The classes if every image has at most one, else ()."""
        return () if self.multi_label else self.classes


NO_NEEDS = DataNeeds()
NO_DATA = DataInfo()
# ImageNet-1K, which plan and bench assume, since they open no data.
ASSUMED = DataInfo(1_281_167, tuple(map(str, range(1000))))
