"A threshold keeps its promise, and p-values count what they say."

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from aoe_nb.conformal import Conformal, allowed_above, images_needed

levels = st.floats(0.001, 0.5)
sure = st.one_of(st.none(), st.floats(0.5, 0.999))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), fpr=levels, confidence=sure)
def test_the_threshold_is_the_lowest_that_keeps_the_promise(n, fpr, confidence):
    "Against the law of the flagged share, Beta(allowed+1, n-allowed)"

    def kept(allowed):
        if (allowed + 1) / (n + 1) > fpr * (1 + 1e-9):
            return False
        return confidence is None or stats.beta.cdf(fpr, allowed + 1, n - allowed) >= confidence - 1e-9

    if n < images_needed(fpr, confidence):
        assert not kept(0)
        with pytest.raises(ValueError, match='hold out more'):
            allowed_above(n, fpr, confidence)
        return
    allowed = allowed_above(n, fpr, confidence)
    assert kept(allowed)
    assert allowed + 1 >= n or not kept(allowed + 1)


@settings(max_examples=100, deadline=None)
@given(
    known=st.lists(st.integers(-5, 5), min_size=19, max_size=60),
    new=st.lists(st.integers(-7, 7), min_size=1, max_size=20),
)
def test_p_values_by_brute_force(known, new):
    rule = Conformal(torch.tensor(known).float(), 0.05, None)
    expected = [(1 + sum(k >= s for k in known)) / (len(known) + 1) for s in new]
    scores = torch.tensor(new).float()
    assert np.allclose(rule.p(scores), expected)
    assert torch.equal(rule.flag(scores), rule.p(scores) <= torch.tensor(rule.level))
    assert torch.equal(rule.flag(scores), scores > rule.threshold)


@pytest.mark.parametrize('scale', [1e-6, 1, 1e6])
def test_a_score_that_differs_by_rounding_is_a_tie(scale):
    scores = scale * torch.randn(500, generator=torch.Generator().manual_seed(0))
    rule = Conformal(scores)
    for wobble in 1 - 5e-6, 1, 1 + 5e-6:
        assert rule.flag(scores * wobble).sum() == rule.allowed
        assert torch.equal(rule.p(scores * wobble).sort().values, rule.p(scores).sort().values)


@pytest.mark.parametrize('offset', [0, 1e3, -1e4, 1e5])
def test_outliers_are_found_wherever_scores_lie(offset):
    gen = torch.Generator().manual_seed(0)
    known, same, far = (torch.randn(n, generator=gen, dtype=torch.float64) for n in (2000, 9000, 9000))
    rule = Conformal(known + offset)
    assert rule.flag(offset + same).float().mean() <= 0.05
    assert rule.flag(offset + 4 + far).float().mean() > 0.97
    assert rule.flag((offset + known) * (1 + 3e-7)).sum() <= rule.allowed + 1


def test_infinite_scores_are_ranked_and_nan_is_strange():
    rule = Conformal([-math.inf, *range(98), math.inf])
    assert rule.flag([math.inf, math.nan, -math.inf]).tolist() == [True, True, False]
    assert torch.isfinite(rule.p([math.inf, math.nan, -math.inf])).all()
    with pytest.raises(ValueError, match='1 of 100 scores are NaN'):
        Conformal([math.nan, *range(99)])


laws = dict(
    normal=stats.norm(), heavy_tails=stats.t(1.5), skewed=stats.expon(), ties=stats.poisson(2), bounded=stats.uniform()
)


@pytest.mark.parametrize('fpr', [0.01, 0.05, 0.2])
@pytest.mark.parametrize('n', [299, 1000])
@pytest.mark.parametrize('law', laws)
def test_the_promise_is_kept(fpr, n, law):
    "The share of all inliers that is flagged is known, for the law of the scores is"
    law = laws[law]
    rng = np.random.default_rng(0)
    rules = [Conformal(scores, fpr) for scores in law.rvs(size=(200, n), random_state=rng)]
    flagged = law.sf([rule.threshold for rule in rules])
    assert (flagged <= fpr).mean() >= 0.95 - 3 * (0.95 * 0.05 / 200) ** 0.5
    on_average = law.sf([Conformal(rule.known, fpr, None).threshold for rule in rules])
    assert on_average.mean() <= fpr + 3 * (fpr * (1 - fpr) / n / 200) ** 0.5


@pytest.mark.parametrize(
    ('settings', 'says'),
    [
        (dict(fpr=0), 'between 0 and 1'),
        (dict(fpr=5), 'such as .05'),
        (dict(confidence=1), 'must lie between 0 and 1'),
        (dict(scores=[[1.0]]), r'shape \(1, 1\)'),
        (dict(scores=[1.0] * 58), 'takes 59 held-out inliers, there are 58'),
    ],
)
def test_bad_input_names_cause_and_remedy(settings, says):
    with pytest.raises(ValueError, match=says):
        Conformal(**dict(scores=torch.zeros(100)) | settings)
