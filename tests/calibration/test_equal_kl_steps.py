"""Steps that add the same KL everywhere, and the search for their factor."""

import math

import pytest

from kvferry.calibration.search import RATIO_PRECISION, factor_for_kl, factor_for_ratio
from kvferry.calibration.steps import MOST_RATIO, equal_steps, scaled

DEVIATIONS = [(2.0, 0.5), (1.0, 4.0), (0.1, 3.0)]
SENSITIVITIES = [(0.002, 0.004), (0.05, 0.001), (0.007, 0.003)]


def test_every_side_adds_the_same_kl():
    """On a toy: KL is sensitivity times the square of the step in deviations, as for small errors."""
    steps = equal_steps(DEVIATIONS, SENSITIVITIES)
    added = [
        sensitivity * (step / deviation) ** 2
        for of_steps, of_deviations, of_kl in zip(steps, DEVIATIONS, SENSITIVITIES, strict=True)
        for step, deviation, sensitivity in zip(of_steps, of_deviations, of_kl, strict=True)
    ]
    assert added == pytest.approx([added[0]] * 6)
    relative = [step / deviation for s, d in zip(steps, DEVIATIONS, strict=True) for step, deviation in zip(s, d)]  # noqa: B905
    assert math.prod(relative) == pytest.approx(1.0)


@pytest.mark.parametrize("lost", [0.0, -0.003, 1e-12])
def test_a_sensitivity_lost_in_noise_goes_no_further_than_the_largest_ratio(lost):
    steps = equal_steps([(1.0, 1.0), (1.0, 1.0)], [(0.05, lost), (0.01, 0.05)])
    assert steps[0][1] / steps[0][0] == pytest.approx(MOST_RATIO)
    assert steps[0][0] < steps[1][0] < steps[0][1]


def test_without_any_sensitivity_all_steps_are_deviations():
    assert equal_steps(DEVIATIONS, [(0.0, -1e-4)] * 3) == DEVIATIONS


def test_scaling_keeps_proportions():
    assert scaled([(1.0, 2.0), (3.0, 4.0)], 0.5) == [(0.5, 1.0), (1.5, 2.0)]


@pytest.mark.parametrize("most", [6e-4, 2e-3, 0.4])
def test_the_factor_for_a_kl_is_the_largest_that_meets_it(most):
    def kl(factor):
        return 4e-4 + 2e-3 * factor**2

    factor = factor_for_kl(kl, most)
    assert 0.93 * most <= kl(factor) <= most


def test_a_kl_that_rounding_alone_exceeds_is_refused():
    with pytest.raises(ValueError, match=r"at most 0\.0003 cannot be reached: .* cause 0\.0004"):
        factor_for_kl(lambda factor: 4e-4 + 2e-3 * factor**2, 3e-4)


def test_a_kl_that_nothing_exceeds_ends():
    assert factor_for_kl(lambda factor: 1e-4, 1e-3) > 8


@pytest.mark.parametrize("least", [2.0, 4.0, 7.3, 30.0])
def test_the_factor_for_a_ratio_meets_it_within_a_few_tries(least):
    tries = []

    def ratio(factor):
        tries.append(factor)
        return 16 / (0.3 + math.log2(1 + 5 / factor))

    assert least <= ratio(factor_for_ratio(ratio, least)) <= least * RATIO_PRECISION
    assert len(tries) <= 9


def test_a_ratio_out_of_reach_is_refused():
    with pytest.raises(ValueError, match="ratio of 60 cannot be reached"):
        factor_for_ratio(lambda factor: 16 / (0.3 + math.log2(1 + 5 / factor)), 60)
