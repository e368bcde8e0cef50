"""Cases worked out by hand from the released algorithm; every expected number is typed in."""

from __future__ import annotations

import numpy as np
import pytest

from spp_export.planning.published import (
    domain_scores,
    infer_domains,
    published_mask,
    session_breadth,
)


def kept(result):
    return {(int(layer), int(head)) for layer, head in np.argwhere(result.mask)}


# Four layers, four heads, three domains; every layer sees domain 0 alone.
SHARP = np.array([[0.8, 0.1, 0.1]] * 4)
SHARP_IMPORTANCE = np.zeros((4, 4, 3))
SHARP_IMPORTANCE[:, :, 0] = [
    [0.90, 0.80, 0.10, 0.20],
    [0.70, 0.30, 0.40, 0.10],
    [0.60, 0.65, 0.20, 0.10],
    [0.05, 0.15, 0.12, 0.11],
]
SHARP_IMPORTANCE[:, :, 1] = SHARP_IMPORTANCE[::-1, ::-1, 0]


def test_single_domain():
    # Rows sum to 1. score_0 = (0.6*0.8 + 0.4*0.8) * (1 + 0.3/5) = 0.8 * 1.06 = 0.848;
    # score_1 = score_2 = 0.1 * 1.06 = 0.106 < 0.15: domain 0 alone.
    assert domain_scores(SHARP) == pytest.approx([0.848, 0.106, 0.106])
    # c = (0.8*0.2231436 + 2*0.1*2.3025851) / ln 3 = (0.1785148 + 0.4605170) / 1.0986123
    assert session_breadth(SHARP) == pytest.approx(0.5816721, abs=1e-6)
    result = published_mask(SHARP, SHARP_IMPORTANCE, [(3, 3)], 0.6)
    assert result.inferred == (0,)
    assert result.similarities.tolist() == [0.8, 0.1, 0.1]
    assert not result.low
    # beta = 0.1 + 0.6 * 0.5816721 = 0.4490033; the largest similarity is a fixed point of the
    # warp, so kappa = 0.4490033 * 0.8 = 0.3592026.
    assert result.base_keep_ratio == pytest.approx(0.4490033, abs=1e-6)
    assert result.keep_ratio == pytest.approx({0: 0.3592026}, abs=1e-6)
    # int(16 * 0.3592026) = int(5.747) = 5: 0.90 0.80 0.70 0.65 0.60; and the whitelist's (3, 3),
    # which is all that layer 3 has.
    assert kept(result) == {(0, 0), (0, 1), (1, 0), (2, 1), (2, 0), (3, 3)}
    assert result.ratio == pytest.approx(0.625)  # 1 - 6/16


def test_floor_one_head_per_layer():
    # Without the whitelist layer 3 is empty, and gets its best head: 0.15 at head 1.
    result = published_mask(SHARP, SHARP_IMPORTANCE, [], 0.6)
    assert kept(result) == {(0, 0), (0, 1), (1, 0), (2, 1), (2, 0), (3, 1)}


def test_whitelist_is_a_union():
    # (0, 0) is among the five already and adds nothing; (1, 3) and (3, 0) do.
    result = published_mask(SHARP, SHARP_IMPORTANCE, [(0, 0), (1, 3), (3, 0)], 0.6)
    assert kept(result) == {(0, 0), (0, 1), (1, 0), (2, 1), (2, 0), (1, 3), (3, 0)}


def test_two_domains_two_by_two():
    # Layers normalise to (0.75, 0.25) and (0.5, 0.5).
    # score_0 = (0.6*0.625 + 0.4*0.75) * (1 + 0.3/3) = 0.675 * 1.1 = 0.7425
    # score_1 = (0.6*0.375 + 0.4*0.50) * (1 + 0.3/3) = 0.425 * 1.1 = 0.4675
    probabilities = np.array([[0.6, 0.2], [0.3, 0.3]])
    assert domain_scores(probabilities) == pytest.approx([0.7425, 0.4675])
    importance = np.array([[[0.9, 0.5], [0.1, 0.4]], [[0.2, 0.8], [0.3, 0.6]]])
    result = published_mask(probabilities, importance, [], 0.5)
    assert result.inferred == (0, 1)
    assert result.similarities.tolist() == [0.6, 0.3]
    # q = (0.45, 0.25), qn = (0.6428571, 0.3571429):
    # c = (0.6428571*0.4418328 + 0.3571429*1.0296194) / ln 2 = 0.6517566 / 0.6931472 = 0.9402860
    assert result.breadth == pytest.approx(0.9402860, abs=1e-6)
    # beta = 0.5701430. The two similarities are the ends of the valid range, so neither moves:
    # kappa_0 = 0.5701430 * 0.6 = 0.3420858, kappa_1 = 0.5701430 * 0.3 = 0.1710429.
    assert result.keep_ratio == pytest.approx({0: 0.3420858, 1: 0.1710429}, abs=1e-6)
    # int(4 * 0.342) = 1; int(4 * 0.171) = 0, raised to 1. Domain 0: (0, 0); domain 1: (1, 0).
    assert kept(result) == {(0, 0), (1, 0)}
    assert result.ratio == 0.5


