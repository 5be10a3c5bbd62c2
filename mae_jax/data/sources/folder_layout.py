"""Recognizes the layout of a folder of images.

  flat     images at any depth, without classes
  classes  the first sub-folders are classes
  splits   sub-folders with the usual names of splits, in any case and order (train, Training, valid, val2017, test_set
           ...: `splits.role`), each flat or of classes
  nested   classes, each with sub-folders of splits

A folder that contains all the rest is descended into. An ambiguous folder raises UserError with both readings, and the
value of data.layout, or the split, that selects each.
"""

import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple, NoReturn

from etils import epath

from mae_jax.data.sources import splits
from mae_jax.data.sources.folder_listing import Listing, files, folders, nfc, pictures
from mae_jax.data.sources.names import Names
from mae_jax.errors import UserError, did_you_mean, pluralize, printable

MAX_STRAYS = 10  # images beside class folders that count as strays, if the folders hold more
MAX_STRAY_SHARE = 0.1  # or this share of all images
LAYOUT = "--config.data.layout="
MAX_NAMED = 6  # folders listed in a message
# Names of folders that are not classes: of images, and of their annotations.
IMAGES = re.compile(r"(jpe?g|png|rgb|raw)?[_-]?(images?|imgs?|pictures?|photos?|rgb|frames)\d*", re.IGNORECASE)
OF_IMAGES = re.compile(r"(\w*[_-])?(masks?|labels?|annotations?|anno|gt|ground_?truths?|trimaps?|depths?|edges?|"
                       r"alphas?|segmentation\w*|segmentclass\w*|seg)\d*", re.IGNORECASE)


class Layout(NamedTuple):
    """The result of `recognize`."""

    kind: str  # flat, classes, splits, nested
    root: epath.Path  # data.path, or the sub-folder that contains all the rest
    folders: dict[str, tuple[str, ...]] = {}  # for splits and nested: role of a split → names of its folders
    plain: bool = False  # as in mae_jax 0.1.0
    forced: bool = False  # set by data.layout
    formats: str = "all"  # data.formats


class Part(NamedTuple):
    """The images of a split, or of the whole folder if it has no splits."""

    base: epath.Path
    listing: Listing  # relative to base
    classes: tuple[str, ...]  # class folders: the first level under base
    strays: tuple[str, ...] = ()  # images beside class folders, which are left out


def recognize(root: epath.Path, how: str = "auto", formats: str = "all") -> Layout:
    """Returns the layout of a folder; raises UserError if it is ambiguous, or not the requested one.

    Args:
      root: the folder.
      how: data.layout: auto; flat, classes or splits, which the folder then must have; 0.1.0, as in that version.
      formats: data.formats, which defines image files.
    """
    if how == "0.1.0":
        return _first_version(root)._replace(formats=formats)
    if how == "flat":
        return Layout("flat", root, forced=True, formats=formats)
    return _recognized(root, how, formats)._replace(formats=formats)


def _recognized(root: epath.Path, how: str, formats: str) -> Layout:
    """Returns the layout by the names of sub-folders; descends into a single one."""
    named = {role: tuple(name for name in folders(root) if splits.role(name) == role) for role in splits.ROLES}
    train, held = named["train"], named["val"] + named["test"]
    if train and held and how != "classes":
        return Layout("splits", root, named, forced=how == "splits")
    listing = files(root, formats=formats)
    counts, beside = listing.folders, len(listing.direct)
    others = [name for name in counts if how == "classes" or not splits.role(name)]
    if how != "classes" and (train or (held and counts.keys() - set(others))):
        held = tuple(name for name in held if nfc(name) in counts)
        return _half_split(root, train, held, others, beside, how, formats)
    if len(others) == 1 and few(beside, counts.total()):
        inner = _recognized(_child(root, others[0]), how, formats)
        return inner if inner.kind != "flat" or not beside else Layout("flat", root)
    if how != "classes":
        _check_kinds(root, others)
    if len(others) > 1 and how != "classes" and (nested := _nested(root, others, how, formats)):
        return nested
    if how == "splits":
        raise UserError(f"data.layout='splits': {root} has no folder with a usual name of a split, as train/ and val/; "
                        f"it has {_some(others) or 'no folders with images'}")
    if how == "classes" and len(others) < 2:
        raise UserError(f"data.layout='classes': {root} has no folders of classes; it has "
                        f"{_some(others) or pluralize(beside, 'image')}")
    if len(others) > 1 and how != "classes":
        _check_names(root, others)
        _check_alike(root, others, formats)
    return Layout("classes" if len(others) > 1 else "flat", root, forced=how == "classes")


