"""data.source=tar: WebDataset shards, tar archives in which members of one key are an example: 000123.jpg, 000123.cls.

data.path is a folder or a pattern (`patterns`), local or in a bucket. Without splits, a tenth is held out by a hash of
shard and key, if the config uses it. An index of all members, made once and cached (`storage.cache`), gives random
access. A key is a member's name up to the first dot after its last slash; the rest is the member's kind. The image is
the member of kind data.image_key, or of the first kind in IMAGES. The label is the text of data.label_key, or that
field of .json; by default of .cls, else the field `label` of .json, else .txt if its texts look like labels.
"""

import functools
import logging
import tarfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import IO, Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax.data.decode import decode_mask
from mae_jax.data.image_bounds import check_bytes
from mae_jax.data.sources import patterns, splits, text_labels
from mae_jax.data.sources.base import READERS, Example, Source
from mae_jax.data.sources.text_labels import USUAL, asked, sliced, told
from mae_jax.errors import UserError, did_you_mean, pluralize, printable
from mae_jax.runtime import bounded_json
from mae_jax.storage import cache, file_kinds, ranges
from mae_jax.storage.paths import version

log = logging.getLogger(__name__)

VERSION = 3  # of the index
IMAGES = {"common": ("jpg", "jpeg", "png", "webp", "bmp", "gif", "img", "image")}  # data.formats → image kinds
IMAGES["all"] = (*IMAGES["common"], "tif", "tiff", "avif", "heic", "heif")
ENDING, BLOCK = ".tar", tarfile.BLOCKSIZE
MAX_LABEL = 256  # bytes of a text that may be a label
MAX_JSON = 1 << 20  # bytes of a .json that is parsed


class Members(NamedTuple):
    """The examples of one shard, in the order of their images; n is their number."""

    keys: np.ndarray  # str [n]
    starts: np.ndarray  # int64 [n]: first byte of the image
    sizes: np.ndarray  # int64 [n]: bytes of the image
    masks: np.ndarray  # int64 [n, 2], start and size; -1 for none
    labels: np.ndarray  # str [n], '' for none
    captions: np.ndarray  # str [n], texts of .txt that may be labels; [0] if any is missing or has blanks
    kinds: np.ndarray  # str [any], kinds of the members, the image's first
    without: np.ndarray  # int64 [2]: keys without an image; members that are symbolic links or sparse


class _Wanted(NamedTuple):
    """The kinds of members to read; '' if not configured."""

    image: str
    label: str
    mask: str
    images: tuple[str, ...]  # kinds that are images


def load(data: ConfigDict, split: splits.Split) -> Source:
    """Opens a split; raises UserError if no shard fits, or one is truncated or damaged."""
    shards, found = _members(data, split.name)
    every = _source(data, split.name, shards, found)
    return sliced(data, every, split, ENDING)


def split_name(data: ConfigDict, name: str) -> str:
    """Returns the name of a split in the shards."""
    return patterns.split_name(data.path, ENDING, name)


def describe(data: ConfigDict, opened: Mapping[str, Source]) -> str:
    """Returns one line about the members that are images and labels."""
    shards, found = _members(data, splits.parts(data.get("train_split") or "train")[0].name)
    count = patterns.count(data.path, ENDING, (data[field] for field in opened))
    kinds = sorted({str(members.kinds[0]) for members in found if len(members.kinds)})
    label = _label_of(data, found) if any(source.classes for source in opened.values()) else ""
    parts = told(data, opened)
    lost, links = (sum(int(members.without[i]) for members in found) for i in range(2))
    return (f"{'; '.join(parts)}; from {pluralize(count, 'shard')} such as {printable(shards[0].name)}, images "
            f"from .{' and .'.join(kinds)}, {f'labels from {label}' if label else 'no labels'}"
            f"{f'; {lost} keys without an image' if lost else ''}"
            f"{f'; {links} members that are links or sparse files are not read' if links else ''}")


def _source(data: ConfigDict, split: str, shards: tuple[epath.Path, ...], found: tuple[Members, ...]) -> Source:
    """Returns the source of all examples in these shards."""
    paths, names = [str(shard) for shard in shards], [shard.name for shard in shards]
    shard_of = np.repeat(np.arange(len(found)), [len(members.keys) for members in found])
    columns = {field: np.concatenate([getattr(members, field) for members in found])
               for field in ("keys", "starts", "sizes", "masks")}
    keys, starts, sizes, masks = (columns[field] for field in ("keys", "starts", "sizes", "masks"))
    training = splits.parts(data.get("train_split") or "train")[0].name
    train = found if split == training or not patterns.by_split(data.path, ENDING) else _members(data, training)[1]
    label = _label_of(data, train)
    classes = text_labels.classes_of(text for members in train for text in _texts(members, label))
    labels, strange = text_labels.numbers([text for members in found for text in _texts(members, label)], classes)

    read = functools.partial(_read, paths, shard_of, starts, sizes, masks, labels, data.mask_key,
                             data.get("mask_offset", 0))
    return Source(len(keys), read, functools.partial(_name, names, shard_of, keys), classes,
                  ("pixel_label",) if data.mask_key else (), lambda i: int(labels[i]), unknown_classes=strange)


