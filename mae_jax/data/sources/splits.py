"""Split expressions: 'train', 'test[:10%]', 'train[100:500]', 'train+validation', with TFDS's meaning."""

import hashlib
import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mae_jax.errors import UserError, did_you_mean

HELD_OUT = ("test", "val", "validation")  # the usual names of the held-out split; `role` knows others
ROLES = {  # role of a split → its usual names
    "train": ("train", "training", "trn", "trainval"),
    "val": ("val", "valid", "validation", "validate", "validating", "dev", "devel", "development", "vali"),
    "test": ("test", "testing", "tst", "eval", "evaluation", "evaluate", "heldout", "holdout"),
}
# Words that may accompany such a name in a folder's name: ILSVRC2012_img_train, test_set, seg_train, train2017.
_FILLERS = {"set", "data", "dataset", "split", "image", "images", "img", "imgs", "picture", "pictures", "pics", "photo",
            "photos", "jpg", "jpeg", "png", "ilsvrc", "imagenet", "clsloc", "cls", "loc", "seg", "my", "the", "all"}
HELD_OUT_SHARE = 0.1  # of data without splits

_EXPRESSION = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>\d+%?)?:(?P<stop>\d+%?)?\])?")


class Split(NamedTuple):
    """A named part of a data set, and a slice of it."""

    name: str
    start: str = ""  # '' | '500' | '10%'
    stop: str = ""

    def shares(self, low: float, high: float) -> tuple[float, float]:
        """Returns the slice of the shares [low, high); raises UserError if a bound counts examples."""
        if any(bound and not bound.endswith("%") for bound in (self.start, self.stop)):
            raise UserError(f"the split {str(self)!r}: slices of a folder are in percent, by a hash of each file's "
                            f"name, such as '{self.name}[:10%]'")
        start, stop = int(self.start[:-1] or 0), int(self.stop[:-1] or 100)
        return low + (high - low) * start / 100, low + (high - low) * stop / 100

    def bounds(self, size: int) -> tuple[int, int]:
        """Returns first and one-past-last index of the slice of a split of `size` examples."""
        start, stop = _index(self.start or "0%", size), _index(self.stop or "100%", size)
        return start, max(start, stop)

    def __str__(self) -> str:
        return f"{self.name}[{self.start}:{self.stop}]" if self.start or self.stop else self.name


def parse(expression: str) -> Split:
    """Parses a split expression; raises UserError."""
    match = _EXPRESSION.fullmatch(expression.strip())
    if not match:
        raise UserError(f"cannot read the split {expression!r}; write 'train', 'train[:10%]' or 'train[100:500]'")
    split = Split(match["name"], match["start"] or "", match["stop"] or "")
    for bound in (split.start, split.stop):
        if bound.endswith("%") and int(bound[:-1]) > 100:
            raise UserError(f"the split {expression!r} exceeds 100%")
    return split


def parts(expression: str) -> list[Split]:
    """Parses a sum of splits, 'train+validation', or a single split; raises UserError."""
    return [parse(part) for part in expression.split("+")]


def _index(bound: str, size: int) -> int:
    """Converts a bound to an index; percents round to the closest example, as TFDS does."""
    if bound.endswith("%"):
        return round(int(bound[:-1]) * size / 100)
    return min(int(bound), size)


def overlap(one: Split, other: Split) -> bool:
    """Returns whether two slices of one split may share examples, as a slice in percent and one in examples always may.
    """
    bounds = [bound for bound in (one.start, one.stop, other.start, other.stop) if bound]
    percent = {bound.endswith("%") for bound in bounds}
    if len(percent) > 1:
        return True
    size = sys.maxsize if percent == {False} else 100
    (start, stop), (first, last) = one.bounds(size), other.bounds(size)
    return max(start, first) < min(stop, last)


def role(name: str) -> str:
    """Returns the role of a split from its usual names, in any case: 'train', 'val', 'test', or '' for another name."""
    text = unicodedata.normalize("NFC", name).casefold()
    words = re.findall(r"[^\W\d_]+", re.sub(r"held[\W_]?out", "heldout", re.sub(r"hold[\W_]?out", "holdout", text)))
    words = [word for word in words if word not in _FILLERS]
    if len(words) != 1:
        return ""
    word = words[0]
    for ending in ("", "set", "data", "images"):  # testset, traindata
        stem = word.removesuffix(ending)
        for found, usual in ROLES.items():
            if stem in usual:
                return found
    return ""


def held_out_name(name: str) -> str:
    """Returns the name of a split in data without splits, whose held-out part has several names."""
    return {"val": HELD_OUT[0], "test": HELD_OUT[0], "train": "train"}.get(role(name), name)


def holds_out(data: ConfigDict) -> bool:
    """Returns whether the config uses a held-out part of data without splits."""
    used = (data.train_split, data.val_split, data.eval_split)
    return any(held_out_name(split.name) == HELD_OUT[0] for text in used if text for split in parts(text))


def part(name: str, held_out: bool) -> tuple[float, float]:
    """Returns the shares [low, high) of data without splits for 'train' or the held-out tenth.

    Args:
      name: 'train', or 'test' under any of its names.
      held_out: whether anything is held out; if not, 'train' is everything.

    Raises:
      UserError: the name is unknown.
    """
    if not role(name):
        raise UserError(f"unknown split {name!r}; {did_you_mean(name, ('train', *HELD_OUT))}")
    edge = 1 - HELD_OUT_SHARE * held_out
    return (0.0, edge) if role(name) == "train" else (edge, 1.0)


def within(names: Iterable[str], start: float, stop: float) -> np.ndarray:
    """Returns the indices of the names whose share is in [start, stop), int64 [n], ascending.

    Of several names at least one is among the held-out tenth: the last, if the hash of none says so.
    """
    shares = np.fromiter(map(share, names), np.float64)
    if len(shares) > 1:
        last = shares.argmax()
        shares[last] = max(shares[last], 1 - HELD_OUT_SHARE)
    return np.flatnonzero((start <= shares) & (shares < stop))


def share(name: str) -> float:
    """Returns the hash of an example's name as a number in [0, 1), independent of other examples."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=6).digest()) / 2**48
