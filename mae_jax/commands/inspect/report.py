"""The text of an audit (data/audit.py): a few lines for each split, and the images that several splits share.

And the line about data that were stored.
"""

import itertools
import shlex
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from mae_jax.errors import pluralize, printable

if TYPE_CHECKING:
    from mae_jax.data.audit import Audit

MAX_LISTED_IMAGES = 50  # broken images in the text
MAX_SHOWN_EXAMPLES = 3  # examples of other findings
INDENT = " " * 13


def split_lines(split: str, audit: "Audit", image_size: tuple[int, int]) -> list[str]:
    """Returns the lines about one split.

    Args:
      split: its name in the text.
      audit: its audit.
      image_size: height and width of the model's images in pixels.
    """
    good = audit.good()
    read = len(good) + len(audit.broken)
    lines = [f"{split}: {pluralize(read, 'image')}, {len(audit.broken) or 'none'} broken; "
             f"{read / audit.seconds:.0f}/s decoded in full", *broken_names(audit.broken), *_records(audit, read)]
    if not len(good):
        return lines
    if audit.source.classes:
        lines.append(_row("labels", _labels(audit)))
    lines.append(_row("sizes", _sizes(audit.sizes[good], image_size, _has_objects(audit))))
    if any(audit.formats):
        more = f"; {len(audit.misnamed)} by another extension: {_some(audit.misnamed)}" if audit.misnamed else ""
        lines.append(_row("formats", _counts(audit.formats.most_common()) + more))
    if audit.converted:
        lines.append(_row("converted", _counts(audit.converted.most_common())))
    if audit.blank.any():
        lines.append(_row("blank", f"{audit.blank.sum()} of one color alone"))
    return lines + _copies(audit)


def broken_names(broken: list[str]) -> list[str]:
    """Returns the lines about the first 50 broken images, each 'name: reason'."""
    rest = [f"  and {len(broken) - MAX_LISTED_IMAGES} more"] if len(broken) > MAX_LISTED_IMAGES else []
    return [f"  {name}" for name in broken[:MAX_LISTED_IMAGES]] + rest


def leak_lines(audits: dict[str, "Audit"]) -> list[str]:
    """Returns the lines about images that are in more than one split."""
    lines = []
    for (one, first), (other, second) in itertools.combinations(audits.items(), 2):
        known, keys = first.keys(), second.keys()
        shared = np.flatnonzero(np.isin(keys, known))
        if not len(shared):
            continue
        lines.append(f"leak: {pluralize(len(shared), 'image')} of {other} also in {one}:")
        for place in shared[:MAX_SHOWN_EXAMPLES]:
            twin = first.shown()[np.flatnonzero(known == keys[place])[0]]
            lines.append(f"  {other} {second.name(int(second.shown()[place]))} = {one} {first.name(int(twin))}")
        lines += [f"  and {len(shared) - MAX_SHOWN_EXAMPLES} more"] if len(shared) > MAX_SHOWN_EXAMPLES else []
    return lines


def _records(audit: "Audit", read: int) -> list[str]:
    """Returns the lines about the number of records, for data in files of records; [] for other data."""
    counts = getattr(audit.source, "counts", ())
    if not counts:
        return []
    span = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{max(counts)}"
    by = audit.source.promised_by
    promise = f"as {by} promises" if by else "counted: nothing says how many there should be"
    lost = f"; {audit.source.size - read} not read:" if read < audit.source.size else ""
    row = f"{audit.source.size} in {pluralize(len(counts), 'file')} of {span}, {promise}{lost}"
    return [_row("records", row), *(INDENT + fault for fault in audit.faults)]


def _has_objects(audit: "Audit") -> bool:
    return getattr(audit.source, "annotations", None) is not None


def _labels(audit: "Audit") -> str:
    classes = [printable(name) for name in audit.source.classes]
    counts = [audit.labels[label] for label in range(len(classes))]
    least, most = int(np.argmin(counts)), int(np.argmax(counts))
    span = f"{counts[least]} ({classes[least]}) to {counts[most]} ({classes[most]})"
    objects = _has_objects(audit)
    what = "objects" if objects else "images"
    text = f"{len(classes)} classes of {span if counts[least] < counts[most] else counts[most]} {what} each"
    if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
        text += f"; {len(empty)} without any: {_some(empty)}"
    if audit.unlabeled:
        text += f"; {pluralize(audit.unlabeled, 'image')} without {'an object' if objects else 'a label'}"
    if strange := sum(count for label, count in audit.labels.items() if label >= len(classes)):
        text += f"; {pluralize(strange, 'label')} of no class, up to {max(audit.labels)}"
    return text


def _sizes(sizes: np.ndarray, image_size: tuple[int, int], whole: bool) -> str:
    """Returns a text about width and height of images, int32 [n, 2]: least, median and largest by area.

    `whole`: images are fitted into the canvas, not cropped to its shape.
    """
    order = np.argsort(sizes.prod(1, dtype=np.int64), kind="stable")
    least, median, largest = ("{} x {}".format(*sizes[order[at]]) for at in (0, len(order) // 2, -1))
    below = sizes < image_size[::-1]
    small = int((below.all(1) if whole else below.any(1)).sum())
    text = f"{least} to {largest}, median {median}" if (sizes != sizes[0]).any() else f"all {least}"
    if small:
        sides = "both sides" if whole else "a side"
        text += f"; {small} have {sides} below data.image_size={tuple(image_size)}, and are enlarged"
    return text


def _copies(audit: "Audit") -> list[str]:
    from mae_jax.data.audit import copies

    numbers, (extra, groups) = audit.shown(), copies(audit.keys())
    if not extra:
        return []
    unit = "byte" if any(audit.formats) else "pixel"
    lines = [_row("copies", f"{extra} of them repeat another, {unit} for {unit}:")]
    for group in groups[:MAX_SHOWN_EXAMPLES]:
        names = " = ".join(audit.name(int(numbers[place])) for place in group[:MAX_SHOWN_EXAMPLES])
        more = len(group) - MAX_SHOWN_EXAMPLES
        lines.append(f"{INDENT}{names}{f' and {more} more' if more > 0 else ''}")
    if len(groups) > MAX_SHOWN_EXAMPLES:
        lines.append(f"{INDENT}and {len(groups) - MAX_SHOWN_EXAMPLES} more groups")
    return lines


def _row(title: str, text: str) -> str:
    return f"  {title:<{len(INDENT) - 2}}{text}"


def _counts(pairs: list[tuple[str, int]]) -> str:
    return ", ".join(f"{count} {what or 'pixels'}" for what, count in pairs)


def _some(names: list[str]) -> str:
    return ", ".join(names[:MAX_SHOWN_EXAMPLES]) + (", ..." if len(names) > MAX_SHOWN_EXAMPLES else "")


def written(kind: str, folder: epath.Path) -> str:
    """Returns a line about the data stored as `kind`, with the flags that read them."""
    source = {"array_record": "tfds --config.data.name=pictures"}.get(kind, kind)
    return f"{folder} is read by --config.data.source={source} --config.data.path={shlex.quote(str(folder))}"
