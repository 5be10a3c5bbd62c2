"""Verdicts on simulated studies whose effects are known are wrong as rarely, and see as often, as they promise."""

import itertools

import numpy as np
import pytest
from scipy import stats

from studies import verdicts
from studies.verdicts import INSENSITIVE, OPPOSITE, SEEN, Comparison, judge

STUDIES, SEEDS, MARGIN = 1000, 8, 2.0


def simulated(rng, effects, seeds=SEEDS, deviation=1.0):
    """Returns comparisons whose arms share what a seed makes of both, and differ by the effects."""
    found = []
    for effect in effects:
        shared, noise = 3 * rng.normal(size=seeds), deviation * rng.normal(size=(2, seeds)) / np.sqrt(2)
        arms = (dict(enumerate(values)) for values in (shared + effect + noise[0], shared + noise[1]))
        found.append(Comparison("claim", *arms, MARGIN))
    return found


def rates(effects, deviation=1.0, seeds=SEEDS, studies=STUDIES):
    """Returns the verdicts of many studies, [studies, comparisons]."""
    rng = np.random.default_rng(0)
    return np.array([[found.verdict for found in judge(simulated(rng, effects, seeds, deviation))]
                     for _ in range(studies)])


def bounds(share, count=STUDIES):
    """Returns what a share may be measured as: binomial, once in 10,000 outside."""
    return stats.binom.ppf([5e-5, 1 - 5e-5], count, share) / count


def test_effects_that_are_not_there_are_seen_in_5_of_100_studies_whatever_the_number_of_comparisons():
    for count in (1, 4):
        found = rates([0.0] * count)
        false = np.isin(found, [SEEN, OPPOSITE]).any(1).mean()
        low, high = bounds(0.05)
        assert low <= false <= high
    # of one comparison, each direction alike
    alone = rates([0.0])
    assert bounds(0.025)[0] <= (alone == OPPOSITE).mean() <= bounds(0.025)[1]


def test_effects_as_large_as_the_margin_are_denied_in_5_of_100_studies():
    one, many = rates([MARGIN], deviation=3.0), rates([MARGIN, -MARGIN, MARGIN], deviation=0.5)
    denial = f"no effect larger than {MARGIN:g}"
    assert (one == denial).mean() <= bounds(0.05)[1]
    assert (many == denial).any(1).mean() <= bounds(0.05)[1]
    rng = np.random.default_rng(1)
    small = rng.normal(MARGIN, 0.5, (STUDIES, SEEDS))  # the test alone: a verdict says "seen" first
    p = [verdicts.equivalence_test(row, MARGIN) for row in small]
    assert bounds(0.05)[0] <= np.mean(np.less_equal(p, 0.05)) <= bounds(0.05)[1]


def test_other_comparisons_effects_make_no_false_verdict_more_likely():
    found = rates([4.0, 0.0, 0.0, 4.0])
    assert np.isin(found[:, [1, 2]], [SEEN, OPPOSITE]).any(1).mean() <= bounds(0.05)[1]
    assert (found[:, [0, 3]] == SEEN).mean() > 0.99


@pytest.mark.parametrize(("effect", "count"), [(1.0, 1), (1.5, 1), (-1.3, 1), (1.5, 3)])
def test_effects_are_seen_as_often_as_the_power_promises(effect, count):
    found = rates([effect] + [0.0] * (count - 1))[:, 0]
    promised = verdicts.power(effect, 1.0, SEEDS, count)
    assert 0.1 < promised < 0.99
    low, high = bounds(promised)
    assert low <= (found == (SEEN if effect > 0 else OPPOSITE)).mean() <= high + (0.03 if count > 1 else 0)


@pytest.mark.parametrize("deviation", [1.4, 1.8])
def test_no_effect_is_said_as_often_as_the_power_promises(deviation):
    rng = np.random.default_rng(2)
    p = [verdicts.equivalence_test(row, MARGIN) for row in deviation * rng.normal(size=(STUDIES, SEEDS))]
    low, high = bounds(verdicts.equivalence_power(MARGIN, deviation, SEEDS))
    assert 0.2 < (low + high) / 2 < 0.99
    assert low <= np.mean(np.less_equal(p, 0.05)) <= high


def test_a_pilots_upper_limit_is_above_the_true_deviation_in_80_of_100_pilots():
    pilots = np.random.default_rng(3).normal(size=(STUDIES, 4)).std(1, ddof=1)
    found = np.mean([verdicts.upper_deviation(spread, 4) > 1 for spread in pilots])
    assert bounds(0.8)[0] <= found <= bounds(0.8)[1]


