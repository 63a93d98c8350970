"Intervals hold the truth as often as they promise, also for few images and good detectors; what is refused."

import numpy as np, pytest, torch
from scipy import stats
from aoe_nb.energy import entropy
from aoe_nb.metrics import (
    bootstrap_interval,
    calibration_bins,
    image_bootstrap,
    metric_names,
    ood_metrics,
    report_from_scores,
)


def true_metrics(distance, sd=1.0, share=0.5):
    "The five metrics of N(0,1) against N(distance,sd) where outliers make up `share` of all images"
    t = np.linspace(-12, 12 + distance, 400_001)
    fpr, tpr = stats.norm.sf(t), stats.norm.sf(t, distance, sd)
    flagged = (1 - share) * fpr + share * tpr
    accepted = (1 - share) * (1 - fpr) + share * (1 - tpr)
    precision_out = share * tpr / np.maximum(flagged, 1e-300)
    precision_in = (1 - share) * (1 - fpr) / np.maximum(accepted, 1e-300)
    at_5 = stats.norm.ppf(0.05, distance, sd)
    return dict(
        AUROC=stats.norm.cdf(distance / np.hypot(1, sd)),
        AUPR_OUT=np.trapezoid(precision_out, 1 - tpr),
        AUPR_IN=np.trapezoid(precision_in, 1 - fpr),
        FPR95=stats.norm.sf(at_5),
        FPR95_ID=stats.norm.cdf(stats.norm.ppf(0.95), distance, sd),
    )


def coverage(n, m, auroc, runs, n_boot, names=metric_names):
    "The share of `runs` experiments in which the intervals of `names` hold the truth"
    distance = stats.norm.ppf(auroc) * 2**0.5
    true = true_metrics(distance, share=m / (n + m))
    held = dict.fromkeys(names, 0)
    for seed in range(runs):
        r = np.random.default_rng(seed)
        got = bootstrap_interval(r.normal(0, 1, n), r.normal(distance, 1, m), n_boot, seed)
        for k in names:
            held[k] += got[f'{k}_lo'] <= true[k] <= got[f'{k}_hi']
    return {k: v / runs for k, v in held.items()}


def at_least(share, runs):
    "92%, less what 1 in 200 simulations would miss by chance"
    return share - 2.6 * (share * (1 - share) / runs) ** 0.5


def test_the_true_metrics_of_many_images():
    r = np.random.default_rng(0)
    got = ood_metrics(r.normal(0, 1, 400_000), r.normal(2, 1, 200_000))
    assert got == pytest.approx(true_metrics(2, share=1 / 3), abs=3e-3)


@pytest.mark.parametrize('auroc', [0.8, 0.98, 0.993])
@pytest.mark.parametrize('n', [20, 50])
def test_auroc_is_covered(n, auroc):
    runs = 800
    assert coverage(n, n, auroc, runs, 2, ['AUROC'])['AUROC'] >= at_least(0.92, runs)


@pytest.mark.parametrize('auroc', [0.8, 0.98, 0.993])
@pytest.mark.parametrize('n,m', [(20, 20), (50, 50), (25, 100)])
def test_every_metric_is_covered(n, m, auroc):
    runs = 100
    for k, share in coverage(n, m, auroc, runs, 60).items():
        assert share >= at_least(0.92, runs), k


def test_the_difference_is_covered():
    runs, n = 150, 20
    true = true_metrics(3.2)['AUROC'] - true_metrics(2.9)['AUROC']
    held = 0
    for seed in range(runs):
        r = np.random.default_rng(seed)
        shared_in, shared_out = r.normal(size=n), r.normal(size=n)

        def seen(shared, shift):
            return 0.95 * shared + 0.3 * r.normal(size=n) + shift

        a = seen(shared_in, 0), seen(shared_out, 2.9)
        b = seen(shared_in, 0), seen(shared_out, 3.2)
        row = image_bootstrap(a, b, 60, seed).loc['AUROC']
        held += row.lo <= true <= row.hi
    assert held / runs >= at_least(0.92, runs)


def test_perfect_separation_leaves_room():
    got = bootstrap_interval(np.arange(20), 30 + np.arange(20), 20)
    for k in 'AUROC', 'AUPR_OUT', 'AUPR_IN':
        assert 0.75 < got[f'{k}_lo'] < 0.97 and got[f'{k}_hi'] == 1
    for k in 'FPR95', 'FPR95_ID':
        assert got[f'{k}_lo'] == 0 and got[f'{k}_hi'] == 1, 'twenty images set no limit'
    many = bootstrap_interval(np.arange(2000), 3000 + np.arange(2000), 5)
    assert 0.995 < many['AUROC_lo'] and many['FPR95_hi'] < 0.01


def test_one_image_says_nothing_about_others():
    got = bootstrap_interval([0.0], [1.0, 2.0], 5)
    assert all(got[f'{k}_lo'] == 0 and got[f'{k}_hi'] == 1 for k in metric_names)
    assert image_bootstrap(([0.0], [1.0]), ([0.0], [2.0]), 5)[['lo', 'hi']].to_numpy().tolist() == [[-1.0, 1.0]] * 5


