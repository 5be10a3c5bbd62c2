"""Publishes an export atomically: writes to a staging folder, reads back, compares, then moves to the target."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from mae_jax.errors import UserError
from mae_jax.interop import layouts
from mae_jax.interop.forward import forward
from mae_jax.param_tree import flatten, nest
from mae_jax.storage import paths, safetensors_file, torch_writer, weight_files, workdir_lock

IMAGES = 2  # random images on which programs are compared


def publish(exported: layouts.Exported, layout: str, target: epath.Path, texts: Mapping[str, str],
            metadata: Mapping[str, str], alone: bool) -> str:
    """Writes parameters in a layout and reads them back, before anything appears at `target`.

    Args:
      exported: the parameters and their config.
      layout: name of the layout.
      target: a folder, local or gs://, whose other files stay; with `alone`, a file of weights.
      texts: name → content of further files in the folder.
      metadata: metadata of the safetensors file.
      alone: whether `target` is a file.

    Returns:
      One line about the written files.

    Raises:
      UserError: the read-back arrays or outputs differ; nothing appears at `target`.
    """
    with _staged(target) as stage:
        name, state = target.name if alone else layouts.FILE, _state(exported, layout)
        if state is not None:
            write = torch_writer.save if name.endswith(".pth") else safetensors_file.save
            write(epath.Path(stage / name), state, metadata)
            _check_arrays(stage / name, exported, layout, state)
        if program := layouts.get(layout).program:
            (stage / program.file).write_bytes(program.make(exported))
            _check_program(stage, exported, program)
        for file, text in texts.items():
            (stage / file).write_text(text)
        return _put(stage, target, alone, {} if state is None else flatten(state))


def _state(exported: layouts.Exported, layout: str) -> Any:
    to = layouts.get(layout).to
    return to(exported.params, exported.config) if to else None


@contextlib.contextmanager
def _staged(target: epath.Path) -> Iterator[Path]:
    """Yields an empty local folder; for a local target on the same disk, so that its content can be moved."""
    if str(target).startswith("gs://"):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    place = Path(os.path.abspath(target))
    folder = place.with_name(f".{place.name}.partial")
    with workdir_lock.taken(workdir_lock.lease_of(epath.Path(folder), ends_process=True, what="target")):
        stage = folder / "whole"
        shutil.rmtree(stage, ignore_errors=True)  # left by an export that was killed
        stage.mkdir()
        try:
            with paths.naming(target):
                yield stage
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _check_arrays(file: Path, exported: layouts.Exported, layout: str, state: Any) -> None:
    """Raises UserError if a file does not hold `state`, or if reading it does not give the exported parameters."""
    found, _ = weight_files.load(epath.Path(file))
    _same(flatten(state), flatten(found), f"{file.name}, as it was read back,")
    chosen = layouts.get(layout)
    read = chosen.from_(found, exported.config) if chosen.from_ else layouts.read(found, exported.config)
    if read is found and layout != layouts.OURS:
        return  # a layout of a plug-in that only writes
    ours, theirs = flatten(exported.params), flatten(read)
    _same({name: leaf for name, leaf in ours.items() if name in theirs}, theirs, f"what is read of {file.name}")
    again = _state(exported._replace(params=read), layout)
    _same(flatten(state), flatten(again), f"what is written again of {file.name}")


def _same(wanted: Mapping[str, Any], found: Mapping[str, Any], what: str) -> None:
    strange = sorted(wanted.keys() ^ found.keys()) or [
        name for name in sorted(wanted) if not np.array_equal(wanted[name], found[name], equal_nan=True)]
    if strange:
        raise UserError(f"{what} is not what was exported: {strange[0]} and {len(strange) - 1} more arrays differ; "
                        "nothing was written")


def _check_program(stage: Path, exported: layouts.Exported, program: layouts.Program) -> None:
    """Raises UserError if the outputs of a program differ from those of the encoder, for random images."""
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, *exported.config.data.image_size, 3), np.uint8)
    beside = stage / layouts.FILE
    arrays = flatten(weight_files.load(epath.Path(beside))[0]) if beside.exists() else {}
    found = program.run((stage / program.file).read_bytes(), arrays, images)
    wanted = jax.jit(forward(exported.config))(nest(flatten(exported.params)), images)
    for name, array in wanted.items():
        off = np.abs(np.asarray(found[name]) - array).max() / max(np.abs(array).max(), 1e-30)
        if not off <= program.tolerance:  # true for NaN, too
            raise UserError(f"{program.file} computes other {name} than the encoder: they are off by {off:.1e} of the "
                            f"largest, where {program.tolerance:g} is allowed; nothing was written")


def _put(stage: Path, target: epath.Path, alone: bool, arrays: Mapping[str, Any]) -> str:
    """Moves the staged files to the target, the weights last; returns a line about them."""
    names = sorted((file.name for file in stage.iterdir()), key=lambda name: (name == layouts.FILE, name))
    where = {name: target if alone else target / name for name in names}
    replaced = [path for path in where.values() if path.exists()]
    size = sum((stage / name).stat().st_size for name in names)
    if not alone and not str(target).startswith("gs://") and not target.exists():
        stage.rename(os.fspath(target))
    else:
        paths.make_folder(target.parent if alone else target)
        for name, path in where.items():
            _move(stage / name, path)
    what = [f"{len(arrays)} arrays, {sum(array.size for array in arrays.values()):,} values"] * bool(arrays)
    what += [f"{', '.join(names)}; {size / 1e6:.1f} MB"] * (not alone)
    line = f"{target}: {'; '.join(what)}, read back and compared"
    return line + (f" (replaces {', '.join(path.name for path in replaced)})" if replaced else "")


def _move(file: Path, path: epath.Path) -> None:
    if not str(path).startswith("gs://"):
        os.replace(file, path)
        return
    content = file.read_bytes()
    paths.replace_bytes(path, content)
    if paths.read_bytes(path) != content:
        path.unlink(missing_ok=True)
        raise UserError(f"{path} was damaged while it was written, and removed; run the same command again")
