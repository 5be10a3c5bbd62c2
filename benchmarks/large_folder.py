"""Time and memory of listing a folder of very many images: real empty files, or ten million simulated ones.

  python -m benchmarks.large_folder --files=1000000 --in=/tmp
  python -m benchmarks.large_folder --files=10000000 --pretended

Each line is measured in its own process: first the folder is listed, then the stored index is read.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

PER_FOLDER = 1000


def main() -> None:
    """Makes the folder and prints one line of JSON for each of two starts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--in", dest="place", default=None, help="where the folder is made")
    parser.add_argument("--pretended", action="store_true", help="make no files: os.scandir tells of them")
    parser.add_argument("--start", default="", help="list this folder, in this process")
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(args.start, args.files, args.pretended)), flush=True)
        return
    with tempfile.TemporaryDirectory(dir=args.place) as place:
        root = Path(place) / "train"
        for folder in range(args.files // PER_FOLDER):
            (root / f"n{folder:08d}").mkdir(parents=True)
            for i in range(0 if args.pretended else PER_FOLDER):
                (root / f"n{folder:08d}" / f"n{folder:08d}_{i:05d}.JPEG").touch()
        time.sleep(2.5)  # what has just changed is not kept
        command = [sys.executable, "-m", "benchmarks.large_folder", f"--start={root}", f"--files={args.files}"]
        for what in ("anew", "by the index"):
            env = {**os.environ, "MAE_JAX_CACHE": str(Path(place) / "cache"), "JAX_PLATFORMS": "cpu"}
            out = subprocess.run(command + ["--pretended"] * args.pretended, check=True, capture_output=True, text=True,
                                 env=env).stdout
            print(what, out.strip(), flush=True)


def start(root: str, files: int, pretended: bool) -> dict[str, float]:
    """Opens the folder as a run does; returns seconds, and MiB at most and before."""
    from etils import epath

    from mae_jax.data.sources import folder, folder_listing, registry, splits  # noqa: F401
    from mae_jax.runtime.memory import peak_memory
    from tests.helpers.tiny import tiny_config

    before, began = peak_memory(), time.monotonic()
    with mock.patch("os.scandir", _scandir) if pretended else mock.MagicMock():
        listing = folder_listing.files(epath.Path(root))
        listed, after = time.monotonic() - began, peak_memory()
        assert len(listing.pictures) == files
        data = tiny_config({"data.source": "folder", "data.path": root, "data.eval_split": ""}).data
        source = registry.load(data, "train")
    assert source.size == files
    return {"files": files, "listed_s": round(listed, 1), "opened_s": round(time.monotonic() - began, 1),
            "before_mib": before >> 20, "listed_mib": after >> 20, "opened_mib": peak_memory() >> 20}


class _Entry:
    """A file that is not there."""

    def __init__(self, name: str):
        self.name = name

    def is_file(self, follow_symlinks: bool = True) -> bool:
        """Always."""
        return True


class _scandir:
    """As os.scandir; in a folder without files there are PER_FOLDER."""

    real = os.scandir

    def __init__(self, path: str):
        self.path = path

    def __enter__(self) -> object:
        with self.real(self.path) as entries:
            found = list(entries)
        name = os.path.basename(self.path.rstrip("/"))
        return found or (_Entry(f"{name}_{i:05d}.JPEG") for i in range(PER_FOLDER))

    def __exit__(self, *error: object) -> None:
        pass


if __name__ == "__main__":
    main()