@pytest.mark.parametrize('n,m', [(2, 3), (20, 20), (7, 300), (500, 500)])
@pytest.mark.parametrize('levels', [2, 5, 1000])
def test_limits_hold_their_metric_whatever_the_ties(n, m, levels):
    r = np.random.default_rng(0)
    s_in, s_out = r.integers(levels, size=n) - 0.0, r.integers(levels, size=m) + levels / 3
    s_out[0] = np.inf
    got, found = bootstrap_interval(s_in, s_out, 20), ood_metrics(s_in, s_out)
    for k in metric_names:
        assert 0 <= got[f'{k}_lo'] <= found[k] <= got[f'{k}_hi'] <= 1
    swapped = bootstrap_interval(-s_out, -s_in, 20)
    for k, o in ('AUROC', 'AUROC'), ('FPR95', 'FPR95_ID'):
        assert (swapped[f'{k}_lo'], swapped[f'{k}_hi']) == pytest.approx((got[f'{o}_lo'], got[f'{o}_hi']))


def test_only_the_order_of_scores_counts():
    r = np.random.default_rng(0)
    a, b = r.normal(size=40), r.normal(1, 1, 30)
    assert bootstrap_interval(a, b, 20) == bootstrap_interval(np.exp(a), np.exp(b), 20)


def test_two_detectors_that_both_separate_perfectly():
    r = np.random.default_rng(0)
    a = r.normal(size=20), r.normal(20, 1, 20)
    b = r.normal(size=20), r.normal(20, 1, 20)
    row = image_bootstrap(a, b, 20).loc['AUROC']
    assert row['diff'] == 0 and -0.2 < row.lo < -0.02 and 0.02 < row.hi < 0.2
    same = image_bootstrap(a, (2 * a[0], 2 * a[1]), 20)
    assert (same[['lo', 'hi']] == 0).all(axis=None), 'the same order of images is the same detector'


def test_means_lie_within_what_their_sets_allow():
    r = np.random.default_rng(0)
    s_in = r.normal(size=100)
    sets = {name: ('near', r.normal(1, 1, 80)) for name in 'abcd'}
    df = report_from_scores(s_in, sets, n_boot=100)
    width = df.AUROC_hi - df.AUROC_lo
    assert 0.4 * width['a'] < width['mean near'] < width[list('abcd')].mean()
    one = report_from_scores(s_in, {'a': sets['a']}, n_boot=100)
    ends = ['AUROC_lo', 'AUROC_hi', 'FPR95_lo', 'FPR95_hi']
    assert one.loc['mean near', ends].tolist() == pytest.approx(one.loc['a', ends].tolist())
    perfect = report_from_scores(s_in, {k: ('far', r.normal(50, 1, 80)) for k in 'ab'}, n_boot=20)
    assert perfect.AUROC_lo['mean far'] < 0.99, 'what never varied may vary together'


@pytest.mark.parametrize('confidence', [[np.nan, 0.5], [1.5, 0.5], [-0.1, 0.5], [np.inf, 0.5], [95.0, 50.0]])
def test_calibration_refuses_what_is_no_confidence(confidence):
    with pytest.raises(ValueError, match='confidence'):
        calibration_bins(confidence, [1, 0])


def test_calibration_refuses_other_answers_and_takes_rounding():
    with pytest.raises(ValueError, match='correct'):
        calibration_bins([0.5, 0.5], [1, np.nan])
    with pytest.raises(ValueError, match='one confidence an image'):
        calibration_bins([0.5, 0.5], [1])
    assert calibration_bins(np.float32([1 + 1e-7, 0.5]), [True, False]).n.sum() == 2


@pytest.mark.parametrize('n', [0, -1])
def test_nothing_to_count_is_refused(n):
    with pytest.raises(ValueError, match='n_boot must be at least 1'):
        bootstrap_interval([1, 2], [3, 4], n)
    with pytest.raises(ValueError, match='n_bins must be at least 1'):
        calibration_bins([0.5], [1], n)
    with pytest.raises(ValueError, match='no sets'):
        report_from_scores([1, 2], {})


@pytest.mark.parametrize('seed', [-1, 0.5, None])
def test_resamples_need_a_seed(seed):
    with pytest.raises(ValueError, match='seed must be a whole number from 0 on'):
        bootstrap_interval([1, 2], [3, 4], 9, seed)
    with pytest.raises(ValueError, match='seed must be a whole number from 0 on'):
        report_from_scores([1, 2], {'a': ('near', [3, 4])}, 9, seed)


def test_a_class_that_cannot_be_adds_no_entropy():
    logits = torch.tensor([[2.0, 1.0]], requires_grad=True)
    masked = torch.cat([logits, torch.full((1, 1), -torch.inf)], 1)
    assert torch.equal(entropy(masked), entropy(logits))
    grad, want = (torch.autograd.grad(entropy(o).sum(), logits)[0] for o in (masked, logits))
    assert torch.equal(grad, want)