def _read(paths: list[str], shard_of: np.ndarray, starts: np.ndarray, sizes: np.ndarray, masks: np.ndarray,
          labels: np.ndarray, mask_key: str, offset: int, i: int) -> Example:
    shard, mask = paths[shard_of[i]], None
    check_bytes(int(sizes[i]))
    if mask_key:
        start, size = map(int, masks[i])
        if start < 0:
            raise OSError(f"no member .{mask_key}")
        mask = decode_mask(ranges.read(shard, start, size), offset)
    return Example(ranges.read(shard, int(starts[i]), int(sizes[i])), int(labels[i]), mask=mask)


def _name(names: list[str], shard_of: np.ndarray, keys: np.ndarray, i: int) -> str:
    return printable(f"{names[shard_of[i]]}/{keys[i]}")


def _texts(members: Members, label: str) -> list[str]:
    if not label:
        return [""] * len(members.keys)
    named = members.labels.astype(bool).any()
    from_captions = label == ".txt" and not named and len(members.captions)
    return list(map(str, members.captions if from_captions else members.labels))


def _label_of(data: ConfigDict, found: tuple[Members, ...]) -> str:
    """Returns the origin of the labels, '' for none; by default, '.txt' only if its texts look like labels."""
    key = data.get("label_key", "")
    if not key:
        return ""
    kinds = {str(kind) for members in found for kind in members.kinds}
    if any(members.labels.astype(bool).any() for members in found):
        kind = "cls" if key == USUAL["label_key"] else key
        return f".{kind}" if kind in kinds else f"the field {key!r} of .json"
    if key != USUAL["label_key"]:
        raise UserError(f"data.label_key={key!r} is neither a kind of member of {data.path!r} nor a field of a .json "
                        f"there; {did_you_mean(key, kinds)}")
    if "txt" not in kinds:
        return ""
    texts = {str(text) for members in found for text in members.captions}
    if all(len(members.captions) == len(members.keys) for members in found) and (
            2 * len(texts) <= sum(len(members.keys) for members in found)):
        return ".txt"
    log.warning("%s: the texts of .txt look like captions, and are not used as labels; data.label_key=txt uses them",
                data.path)
    return ""


def _members(data: ConfigDict, split: str) -> tuple[tuple[epath.Path, ...], tuple[Members, ...]]:
    """Returns the shards of a split, and the members of each."""
    if not data.path:
        raise UserError("data.source='tar' needs data.path: a folder of *.tar, or a pattern of them")
    shards = patterns.files(data.path, ENDING, split)
    wanted = _Wanted(*(asked(data, key) for key in ("image_key", "label_key", "mask_key")),
                     IMAGES["common" if data.get("formats") == "common" else "all"])
    began = time.monotonic()
    with ThreadPoolExecutor(READERS) as pool:
        found = tuple(pool.map(lambda shard: _kept(*version(shard), wanted), shards))
    if time.monotonic() - began > 5:
        log.info("indexed %s in %.0f s; the index is kept in %s", pluralize(len(shards), "shard"),
                 time.monotonic() - began, cache.folder())
    if not sum(len(members.keys) for members in found):
        kinds = sorted({str(kind) for members in found for kind in members.kinds})
        raise UserError(f"{shards[0]}{' and others' if len(shards) > 1 else ''}: no member is an image"
                        f"{f' of data.image_key={wanted.image!r}' if wanted.image else ''}; there are "
                        f"{', '.join(f'.{printable(kind)}' for kind in kinds[:8]) or 'no members'}")
    return tuple(shards), found


@lru_cache(maxsize=100_000)
def _kept(shard: str, size: int, changed: int, wanted: _Wanted) -> Members:
    """Returns the members of a shard, from the cache as long as the shard is unchanged."""
    key = ("tar", VERSION, shard, size, changed, tuple(wanted))
    return Members(**cache.arrays(key, lambda: _scan(epath.Path(shard), wanted)._asdict()))


def _scan(shard: epath.Path, wanted: _Wanted) -> Members:
    """Reads the headers of all members, and the texts that may be labels; raises UserError for a damaged shard."""
    examples: dict[str, dict[str, Any]] = {}
    places: dict[str, tuple[int, int]] = {}  # of regular members, for hard links
    others = 0
    try:
        with shard.open("rb") as file:
            if found := _not_tar(file):
                raise UserError(f"{shard} is not a plain tar archive: it is {found}")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # otherwise all stay in memory
                    if member.islnk() and member.linkname in places:
                        _add(shard, examples, member, places[member.linkname], file)
                    elif member.isreg() and not member.sparse:
                        places[member.name] = member.offset_data, member.size
                        _add(shard, examples, member, places[member.name], file)
                    else:
                        others += not member.isdir()
                end = archive.offset
            _check_end(shard, file, end)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{shard} is cut short or damaged: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {shard}: {error.strerror or error}") from None
    return _columns(shard, examples, wanted, others)