def _half_split(root: epath.Path, train: tuple[str, ...], held: tuple[str, ...], others: list[str], beside: int,
                how: str, formats: str) -> Layout:
    """Returns the layout if a folder is named like a split, but there is not both a training and a held-out split."""
    if train and (how == "splits" or not others):
        return Layout("splits", root, {"train": train}) if len(train) > 1 else \
            _recognized_train(root / train[0], how, formats)
    as_classes = f"all are classes: {LAYOUT}classes"
    if train:
        deep = any(name.count("/") > 1 for name in files(root, formats=formats).pictures)
        if len(others) > 1 and not deep:  # vehicles: bus, car, train
            return Layout("classes", root)
        _refuse(root, f"{train[0]}/ is trained on, and {_some(others)} not read: {LAYOUT}splits", as_classes)
    if others:
        _refuse(root, f"{_some(held)} is held out from the classes {_some(others)}: move those into a folder train/ "
                "beside it", as_classes)
    if beside:
        _refuse(root, f"{_some(held)} is held out from the {pluralize(beside, 'image')} beside it: move those into a "
                "folder train/", f"it is not a split: {LAYOUT}flat")
    inner = _recognized(root / held[0], how, formats) if len(held) == 1 and how == "auto" else None
    if inner and inner.kind in ("splits", "nested"):  # its name applies to the whole folder
        return inner
    return _refuse(root, f"{_some(held)} without a folder to train on; to read one alone: "
                   f"--config.data.path={root / held[0]}", as_classes)


def _recognized_train(folder: epath.Path, how: str, formats: str) -> Layout:
    """Returns the layout of the only split, of which a part may be held out."""
    return _recognized(folder, "auto" if how == "splits" else how, formats)


def _check_kinds(root: epath.Path, others: list[str]) -> None:
    """Raises UserError for folders of images beside folders of masks, which would be trained on."""
    images = [name for name in others if IMAGES.fullmatch(name)]
    if images and any(OF_IMAGES.fullmatch(name) for name in others):
        _refuse(root, f"the images are {_some(images)} alone: --config.data.path={root / images[0]} (and data.mask_key "
                "for masks)", f"{_some(others)} are classes: {LAYOUT}classes")


def _check_names(root: epath.Path, others: list[str]) -> None:
    """Raises UserError for names of splits with a suffix, such as trainA and testA beside trainB."""
    roles = {name: splits.role(re.sub(r"[_-]?([A-Za-z]|\d+)$", "", name)) for name in others}
    train = [name for name in others if roles[name] == "train"]
    if train and {"val", "test"} & set(roles.values()):
        _refuse(root, f"{_some(train)} {'is' if len(train) == 1 else 'are'} trained on: "
                f"--config.data.path={root / train[0]} reads one alone",
                f"{_some(others)} are classes: {LAYOUT}classes")


def _check_alike(root: epath.Path, others: list[str], formats: str) -> None:
    """Raises UserError for folders that have the same sub-folders each, such as folds of the same classes."""
    inside: dict[str, set[str]] = {name: set() for name in others}
    for path in files(root, formats=formats).pictures:
        first, _, rest = path.partition("/")
        if first in inside:
            inside[first].add(rest.split("/")[0] if "/" in rest else "")
    same = inside[others[0]]
    if len(same) > 1 and "" not in same and all(found == same for found in inside.values()):
        _refuse(root, f"{_some(sorted(same))} are classes, in each of {_some(others)}: --config.data.path="
                f"{root / others[0]} reads one alone", f"{_some(others)} are classes: {LAYOUT}classes")


