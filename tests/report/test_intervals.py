"""Intervals against published values, exact formulas and brute force."""

import itertools

import numpy as np
import pytest

from infini.report.intervals import _T, mean_interval, paired_difference, wilson_interval


def test_wilson_is_the_published_formula():
    # Newcombe 1998, table I, method 3, to four digits.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
    assert wilson_interval(0, 20)[0] == 0.0 and wilson_interval(29, 29)[1] == 1.0


def test_mean_interval_covers_as_often_as_it_says():
    random = np.random.default_rng(0)
    for count in (2, 3, 5):
        found = [mean_interval(draw) for draw in random.normal(7, 3, (4000, count)).tolist()]
        covered = np.mean([abs(mean - 7) <= half for mean, half in found])
        assert covered == pytest.approx(0.95, abs=0.012)


def test_quantiles_are_those_of_t():
    # The density of t, integrated: 2.5 % lies above each quantile.
    x = np.linspace(0, 400, 4_000_001)
    for freedom in (1, 2, 3, 10, 30):
        density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        total = np.trapezoid(density, x) if freedom > 1 else np.pi / 2
        above = np.trapezoid(density[x >= _T[freedom - 1]], x[x >= _T[freedom - 1]]) + (np.arctan(1 / 400) if freedom == 1 else 0)
        assert above / (2 * total) == pytest.approx(0.025, abs=2e-5), freedom


def test_paired_difference_is_the_bootstrap_over_documents():
    first, second, sizes = [10.0, 3.0, 8.0], [8.0, 3.5, 5.0], [4, 1, 3]
    difference, low, high = paired_difference(first, second, sizes)
    assert difference == pytest.approx((2.0 - 0.5 + 3.0) / 8)
    # Three documents have 27 draws, each as likely as the others.
    draws = sorted(
        sum(first[i] - second[i] for i in draw) / sum(sizes[i] for i in draw) for draw in itertools.product(range(3), repeat=3)
    )
    assert low == pytest.approx(draws[0]) and high == pytest.approx(draws[-1])  # 1 of 27 is more than 2.5 %


def test_hard_documents_widen_no_paired_interval():
    random = np.random.default_rng(1)
    hard = random.uniform(100, 10_000, 60)
    gain = random.normal(5, 1, 60)
    _, low, high = paired_difference(hard + gain, hard, np.full(60, 10))
    assert 0.45 < low < 0.5 < high < 0.55 and high - low < 0.08
    assert paired_difference(hard + gain, hard, np.full(60, 10)) == paired_difference(hard + gain, hard, np.full(60, 10))
