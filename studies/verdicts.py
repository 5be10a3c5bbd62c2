"""Statistical verdicts on two arms of a study, from differences paired by seed; shared by all studies.

Before it runs, a study states its comparisons, the claimed direction of each effect, and the smallest effect size that
matters (its `margin`). One call of `judge` takes all comparisons of a study, since it corrects for their number. A
verdict is one of four:

  seen                     an effect in the claimed direction: two-sided t test with Holm's correction
  opposite seen            an effect in the other direction
  no effect larger than X  two one-sided tests (TOST) with Holm's correction: the effect is smaller than the margin X
  instrument insensitive   none of these: no statement about the effect; the table gives the detectable effect size

The family-wise error rate of the first two is at most `LEVEL`, and so is that of the third. The fourth verdict also
follows from fewer than `MIN_SEEDS` pairs, a failed manipulation check, or identical differences (arms at the floor or
at the ceiling of the measure). A sign-flip test, exact up to `EXACT` pairs, accompanies each t test: it assumes no
normal distribution, and a disagreement of the two is reported.

Power is planned at the upper 80 % confidence limit of a pilot's standard deviation. The deviation itself is too small
in half of the pilots of a few seeds (Browne, 1995).
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats

LEVEL = 0.05  # share of studies with a false verdict of a kind, at most
MIN_SEEDS = 8  # pairs below which there is no verdict
EXACT = 16  # pairs up to which all signs are flipped; above, FLIPS draws of them
FLIPS = 100_000
LIMIT = 0.8  # one-sided confidence of the deviation that power is planned with
POWER = 0.8  # with which an effect that a study "would have seen" is seen
SEEN, OPPOSITE, INSENSITIVE = "seen", "opposite seen", "instrument insensitive"
NOTE = ("Differences are paired by seed. The corrected p is of the t test, by Holm over all rows; that of sign flips "
        f"is not corrected. A row would have seen an effect of the size said with a power of {POWER:g}, after "
        f"correction, at the upper {LIMIT:.0%} limit of its deviation. Below {MIN_SEEDS} seeds there is no verdict. "
        "Seeds are new runs on the same test images: of other test images a verdict says nothing.")


class Comparison(NamedTuple):
    """The claim that the values of `higher` lie above those of `lower`, each seed → value of a measure."""

    claim: str
    higher: Mapping[int, float]
    lower: Mapping[int, float]
    margin: float  # the smallest effect that matters, in units of the measure; stated before the study runs
    check: bool = True  # whether the manipulation check was passed: the instrument can move


class Finding(NamedTuple):
    """What is known of a comparison; differences are `higher` - `lower`."""

    claim: str
    margin: float
    pairs: int  # seeds that both arms have
    mean: float
    deviation: float  # of the differences over seeds, n - 1 in the denominator
    interval: tuple[float, float]  # of the mean, 95 %, of this comparison alone
    p: float  # of the t test, two-sided
    p_flip: float  # of the sign-flip test, two-sided
    p_corrected: float  # of the t test, after Holm's correction
    p_equivalence: float  # of the two one-sided tests, after Holm's correction
    visible: float  # the effect that this many seeds see with POWER, after correction, at the deviation's upper limit
    verdict: str


def judge(comparisons: Sequence[Comparison]) -> list[Finding]:
    """Returns the findings of all comparisons of a study, in their order.

    Raises:
      ValueError: a value is not finite, or a margin is not above 0.
    """
    samples = [_differences(comparison) for comparison in comparisons]
    p, equal = ([test(values, each.margin) for values, each in zip(samples, comparisons, strict=True)]
                for test in (lambda values, _: t_test(values), equivalence_test))
    corrected, equal = holm(p), holm(equal)
    return [_finding(each, values, p[i], corrected[i], equal[i], len(samples))
            for i, (each, values) in enumerate(zip(comparisons, samples, strict=True))]


def _differences(comparison: Comparison) -> np.ndarray:
    """Returns `higher` - `lower` of the seeds that both have, float64 [n]."""
    if not comparison.margin > 0:
        raise ValueError(f"{comparison.claim}: the margin {comparison.margin} is not above 0")
    seeds = sorted(comparison.higher.keys() & comparison.lower.keys())
    values = np.array([comparison.higher[seed] - comparison.lower[seed] for seed in seeds], np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{comparison.claim}: values are not finite: {values.tolist()}")
    return np.round(values, 12)  # equal values may themselves be differences, which differ by rounding


def _finding(comparison: Comparison, values: np.ndarray, p: float, corrected: float, equal: float,
             comparisons: int) -> Finding:
    count, mean, spread = len(values), float(values.mean()) if len(values) else np.nan, deviation(values)
    half = special.stdtrit(count - 1, 0.5 + 0.95 / 2) * spread / np.sqrt(count) if count > 1 else np.inf
    judged = comparison.check and count >= MIN_SEEDS and spread > 0
    if judged and corrected <= LEVEL:
        verdict = SEEN if mean > 0 else OPPOSITE
    else:
        verdict = f"no effect larger than {comparison.margin:g}" if judged and equal <= LEVEL else INSENSITIVE
    visible = visible_effect(upper_deviation(spread, count), count, comparisons) if spread > 0 else np.nan
    return Finding(comparison.claim, comparison.margin, count, mean, spread, (mean - half, mean + half), p,
                   sign_flip_test(values), corrected, equal, visible, verdict)


def deviation(values: np.ndarray) -> float:
    """Returns the standard deviation of [n], n - 1 in the denominator; 0 where rounding alone makes one, or of n < 2.

    Differences of equal values differ by rounding: 1e-12 of their size counts as none.
    """
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return spread if spread > 1e-12 * float(np.abs(values).max(initial=0)) else 0.0


def t_test(values: np.ndarray) -> float:
    """Returns the two-sided p of Student's t test that the mean of [n] is 0; 1 where nothing varies."""
    spread = deviation(values)
    if not spread:
        return 1.0
    return float(2 * special.stdtr(len(values) - 1, -abs(values.mean()) / (spread / np.sqrt(len(values)))))