def _nested(root: epath.Path, others: list[str], how: str, formats: str) -> Layout | None:
    """Returns the layout of classes that each have sub-folders of splits, or None."""
    inside: dict[str, set[str]] = defaultdict(set)
    for name in files(root, formats=formats).pictures:
        first, _, rest = name.partition("/")
        inside[first].add(rest.split("/")[0] if "/" in rest else "")
    roles = {name: {splits.role(child) for child in inside[name]} for name in others}
    split = [name for name in others if "train" in roles[name] and roles[name] & {"val", "test"}]
    if not split:
        return None
    whole = all("train" in roles[name] and "" not in roles[name] for name in others)
    deep = any(name.count("/") > 2 for name in files(root, formats=formats).pictures)
    if not whole or (deep and how != "splits"):
        _refuse(root, f"{_some(split)} with folders of splits inside; to read one alone: "
                f"--config.data.path={root / split[0]}", f"{_some(others)} are classes: {LAYOUT}classes")
    children = sorted(set().union(*(inside[name] for name in others)))
    return Layout("nested", root, {role: tuple(name for name in children if splits.role(name) == role)
                                   for role in splits.ROLES})


def _first_version(root: epath.Path) -> Layout:
    """Returns the layout as in mae_jax 0.1.0: splits by four names; classes if no image lies beside them."""
    children = folders(root, True)
    if "train" in children and set(children) & set(splits.HELD_OUT):
        return Layout("splits", root, {name: (name,) for name in children}, plain=True)
    return Layout("classes", root / "train" if children == ["train"] else root, plain=True)


def folder_of(layout: Layout, name: str, field: str = "data.eval_split") -> str:
    """Returns the folder name of a split; any usual name of the held-out split finds the held-out folder.

    Args:
      layout: of kind splits or nested.
      name: of the split.
      field: the config field with the name, for messages.
    """
    known = [folder for found in layout.folders.values() for folder in found]
    if layout.plain:
        wanted = [name, *(splits.HELD_OUT if name in splits.HELD_OUT else ())]
        if found := [each for each in wanted if each in known]:
            return found[0]
        raise UserError(f"unknown split {name!r}; {did_you_mean(name, known)}")
    for same in (nfc, lambda text: nfc(text).casefold()):
        if len(found := [folder for folder in known if same(folder) == same(name)]) == 1:
            return found[0]
    role = splits.role(name)
    for each in {"val": ("val", "test"), "test": ("test", "val")}.get(role, (role,)):
        found = list(layout.folders.get(each, ()))
        if len(found) > 1 and layout.kind == "splits":
            raise UserError(f"{layout.root}: each of {_some(found)} may be the split {name!r}; name one: "
                            f"{' or '.join(f'--config.{field}={printable(folder)}' for folder in found)}")
        if found:
            return found[0]
    raise UserError(f"unknown split {name!r}: {layout.root} has {_some(known)}; {did_you_mean(name, known)}")


def training(layout: Layout, expression: str = "train") -> Part:
    """Returns the images of the training split, or of the whole folder without splits, with the classes."""
    named = [split.name for split in splits.parts(expression) if splits.role(split.name) == "train"]
    names = [] if layout.plain else named  # 0.1.0 took the classes of train/
    if layout.kind == "nested":
        return _nested_part(layout, "train")
    in_splits = layout.kind == "splits"
    base = layout.root / folder_of(layout, (names or ["train"])[0], "data.train_split") if in_splits else layout.root
    listing = pictures(base, layout.plain, layout.formats)
    if in_splits and not layout.plain:
        base, listing = _unwrapped(base, listing)
    if layout.kind == "flat":
        return Part(base, listing, ())
    return _with_classes(layout, base, listing)


