"""How much Probe Pruning removes: the targets that follow from the paper's settings."""

from __future__ import annotations

from fractions import Fraction

import pytest

from spp_export.common.errors import UsageError
from spp_export.importance.probe_counts import channels_kept, depth_corrected, heads_dropped

# layers, heads, channels, ratio: corrected share, heads removed and channels kept per layer
TARGETS = {
    "llama-2-7b 20 %": (32, 32, 11008, 0.2, 0.22, 7, 8640),
    "llama-2-7b 40 %": (32, 32, 11008, 0.4, 0.44, 14, 6208),
    "llama-2-13b 20 %": (40, 40, 13824, 0.2, 0.22, 8, 10816),
    "llama-2-13b 40 %": (40, 40, 13824, 0.4, 0.43, 17, 7936),
    "llama-3.1-8b 40 %": (32, 32, 14336, 0.4, 0.44, 14, 8064),
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_worked_targets(target):
    layers, heads, channels, ratio, share, dropped, kept = target
    assert depth_corrected(ratio, layers) == share
    assert heads_dropped(share, heads) == dropped
    assert channels_kept(share, channels) == kept


@pytest.mark.parametrize("percent", range(100))
def test_counts_round_as_exact_fractions_do(percent):
    for count in (7, 9, 32, 100, 1536, 1537):
        removed = Fraction(percent, 100) * count // 1
        assert heads_dropped(percent / 100, count) == removed
        kept = next(k for k in range(count - removed, count + 1) if k % 8 == 0 or k == count)
        assert channels_kept(percent / 100, count, multiple=8) == kept


def test_fewer_layers_bear_what_the_skipped_are_spared():
    assert depth_corrected(0.3, 10, skipped=0) == 0.3
    assert depth_corrected(0.3, 4, skipped=1) == 0.4
    assert depth_corrected(0, 30) == 0


@pytest.mark.parametrize(("ratio", "layers"), [(0.9, 30), (0.5, 6), (0.1, 3), (0.1, 2)])
def test_more_than_the_other_layers_have_is_refused(ratio, layers):
    with pytest.raises(UsageError, match=rf"first 3 layers, so a ratio of {ratio} .* lower"):
        depth_corrected(ratio, layers)
