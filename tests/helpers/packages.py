"""Installed packages that give plug-ins, and processes that see them."""

import os
import subprocess
import sys
from pathlib import Path


def installed(site: Path, name: str, entry_points: dict[str, str], version: str = "0.3") -> Path:
    """Writes what an installer leaves of a distribution in a folder of packages."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(
        "".join(f"[mae_jax.{kind}]\n{line}\n" for kind, line in entry_points.items()))
    return site


def python(site: Path | None, *args: object, code: int = 0) -> subprocess.CompletedProcess:
    """Runs Python with the packages of `site` beside those of this environment."""
    path = os.pathsep.join(map(str, filter(None, (site, Path.cwd(), os.environ.get("PYTHONPATH")))))
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True,
                          timeout=600, env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == code, done.stdout + done.stderr
    return done