def part(layout: Layout, name: str, field: str, train: Part) -> Part:
    """Returns the images of a split, or those of `training` if the layout has no splits.

    Args:
      layout: the result of `recognize`.
      name: of the split.
      field: the config field with the name, for messages.
      train: the result of `training`; its classes are those of all splits.
    """
    if layout.kind in ("flat", "classes"):
        return train
    folder = folder_of(layout, name, field)
    if layout.kind == "nested":
        return _nested_part(layout, splits.role(folder))
    base = layout.root / folder
    listing = pictures(base, layout.plain, layout.formats)
    if layout.plain:
        return Part(base, listing, train.classes)
    base, listing = _unwrapped(base, listing, train.classes)
    if base == train.base:
        return train
    known = listing.folders.keys() & set(train.classes)
    strays = listing.direct if known and few(len(listing.direct), listing.folders.total()) else ()
    return Part(base, _without(listing, strays), train.classes, strays)


def few(beside: int, inside: int) -> bool:
    """Returns whether images beside class folders are few enough to be strays."""
    return beside <= MAX_STRAY_SHARE * (beside + inside) or (beside <= MAX_STRAYS and beside < inside)


def _with_classes(layout: Layout, base: epath.Path, listing: Listing) -> Part:
    """Returns a part whose first-level sub-folders, if several, are classes; leaves out strays beside them."""
    direct, classes = listing.direct, tuple(sorted(listing.folders))
    if len(classes) < 2 or (direct and layout.plain):
        return Part(base, listing, ())
    if not layout.forced and not layout.plain:
        _check_kinds(base, list(classes))
    inside = listing.folders.total()
    if not layout.forced and not few(len(direct), inside):
        kept, whole = ("splits", f"--config.data.path={base} ") if layout.kind == "splits" else ("classes", "")
        _refuse(base, f"{_some(classes)} with {pluralize(inside, 'image')} are classes, and the {len(direct)} beside "
                f"them, such as {printable(direct[0])}, are left out: {LAYOUT}{kept}",
                f"all of it, without classes: {whole}{LAYOUT}flat")
    return Part(base, _without(listing, direct), classes, direct)


def _nested_part(layout: Layout, role: str) -> Part:
    listing = pictures(layout.root, formats=layout.formats)
    inside = [i for i, name in enumerate(listing.pictures) if name.count("/") > 1]
    kept = [i for i in inside if splits.role(listing.pictures[i].split("/")[1]) == role]
    classes = tuple(sorted({listing.pictures[i].split("/")[0] for i in inside}))
    strays = tuple(name for name in listing.pictures if name.count("/") < 2)
    return Part(layout.root, listing.only(kept), classes, strays)


def _unwrapped(base: epath.Path, listing: Listing, classes: tuple[str, ...] = ()) -> tuple[epath.Path, Listing]:
    """Descends into the only sub-folder of a split, repeatedly, unless it is a class."""
    while len(listing.folders) == 1 and not listing.direct and not listing.folders.keys() & set(classes):
        names = {path.split("/", 1)[0] for path in listing.paths}
        if len(names) > 1:  # two Unicode spellings of one name
            break
        only = names.pop()
        base = base / only
        listing = replace(listing, pictures=Names.of(name[len(nfc(only)) + 1:] for name in listing.pictures),
                          paths=Names.of(path[len(only) + 1:] for path in listing.paths))
    return base, listing


def _without(listing: Listing, left_out: tuple[str, ...]) -> Listing:
    if not left_out:
        return listing
    gone = set(left_out)
    return listing.only([i for i, name in enumerate(listing.pictures) if name not in gone])


def _child(root: epath.Path, name: str) -> epath.Path:
    """Returns the sub-folder with a name in the form NFC."""
    return root / next(child for child in folders(root) if nfc(child) == name)


def _some(names: Collection[str]) -> str:
    shown = ", ".join(f"{printable(name)}/" for name in list(names)[:MAX_NAMED])
    return f"{shown} and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else shown


def _refuse(root: epath.Path, one: str, other: str) -> NoReturn:
    raise UserError(f"{root} can be read in two ways: {one}; or {other}")