def _check_end(shard: epath.Path, file: IO[bytes], end: int) -> None:
    """Raises UserError unless the archive ends with its marker, and no data follow."""
    file.seek(end)
    rest = file.read(BLOCK)
    if rest != bytes(BLOCK):
        what = f"what is at byte {end} is no header" if rest else "it has no end marker, as if it was cut"
        raise UserError(f"{shard} is cut short or damaged: {what}")
    place = end
    while rest:
        if rest.strip(b"\0"):
            raise UserError(f"{shard} is damaged, or has several archives in one file: there are data behind the end "
                            f"marker, at byte {end} after byte {place}")
        place += len(rest)
        rest = file.read(1 << 20)


def _not_tar(file: IO[bytes]) -> str:
    begin = file.read(BLOCK)
    if begin[257:262] == b"ustar" or not begin.strip(b"\0"):
        return "" if begin else file_kinds.kind(begin)
    return file_kinds.kind(begin)


def _add(shard: epath.Path, examples: dict[str, dict[str, Any]], member: tarfile.TarInfo, place: tuple[int, int],
         file: IO[bytes]) -> None:
    """Adds a member, whose content is at `place` (start, size), to its example; raises UserError for a duplicate."""
    folder, slash, name = member.name.removeprefix("./").rpartition("/")
    stem, _, kind = name.partition(".")
    if not stem or not kind:  # hidden members, and those without a kind
        return
    kind, text, (start, size) = kind.lower(), None, place
    if size <= (MAX_JSON if kind == "json" else MAX_LABEL):
        file.seek(start)
        text = file.read(size)
    example = examples.setdefault(f"{folder}{slash}{stem}", {})
    if kind in example:
        raise UserError(f"{shard} has {printable(member.name)} twice: the members with one key are one example, so a "
                        "key must be unique in a shard; write the shard again, with unique keys")
    example[kind] = (start, size, text)


def _columns(shard: epath.Path, examples: dict[str, dict[str, Any]], wanted: _Wanted, others: int) -> Members:
    rows, without = [], 0
    plain = any(kind in members for members in examples.values() for kind in wanted.images if kind != wanted.mask)
    for key, members in examples.items():
        image = _image(shard, key, members, wanted, plain)
        if not image:
            without += 1
            continue
        mask = members.get(wanted.mask, (-1, -1))[:2] if wanted.mask else (-1, -1)
        rows.append((key, *members[image][:2], mask, _label(shard, key, members, wanted.label),
                     _text(members.get("txt")), image))
    captions = [row[5] for row in rows]
    kinds = dict.fromkeys([row[-1] for row in rows] + [kind for members in examples.values() for kind in members])
    return Members(
        keys=np.array([row[0] for row in rows], np.str_), starts=np.array([row[1] for row in rows], np.int64),
        sizes=np.array([row[2] for row in rows], np.int64),
        masks=np.array([row[3] for row in rows], np.int64).reshape(-1, 2),
        labels=np.array([row[4] for row in rows], np.str_),
        captions=np.array(captions if all(text and " " not in text for text in captions) else [], np.str_),
        kinds=np.array(list(kinds)[:100], np.str_), without=np.array([without, others], np.int64))


def _image(shard: epath.Path, key: str, members: Mapping[str, Any], wanted: _Wanted, plain: bool) -> str:
    """Returns the kind of the image member, '' for none: never the mask, and 'x.png' only if no key has a plain 'png'.

    Raises:
      UserError: several members may be the image.
    """
    if wanted.image:
        return wanted.image if wanted.image in members else ""
    if plain:
        return next((kind for kind in wanted.images if kind in members and kind != wanted.mask), "")
    found = [kind for kind in members if kind.rpartition(".")[2] in wanted.images and kind != wanted.mask]
    if len(found) > 1:
        raise UserError(f"{shard}: {printable(key)} has several images, .{printable(found[0])} and "
                        f".{printable(found[1])}; name one kind as data.image_key. A key ends at its first dot: "
                        "files with the same beginning are one example")
    return found[0] if found else ""


def _label(shard: epath.Path, key: str, members: Mapping[str, Any], wanted: str) -> str:
    kind = wanted or "cls"
    if kind in members:
        return _text(members[kind])
    if not members.get("json") or members["json"][2] is None:
        return ""
    try:
        value = bounded_json.parse_object(members["json"][2]).get(wanted or USUAL["label_key"], "")
    except ValueError as error:
        raise UserError(f"{shard}: {printable(key)}.json is not a JSON object: {error}") from None
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _text(member: Any) -> str:
    """Returns the text of a member that may be a label; '' if it is too long or no text."""
    content = member[2] if member else None
    if content is None or len(content) > MAX_LABEL:
        return ""
    try:
        return content.decode().strip("\0 \t\r\n")
    except UnicodeDecodeError:
        return ""