def sign_flip_test(values: np.ndarray) -> float:
    """Returns the two-sided p of the mean of [n] among those with all signs, or FLIPS draws of them, flipped.

    It is the paired permutation test: exact, that is with its size whatever the symmetric distribution, up to EXACT
    pairs. The smallest p of n pairs is 2 / 2^n.
    """
    if not values.size:
        return 1.0
    count, sums = len(values), np.zeros(1)
    if count <= EXACT:
        for value in values:
            sums = np.concatenate([sums + value, sums - value])
    else:
        signs = np.random.default_rng(0).integers(0, 2, (FLIPS, count), np.int8) * 2 - 1
        sums = np.append(signs @ values, values.sum())  # the observed one counts as a draw, else p may be 0
    near = 1e-9 * np.abs(values).sum()  # sums that are equal but for rounding are ties
    return float(np.mean(np.abs(sums) >= abs(values.sum()) - near))


def equivalence_test(values: np.ndarray, margin: float) -> float:
    """Returns the larger p of two one-sided t tests, that the mean of [n] is not within ± margin (Schuirmann, 1987)."""
    spread = deviation(values)
    if not spread:
        return 1.0
    return float(special.stdtr(len(values) - 1, (abs(values.mean()) - margin) / (spread / np.sqrt(len(values)))))


def holm(p: Sequence[float]) -> list[float]:
    """Returns p values corrected for their number (Holm, 1979): the k-th smallest of m times m - k + 1, ascending."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected


def upper_deviation(deviation: float, pairs: int) -> float:
    """Returns the upper limit, one-sided at LIMIT, of the true deviation, of what a pilot of `pairs` found."""
    return float(deviation * np.sqrt((pairs - 1) / special.chdtri(pairs - 1, LIMIT)))


def power(effect: float, deviation: float, pairs: int, comparisons: int = 1) -> float:
    """Returns the least power of the t test for an effect in its direction, if the true deviation is the one given.

    At LEVEL / comparisons, Holm's hardest step: among several effects, the later ones are seen more easily.
    """
    freedom = pairs - 1
    critical = stats.t.isf(LEVEL / comparisons / 2, freedom)
    return float(stats.nct.sf(critical, freedom, abs(effect) * np.sqrt(pairs) / deviation))


def planned_power(pilot: Finding, seeds: int, comparisons: int) -> float:
    """Returns the least power for a pilot's margin with so many seeds, at the upper limit of its deviation."""
    return power(pilot.margin, upper_deviation(pilot.deviation, pilot.pairs), seeds, comparisons)


def outlook(findings: Sequence[Finding], pilots: int, seeds: int) -> list[str]:
    """Returns a line for each comparison that has the seeds of a pilot and not yet all: the power it will have."""
    return [f"- {found.claim}: with {seeds} seeds, {found.margin:g} would be seen with a power of "
            f"{planned_power(found, seeds, len(findings)):.2f} at least"
            for found in findings if pilots <= found.pairs < seeds and found.deviation]


def equivalence_power(margin: float, deviation: float, pairs: int, comparisons: int = 1) -> float:
    """Returns the least power of the two one-sided tests where there is no effect at all, likewise.

    The mean of what is left of ± margin, in units of the mean's error, over the distribution of the deviation found.
    """
    freedom = pairs - 1
    critical = stats.t.isf(LEVEL / comparisons, freedom)
    found = np.sqrt(stats.chi2.ppf((np.arange(20_000) + 0.5) / 20_000, freedom) / freedom)  # in units of the true one
    room = margin * np.sqrt(pairs) / deviation - critical * found
    return float(np.mean(np.maximum(2 * stats.norm.cdf(room) - 1, 0)))


def visible_effect(deviation: float, pairs: int, comparisons: int = 1) -> float:
    """Returns the effect that is seen with POWER; infinite for fewer than 2 pairs."""
    return deviation * _visible(pairs, comparisons)


@functools.cache
def _visible(pairs: int, comparisons: int) -> float:
    """Returns the effect that is seen, in deviations."""
    if pairs < 2:
        return np.inf
    low, high = 0.0, 1.0
    while power(high, 1, pairs, comparisons) < POWER:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, 1, pairs, comparisons) < POWER else (low, middle)
    return high


def table(findings: Iterable[Finding], digits: int = 3) -> str:
    """Returns the Markdown table of a study's findings, with what its columns mean below it."""
    lines = ["| claim | seeds | difference | 95 % | p, corrected | by sign flips | would have seen | verdict |",
             "|---|---|---|---|---|---|---|---|"]
    disagree = []
    for found in findings:
        numbers = [f"{value:+.{digits}f}" for value in (found.mean, *found.interval)] if found.pairs > 1 else ["-"] * 3
        visible = f"{found.visible:.{digits}f}" if np.isfinite(found.visible) else "-"
        lines.append(f"| {found.claim} | {found.pairs} | {numbers[0]} | {numbers[1]} to {numbers[2]} | "
                     f"{found.p_corrected:.2g} | {found.p_flip:.2g} | {visible} | {found.verdict} |")
        if found.pairs >= MIN_SEEDS and (found.p <= LEVEL) != (found.p_flip <= LEVEL):
            disagree.append(found.claim)
    lines += ["", NOTE]
    if disagree:
        lines += ["", f"The t test and the sign-flip test disagree, uncorrected, about: {'; '.join(disagree)}."]
    return "\n".join(lines)