def test_the_visible_effect_is_the_one_that_is_seen_with_the_power_said():
    for pairs, count in itertools.product((2, 3, 8, 30), (1, 12)):
        effect = verdicts.visible_effect(0.7, pairs, count)
        assert verdicts.power(effect, 0.7, pairs, count) == pytest.approx(verdicts.POWER, abs=1e-3)
    assert verdicts.visible_effect(0.7, 1) == np.inf


@pytest.mark.parametrize("seeds", [3, 8, 12])
def test_p_values_are_scipys(seeds):
    rng = np.random.default_rng(seeds)
    first, second = rng.normal(0.4, 1, (2, seeds))
    values = first - second
    assert verdicts.t_test(values) == pytest.approx(stats.ttest_rel(first, second).pvalue)
    flips = stats.permutation_test((values,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert verdicts.sign_flip_test(values) == pytest.approx(flips.pvalue)
    sides = [stats.ttest_1samp(values, bound, alternative=side).pvalue
             for bound, side in ((-MARGIN, "greater"), (MARGIN, "less"))]
    assert verdicts.equivalence_test(values, MARGIN) == pytest.approx(max(sides))


def test_sign_flips_of_many_pairs_are_near_the_t_test_and_never_0():
    values = np.random.default_rng(4).normal(0.3, 1, 40)
    assert verdicts.sign_flip_test(values) == pytest.approx(verdicts.t_test(values), abs=0.01)
    assert 0 < verdicts.sign_flip_test(values + 10) <= 1e-4
    assert verdicts.sign_flip_test(np.ones(8)) == 2 / 2**8
    assert verdicts.sign_flip_test(np.array([1.0, -1.0])) == 1


def test_holms_correction_is_the_published_one():
    """Worked by hand: of 4, the smallest times 4, the next times 3 ..., never below the one before."""
    assert verdicts.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert verdicts.holm([0.6, 0.5]) == [1, 1]
    assert verdicts.holm([]) == []


def finding(values, **others):
    zeros = dict.fromkeys(range(len(values)), 0.0)
    return judge([Comparison("c", dict(enumerate(values)), zeros, MARGIN, **others)])[0]


STRONG = [3.0, 3.1, 2.9, 3.2, 2.8, 3.05, 2.95, 3.0]


@pytest.mark.parametrize(("values", "others", "verdict"), [
    (STRONG, {}, SEEN), ([-value for value in STRONG], {}, OPPOSITE),
    ([value - 3 for value in STRONG], {}, "no effect"), (STRONG[:7], {}, INSENSITIVE),
    (STRONG, {"check": False}, INSENSITIVE), ([0.0] * 8, {}, INSENSITIVE), ([9.0] * 8, {}, INSENSITIVE),
    ([], {}, INSENSITIVE), ([1.0], {}, INSENSITIVE),
    ([9, -9, 8, -8, 7, -7, 1, 0.5], {}, INSENSITIVE)])
def test_a_verdict_is_one_of_four(values, others, verdict):
    """Of few seeds, of arms that do not vary and of an instrument that cannot move, nothing is said."""
    found = finding(values, **others)
    assert found.verdict.startswith(verdict)
    assert found.verdict in (SEEN, OPPOSITE, INSENSITIVE, f"no effect larger than {MARGIN:g}")
    assert found.pairs == len(values)
    assert "| c |" in verdicts.table([found])


def test_arms_are_paired_by_their_seeds():
    higher = {7: 1.0, 3: 2.0, 5: 9.0}
    found = judge([Comparison("c", higher, {3: 1.5, 7: 0.25, 4: 0.0}, MARGIN)])[0]
    assert (found.pairs, found.mean) == (2, pytest.approx((0.75 + 0.5) / 2))


def test_what_is_not_finite_and_a_margin_of_none_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        finding([1.0, float("nan")])
    with pytest.raises(ValueError, match="margin 0"):
        judge([Comparison("c", {0: 1.0}, {0: 0.0}, 0.0)])


def test_a_table_says_where_the_two_tests_disagree():
    found = finding([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 4.0])
    assert found.p > 0.05 > found.p_flip
    assert "disagree" in verdicts.table([found])
    assert "disagree" not in verdicts.table([finding(STRONG)])


def test_differences_that_only_rounding_tells_apart_give_no_verdict():
    rng = np.random.default_rng(0)
    lost = {}
    for name in ("higher", "lower"):  # both lose exactly a tenth, from other accuracies
        whole = np.round(rng.uniform(0.7, 0.9, SEEDS), 4)
        lost[name] = dict(enumerate((whole - np.round(whole - 0.1, 4)).tolist()))
    [found] = judge([verdicts.Comparison("alike", lost["higher"], lost["lower"], MARGIN)])
    assert found.verdict == verdicts.INSENSITIVE