def test_single_domain_switch_drops_the_second_domain():
    probabilities = np.array([[0.6, 0.2], [0.3, 0.3]])
    importance = np.array([[[0.9, 0.5], [0.1, 0.4]], [[0.2, 0.8], [0.3, 0.6]]])
    result = published_mask(probabilities, importance, [], 0.5, single_domain=True)
    assert result.inferred == (0,)
    # Domain 0 keeps (0, 0); layer 1 is filled with domain 0's best there, 0.3 at head 1.
    assert kept(result) == {(0, 0), (1, 1)}


# Similarities 0.9, 0.5, 0.1. Domain 2 is too faint to take part, yet sets the valid minimum.
MIDDLE = np.array([[0.9, 0.5, 0.1]] * 4)
MIDDLE_IMPORTANCE = np.zeros((4, 4, 3))
# Domain 0 ranks layers 0 to 2 above layer 3.
MIDDLE_IMPORTANCE[:, :, 0] = np.linspace(0.9, 0.1, 16).reshape(4, 4)
# Domain 1 ranks layer 3 first, its heads in order.
MIDDLE_IMPORTANCE[:, :, 1] = 0.1
MIDDLE_IMPORTANCE[3, :, 1] = [0.9, 0.8, 0.7, 0.6]


def test_the_warp_is_applied_twice():
    # Rows sum to 1.5: shares 0.6, 0.3333333, 0.0666667; times 1 + 0.3/5:
    assert domain_scores(MIDDLE) == pytest.approx([0.636, 0.3533333, 0.0706667], abs=1e-6)
    result = published_mask(MIDDLE, MIDDLE_IMPORTANCE, [], 1.0)
    assert result.inferred == (0, 1)
    # c = (0.6*0.5108256 + 0.3333333*1.0986123 + 0.0666667*2.7080502) / ln 3
    #   = 0.8532361 / 1.0986123 = 0.7766490; beta = 0.8766490
    assert result.base_keep_ratio == pytest.approx(0.8766490, abs=1e-6)
    # s_1 = 0.5 is 0.5 of the way from 0.1 to 0.9. 0.5^1.5 = 0.3535534, once: 0.3828427;
    # 0.3535534^1.5 = 0.2102241, twice: 0.1 + 0.8*0.2102241 = 0.2681793.
    # kappa_0 = 0.8766490*0.9 = 0.7889841, kappa_1 = 0.8766490*0.2681793 = 0.2350991.
    assert result.keep_ratio == pytest.approx({0: 0.7889841, 1: 0.2350991}, abs=1e-6)
    # int(16*0.789) = 12: layers 0 to 2. int(16*0.235) = int(3.76) = 3 of layer 3. Warped once,
    # kappa_1 would be 0.3356187 and int(5.37) = 5; with the valid range over the inferred
    # domains only, s_1 would be its minimum and stay 0.5, for int(7.01) = 7.
    assert kept(result) == {(i, j) for i in range(3) for j in range(4)} | {(3, 0), (3, 1), (3, 2)}
    assert result.ratio == pytest.approx(0.0625)  # 1 - 15/16


