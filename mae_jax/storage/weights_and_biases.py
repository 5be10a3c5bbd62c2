"""Metric sink for Weights & Biases (extra `wandb`); a resumed run continues under its id."""

import json
import os
import secrets
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from mae_jax.runtime import bounded_json, threads
from mae_jax.storage.metric_sinks import Sink
from mae_jax.storage.paths import make_folder, read_bytes, replace_text

CLOSE_SECONDS = 120.0  # timeout for unsent metrics at the end of a run
OFFLINE = ("offline", "dryrun", "disabled")
STEP = "step"  # x-axis of all metrics; a resumed run repeats steps, which W&B's own step does not allow


def _ending_nothing(action: Callable[[], Any]) -> Any:
    """Returns `action()`; converts the package's SystemExit to RuntimeError."""
    try:
        return action()
    except SystemExit as error:
        raise RuntimeError(f"wandb tried to end the process ({error})") from None


class WeightsAndBiases(Sink):
    """Writes to a run of W&B, which its own environment variables configure (WANDB_PROJECT, WANDB_MODE=offline, ...).
    """

    what = "Weights & Biases"
    wandb: Any
    run: Any

    def open(self, workdir: epath.Path, restored_step: float) -> None:
        try:
            import wandb
        except ImportError as error:
            raise RuntimeError(f"{error}; pip install 'mae_jax[wandb]'") from None
        if os.environ.get("WANDB_MODE", "online") not in OFFLINE and not wandb.login(prompt=False):
            # `init` would prompt for a key, and wait.
            raise RuntimeError("there is no API key: run 'wandb login', or set WANDB_MODE=offline")
        make_folder(workdir)
        local = not str(workdir).startswith("gs://")
        self.wandb = wandb
        self.run = _ending_nothing(lambda: wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mae_jax"), name=os.environ.get("WANDB_NAME", workdir.name),
            id=_id(workdir / "wandb.json"), resume="allow", dir=str(workdir) if local else tempfile.mkdtemp(),
            settings=wandb.Settings(console="off", init_timeout=60)))
        self.run.define_metric("*", step_metric=STEP)

    def write_config(self, fields: dict[str, bool | int | float | str]) -> None:
        self.run.config.update(fields, allow_val_change=True)

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        _ending_nothing(lambda: self.run.log({STEP: step, **values}))

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        shown = self.wandb.Image(image, caption=f"{name}, step {step}")
        _ending_nothing(lambda: self.run.log({STEP: step, f"figures/{name}": shown}))

    def close(self) -> None:
        ending = threads.start(self.run.finish)
        if not threads.ends(ending, CLOSE_SECONDS):
            raise TimeoutError(f"not everything was sent in {CLOSE_SECONDS:g} s; 'wandb sync' sends the rest")
        ending.result()


def _id(file: epath.Path) -> str:
    """Returns the run's id from a file in its workdir, or creates and stores a new one."""
    try:
        found = bounded_json.parse_object(read_bytes(file) or b"{}").get("id")
    except ValueError:
        found = None
    if isinstance(found, str) and found:
        return found
    new = secrets.token_hex(4)
    replace_text(file, json.dumps({"id": new}) + "\n")
    return new
