"""The last line of a pre-training run: linear probe accuracy, compared with the initial encoder and raw pixels."""

import math
from collections.abc import Mapping
from typing import Any

from mae_jax import recipe_version
from mae_jax.training.run import Run

PROBE, PIXELS = "linear/top1", "linear/pixels_top1"
DEVIATIONS = 2  # standard deviations above which a difference of accuracies counts as learned (our choice)


def line(run: Run, part: str, series: Mapping[str, list[tuple[int, float]]]) -> str:
    """Returns the probe's accuracy on the trained encoder, beside that on the initial encoder and on raw pixels.

    Args:
      run: the finished run.
      part: the part of the data of periodic evaluations, 'eval' or 'val'; '' for none.
      series: metric → (step, value) by ascending step, from metrics.jsonl.

    Returns:
      One line of text. '' if one of the three was not measured, such as for unlabeled or large images, or if the labels
      cannot be counted without reading the images.
    """
    data = run.config.data
    learned, pixels = series.get(f"{part}/{PROBE}", []), series.get(f"{part}/{PIXELS}", [])
    if len(learned) < 2 or not pixels or learned[0][0] > 0:
        return ""
    fitted, judged = (_labels(run, split) for split in (data.train_split,
                                                        data.val_split if part == "val" else data.eval_split))
    before, after, floor = learned[0][1], learned[-1][1], pixels[-1][1]
    if not (fitted and judged and math.isfinite(before + after + floor)):
        return ""
    best = max(before, floor)
    noise = math.sqrt((after * (1 - after) + best * (1 - best)) / judged)
    verdict = "learned" if after - best > DEVIATIONS * noise else "not seen to learn"
    start = "encoder before this run" if run.config.init_from else "untrained encoder"
    return (f"{verdict}: a linear probe, fitted on {fitted:,} labels, names the class of {after:.1%} of {judged:,} new "
            f"images; {start} {before:.1%}, raw pixels {floor:.1%}")


def _labels(run: Run, split: str) -> int:
    """Returns the number of labeled images among those that evaluations read of a split; 0 if it is not known."""
    from mae_jax.data.readers.random_access import subset

    part: Any = run.inputs.parts.get(split)
    if part is None or getattr(part, "label", None) is None:  # cached batches, records, or labels within the images
        return 0
    read = subset(part.size, run.config.eval.max_examples, run.program.method.group,
                  recipe_version.has(run.config, "computed_order"))
    return sum(part.label(int(i)) >= 0 for i in read)