def test_low_similarity_falls_back_to_mean_importance():
    # Shares (0.7142857, 0.2857143) and (0.3333333, 0.6666667):
    # score_0 = (0.6*0.5238095 + 0.4*0.7142857) * 1.1 = 0.66
    # score_1 = (0.6*0.4761905 + 0.4*0.6666667) * 1.1 = 0.6076190
    probabilities = np.array([[0.05, 0.02], [0.04, 0.08]])
    assert domain_scores(probabilities) == pytest.approx([0.66, 0.6076190], abs=1e-6)
    # Means over domains: 0.10, 0.60 / 0.425, 0.35.
    importance = np.array([[[0.10, 0.10], [0.50, 0.70]], [[0.55, 0.30], [0.60, 0.10]]])
    result = published_mask(probabilities, importance, [], 0.5)
    assert result.low
    assert result.inferred == (0, 1)
    # q = (0.045, 0.05), qn = (0.4736842, 0.5263158):
    # c = (0.4736842*0.7472144 + 0.5263158*0.6418539) / ln 2 = 0.6917615 / 0.6931472 = 0.9980009
    # beta = 0.5990004; both similarities count as 0.3: kappa = 0.1797001.
    assert result.keep_ratio == pytest.approx({0: 0.1797001, 1: 0.1797001}, abs=1e-6)
    # One head each: (0, 1), best by the mean. By its own importance domain 0 would choose (1, 1).
    # Layer 1 is empty and gets its best mean, 0.425 at head 0.
    assert kept(result) == {(0, 1), (1, 0)}


def test_floors_on_all_heads_and_per_layer():
    # Shares 0.9090909 and 0.0909091; score_1 = 0.0909091*1.06 = 0.0963636 < 0.15: domain 0 alone.
    probabilities = np.array([[0.1, 0.01]] * 4)
    # The importance of domain 0 falls from head to head and layer to layer.
    importance = np.zeros((4, 40, 2))
    importance[:, :, 0] = 1.0 / np.arange(1, 161).reshape(4, 40)
    result = published_mask(probabilities, importance, [], 0.0)
    assert result.inferred == (0,)
    assert not result.low
    # One valid similarity, so no warp: kappa = 0.1 * 0.1 = 0.01, int(1.6) = 1: (0, 0).
    assert result.keep_ratio == pytest.approx({0: 0.01})
    # (i) one head per layer: (1, 0) (2, 0) (3, 0), 4 in all.
    # (ii) max(int(0.05 * 160), 4) = 8: the four best left, (0, 1) to (0, 4).
    # (iii) int(0.1 * 40) = 4 per layer: layer 0 has 5; layers 1 to 3 get heads 1 to 3.
    expected = {(0, head) for head in range(5)}
    expected |= {(layer, head) for layer in (1, 2, 3) for head in range(4)}
    assert kept(result) == expected
    assert result.ratio == pytest.approx(0.89375)  # 1 - 17/160


def test_heads_go_in_by_index_where_no_domain_may_score():
    # Layers 0 to 4 see domain 0 (0.09) alone; layer 5 sees the other five at 0.1.
    probabilities = np.zeros((6, 6))
    probabilities[:5, 0] = 0.09
    probabilities[5] = [0.09, 0.1, 0.1, 0.1, 0.1, 0.1]
    # score_0 = 1 * (1 + 0.3/7) = 1.042857. Layer 5 sums to 0.59, so the others have one share of
    # 0.1694915: (0.6*0.0338983 + 0.4*0.1694915) * (1 + 0.3/2) = 0.1013559 < 0.15.
    expected = [1.0428571] + [0.1013559] * 5
    assert domain_scores(probabilities) == pytest.approx(expected, abs=1e-6)
    importance = np.random.default_rng(0).random((2, 20, 6))
    result = published_mask(probabilities, importance, [], 0.5)
    # The only inferred domain has similarity 0.09 < 0.1 and is skipped, while others reach 0.1.
    assert result.inferred == (0,)
    assert not result.low
    assert result.keep_ratio == {}
    # max(int(0.1 * 20), 1) = 2 heads per layer.
    assert kept(result) == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_equal_scores_go_by_layer_then_head():
    probabilities = np.array([[0.9]] * 4)  # one domain: c = 0, beta = 0.1
    result = published_mask(probabilities, np.ones((4, 4, 1)), [], 0.5)
    # kappa = 0.09, int(1.44) = 1: (0, 0); then head 0 of every layer.
    assert kept(result) == {(0, 0), (1, 0), (2, 0), (3, 0)}


def test_uniform_outputs_fire_all_six_domains():
    # Uniform probes: (1/6) * (1 + 0.3/33) = 0.1681818 > 0.15 for every domain.
    probabilities = np.full((32, 6), 0.4)
    assert domain_scores(probabilities) == pytest.approx([0.1681818] * 6, abs=1e-6)
    assert infer_domains(probabilities) == (0, 1, 2, 3, 4, 5)
