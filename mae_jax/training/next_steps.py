"""The last lines of a run: the paths of its outputs, and commands for next steps, ready for a shell."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from mae_jax.config import changed
from mae_jax.interop import layouts
from mae_jax.runtime import progress
from mae_jax.runtime.console import print_once
from mae_jax.storage import paths
from mae_jax.storage.attempt import attempt
from mae_jax.storage.metric_writer import MetricWriter, series_of
from mae_jax.training import curves, headline
from mae_jax.training.run import Run

# Fields of config.data that another recipe needs to read the same images, besides data.image_size.
SAME_IMAGES = ("source", "path", "name", "layout", "classes", "image_key", "label_key", "formats", "exif")


def conclude(run: Run, recorder: MetricWriter, part: str, step: int, best_step: int = 0) -> None:
    """Prints what a finished run learned and `lines`, and draws its curves; a failure of these is only a warning.

    Args:
      run, step, best_step: as for `lines`.
      recorder: has the metrics, and writes the figure.
      part: the part of the data of periodic evaluations, as for `headline.line`.
    """
    recorder.flush()
    series: dict[str, list[tuple[int, float]]] = {}

    def read() -> None:
        series.update(series_of(paths.read_bytes(run.workdir / "metrics.jsonl") or b"")[0])

    def tell() -> None:
        if text := headline.line(run, part, series):
            print_once(text)

    def draw() -> None:
        with progress.doing("drawing curves"):
            if (drawn := curves.figure(series, f"{run.workdir}, to step {step:,}")) is not None:
                recorder.write_image(step, "curves", drawn)

    if jax.process_index() == 0 and attempt("read the metrics", read):
        attempt("tell what was learned", tell)
        attempt("draw the curves", draw)
    print_once("\n".join(lines(run, step, best_step)))


def lines(run: Run, step: int, best_step: int = 0) -> list[str]:
    """Returns the lines that are printed at the end of a run.

    Args:
      run: the finished run.
      step: its last step.
      best_step: step of the checkpoint in <workdir>/best; 0 without one.
    """
    folder = run.workdir
    best = f", the best of step {best_step:,} in {folder / 'best'}" if best_step else ""
    return [f"  checkpoints  {folder / 'checkpoints'}, the last of step {step:,}{best}",
            f"  figures      {folder / 'pictures'}",
            "next:", *(f"  {command}" for command in commands(run, bool(best_step)))]


def commands(run: Run, best: bool) -> list[str]:
    """Returns shell commands for the trained model; `best`: use the best checkpoint instead of the last one."""
    folder, method = run.workdir, run.program.method
    encoder = folder / "best" if best else folder
    then: dict[str, Mapping[str, Any]] = {}
    if method.task == "pretraining":
        then = _of_encoder(run, encoder)
    else:
        to = {"classification": "predictions.csv", "segmentation": "masks", "detection": "found"}[method.task]
        then["predict"] = {"from": encoder, "to": folder / to}
    if method.task == "classification":
        layout = {} if layouts.get("timm").refuses(run.config) else {"layout": "timm"}
        then["export"] = {"from": encoder, **layout, "to": f"{folder}_export"}  # a workdir is not written into
    if run.config.data.source == "batches":  # cached batches have patches instead of images
        then = {verb: given for verb, given in then.items() if verb in ("export", "train")}
    return [_command("report", {"from": folder, "to": folder / "report.html"}),
            *(_command(verb, given) for verb, given in then.items())]


def _of_encoder(run: Run, encoder: epath.Path) -> dict[str, Mapping[str, Any]]:
    folder = run.workdir
    if run.program.method.extra_encode_fields:  # MoCE: one encoder must be extracted from the mixture first
        return {"export": {"from": encoder, "for-task": "vote", **dict(_same_images(run, "folder", "quickstart")),
                           "to": f"{folder}_encoder"}}
    embed = {"from": encoder, "to": folder / "features.parquet"}
    classes = len(run.inputs.classes) > 1 and run.config.data.source != "batches"
    return {"embed": embed, **({"train": dict(_fine_tuning(run, encoder))} if classes else {})}


def _fine_tuning(run: Run, encoder: epath.Path) -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of the flags that fine-tune the encoder on the labels of its training images."""
    yield from _same_images(run, "folder_finetune", "quickstart_finetune")
    if run.config.data.source != "letters":
        yield "config.data.image_size", tuple(run.config.data.image_size)
    yield "config.init_from", encoder
    yield "workdir", f"{run.workdir}_finetuned"


def _same_images(run: Run, recipe: str, of_letters: str) -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of the flags of a recipe that reads the run's images; `of_letters` if these are letters."""
    data = run.config.data
    if data.source == "letters":
        yield "config", of_letters
        return
    yield "config", recipe
    other = changed(run.config)
    for name in SAME_IMAGES:
        if f"data.{name}" in other and (name, data[name]) != ("source", "folder"):
            yield f"config.data.{name}", data[name]


def _command(verb: str, flags: Mapping[str, Any]) -> str:
    return " ".join(["mae_jax", verb, *(f"--{name}={shlex.quote(str(value))}" for name, value in flags.items())])
