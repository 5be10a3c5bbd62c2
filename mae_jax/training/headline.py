"""The line that a run of pre-training ends with: what a linear probe says that it has learned."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import jax

from mae_jax import recipe_version
from mae_jax.runtime.console import print_once
from mae_jax.storage import paths
from mae_jax.storage.metric_writer import series_of
from mae_jax.training.run import Run

logger = logging.getLogger(__name__)

PROBE, PIXELS = "linear/top1", "linear/pixels_top1"
DEVIATIONS = 2  # of a difference between two shares of the images, below which it is not called one (our choice)


def show(run: Run, part: str) -> None:
    """Prints `line` of a run that has ended and whose metrics are written, where there is one; args: as there."""
    if jax.process_index() == 0:
        try:
            series, _ = series_of(paths.read_bytes(run.workdir / "metrics.jsonl") or b"")
            if text := line(run, part, series):
                print_once(text)
        except Exception as error:  # no line is worth a run
            logger.warning("not said what was learned: %s", str(error).split("\n")[0] or type(error).__name__)


def line(run: Run, part: str, series: Mapping[str, list[tuple[int, float]]]) -> str:
    """Returns how often the probe of the trained encoder names the class, beside the untrained one and raw pixels.

    Args:
      run: that has ended.
      part: of the data that it was evaluated on all along, 'eval' or 'val'; '' for none.
      series: metric → (step, value), ascending, as metrics.jsonl has them.

    Returns:
      '' where one of the three was not measured, as of images without labels and of large ones, or where the labels
      cannot be counted without reading the images.
    """
    data = run.config.data
    learned, pixels = series.get(f"{part}/{PROBE}", []), series.get(f"{part}/{PIXELS}", [])
    if len(learned) < 2 or not pixels or learned[0][0] != pixels[0][0]:
        return ""
    fitted, judged = (_labels(run, split) for split in (data.train_split,
                                                        data.val_split if part == "val" else data.eval_split))
    before, after, floor = learned[0][1], learned[-1][1], pixels[0][1]
    if not (fitted and judged and math.isfinite(before + after + floor)):
        return ""
    best = max(before, floor)
    noise = math.sqrt((after * (1 - after) + best * (1 - best)) / judged)
    verdict = "learned" if after - best > DEVIATIONS * noise else "not seen to learn"
    start = "encoder before this run" if run.config.init_from else "untrained encoder"
    return (f"{verdict}: a linear probe, fitted on {fitted:,} labels, names the class of {after:.1%} of {judged:,} new "
            f"images; {start} {before:.1%}, raw pixels {floor:.1%}")


def _labels(run: Run, split: str) -> int:
    """Returns how many of the images that evaluations read of a split have a label; 0 where that is not known."""
    from mae_jax.data.readers.random_access import subset

    part: Any = run.inputs.parts.get(split)
    if part is None or getattr(part, "label", None) is None:  # cached batches, records, or labels within the images
        return 0
    read = subset(part.size, run.config.eval.max_examples, run.program.method.group,
                  recipe_version.has(run.config, "computed_order"))
    return sum(part.label(int(i)) >= 0 for i in read)
