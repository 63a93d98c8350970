"Numbers and attacks beside other libraries', invariants, and the mistakes of this field, which must be caught."

import os
import subprocess
import sys
from functools import partial

import fastai.callback.all  # noqa: F401  `learn.no_bar` and its like
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.learner import Learner
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc, average_precision_score, precision_recall_curve

from aoe_nb.attack import FGSM, PGD, apgd, fgsm, mifgsm, pgd, square
from aoe_nb.data import inliers, unseen
from aoe_nb.energy import energy
from aoe_nb.evaluation import on_input
from aoe_nb.metrics import bootstrap_interval, compare_reports, ood_metrics
from aoe_nb.models import small_cnn


def peer(name):
    return pytest.importorskip(name, reason=f'{name} is not installed: nothing to compare with')


def near(value, tol=1e-12):
    return pytest.approx(value, abs=tol)


# Metrics


def vectors(kind, n_in=400, n_out=150, seed=0):
    "Scores of inliers and of outliers, all distinct or with many ties"
    rng = np.random.default_rng(seed)
    a = rng.normal(0, 1, n_in)
    b = rng.normal(1.5, 1, n_out)
    if kind == 'ties':
        return np.round(a * 2) / 2, np.round(b * 2) / 2
    return a, b


@pytest.mark.parametrize('kind', ['distinct', 'ties'])
def test_metrics_equal_pytorch_ood(kind):
    theirs = peer('pytorch_ood.metrics.functional')
    a, b = vectors(kind)
    s = torch.tensor(np.r_[a, b])
    y = torch.tensor([0] * len(a) + [-1] * len(b))
    got = ood_metrics(a, b)
    assert got['AUROC'] == near(float(theirs.auroc(s, y)))
    # FPR95 is inliers flagged at 95% of outliers detected, on both sides; FPR95_ID is the same with the roles swapped
    assert got['FPR95'] == near(float(theirs.fpr_at_tpr(s, y, 0.95)))
    assert got['FPR95_ID'] == near(float(theirs.fpr_at_tpr(-s, -1 - y, 0.95)))


@pytest.mark.parametrize('kind', ['distinct', 'ties'])
@pytest.mark.parametrize('name,side', [('AUPR_OUT', 'ood'), ('AUPR_IN', 'id')])
def test_each_aupr_equals_its_scikit_learn_counterpart(kind, name, side):
    "pytorch-ood's AUPR is the trapezoidal rule, ours average precision"
    theirs = peer('pytorch_ood.metrics.functional')
    a, b = vectors(kind)
    s = torch.tensor(np.r_[a, b])
    y = torch.tensor([0] * len(a) + [-1] * len(b))
    positive = (y < 0).numpy() if side == 'ood' else (y >= 0).numpy()
    scores = s.numpy() if side == 'ood' else -s.numpy()
    precision, recall, _ = precision_recall_curve(positive, scores)
    ours = ood_metrics(a, b)[name]
    assert ours == near(average_precision_score(positive, scores))
    assert float(theirs.aupr(s, y, positive=side)) == near(auc(recall, precision))
    assert ours == near(auc(recall, precision), 0.005 if kind == 'distinct' else 0.1)


few = st.lists(st.integers(-4, 4), min_size=1, max_size=25).map(np.array)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(few, few)
def test_metrics_by_definition_and_invariants(a, b):
    got = ood_metrics(a, b)
    thresholds = np.unique(np.r_[a, b])
    wins = [(y > x) + 0.5 * (y == x) for x in a for y in b]
    flagged = [np.mean(a >= t) for t in thresholds if np.mean(b >= t) >= 0.95]
    assert got['AUROC'] == near(np.mean(wins))
    assert got['FPR95'] == near(min(flagged))
    assert ood_metrics(a**3 + 2.0 * a, b**3 + 2.0 * b) == got, 'a monotone transform changes nothing'
    assert ood_metrics(b, a)['AUROC'] == near(1 - got['AUROC']), 'swapping roles mirrors AUROC'
    interval = bootstrap_interval(a, b, 20)
    for name in got:
        assert 0 <= interval[f'{name}_lo'] <= interval[f'{name}_hi'] <= 1


# Attacks


@pytest.fixture(scope='module')
def classifier():
    torch.manual_seed(0)
    net = small_cnn(3, 10).eval()
    return net, torch.rand(16, 3, 16, 16), torch.randint(10, (16,))


def up(net, y):
    "The loss whose descent raises the cross-entropy"
    return lambda x: -F.cross_entropy(net(x), y, reduction='none')


def test_fgsm_and_pgd_equal_torchattacks_on_cross_entropy(classifier):
    ta = peer('torchattacks')
    net, x, y = classifier
    loss = up(net, y)
    eps = 8 / 255
    alpha = 2 / 255

    def same(ours, theirs):
        assert (ours - theirs).abs().max() < 2e-6  # pixels

    same(fgsm(x, loss, eps), ta.FGSM(net, eps=eps)(x, y))
    theirs = ta.PGD(net, eps=eps, alpha=alpha, steps=5, random_start=False)
    same(pgd(x, loss, eps, 5, alpha=alpha, random_start=False), theirs(x, y))
    theirs = ta.PGDL2(net, eps=0.5, alpha=0.2, steps=5, random_start=False)
    same(pgd(x, loss, 0.5, 5, alpha=0.2, random_start=False, norm='l2'), theirs(x, y))
    theirs = ta.MIFGSM(net, eps=eps, alpha=alpha, steps=5, decay=1.0)
    same(mifgsm(x, loss, eps, 5, alpha=alpha), theirs(x, y))


def test_apgd_is_as_strong_as_torchattacks_and_square_comes_near_fgsm(classifier):
    ta = peer('torchattacks')
    net, x, y = classifier
    loss = up(net, y)
    gen = torch.Generator().manual_seed(0)

    def mean(adv):
        return loss(adv).mean().item()

    clean = mean(x)
    one = mean(fgsm(x, loss, 8 / 255))
    with torch.random.fork_rng():
        # its `perturb` hands back clean images where the label did not change
        found = ta.APGD(net, eps=8 / 255, steps=20).attack_single_run(x, y)
    theirs = -found[2].mean().item()
    assert mean(apgd(x, loss, 8 / 255, 20, generator=gen)) <= min(one, theirs + 0.02 * (clean - theirs))
    assert mean(square(x, loss, 8 / 255, 300, generator=gen)) < clean - 0.3 * (clean - one)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(['linf', 'l2']), st.integers(1, 6), st.integers(1, 4), st.integers(0, 10_000))
def test_attacks_never_do_worse_than_they_promise(norm, steps, restarts, seed):
    def gen():
        return torch.Generator().manual_seed(seed)

    x = torch.rand(3, 1, 5, 5, generator=gen())
    w = torch.randn(5, 5, generator=gen())

    def loss(x):
        return (torch.sin(30 * x) * w + x).flatten(1).sum(1)

    kept = gen()  # one after the other
    assert (loss(pgd(x, loss, 0.1, steps, keep_best=True, norm=norm, generator=kept)) <= loss(x)).all()
    assert (loss(apgd(x, loss, 0.1, steps, norm=norm, generator=kept)) <= loss(x)).all()
    assert (loss(square(x, loss, 0.1, steps, generator=gen())) <= loss(x)).all()
    for attack in pgd, apgd:
        one = attack(x, loss, 0.1, steps, restarts=1, norm=norm, generator=gen())
        more = attack(x, loss, 0.1, steps, restarts=restarts, norm=norm, generator=gen())
        assert (loss(more) <= loss(one)).all(), 'restarts never weaken'


# Mistakes


@pytest.fixture(scope='module')
def learn():
    torch.manual_seed(0)
    test = inliers('digits7', 'test')
    learn = Learner(inliers('digits7').dls(64, valid=test, normalize=([0.3], [0.37])), small_cnn(1, 7))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(10, 5e-3)
    return learn


@pytest.fixture(scope='module')
def flower():
    "Patches of a photograph, far from digits"
    return unseen('far', id='digits7')['flower']


def test_fpr_on_the_wrong_side_shows():
    a = np.r_[np.zeros(90), np.full(10, 5.0)]
    b = np.r_[np.full(50, 1.0), np.full(50, 6.0)]
    got = ood_metrics(a, b)
    assert got['FPR95'] == pytest.approx(0.1)
    assert got['FPR95_ID'] == pytest.approx(0.5), 'two numbers, two names'


def test_subsampling_the_outliers_changes_aupr_and_not_auroc():
    a, b = vectors('distinct', 5000, 5000)
    everything = ood_metrics(a, b)
    fifth = ood_metrics(a, b[::5])
    assert abs(everything['AUROC'] - fifth['AUROC']) < 0.02
    assert everything['AUPR_OUT'] - fifth['AUPR_OUT'] > 0.1


def test_report_says_how_many_and_keeps_noise_out_of_means(learn):
    report = learn.ood_report(unseen('all', id='digits7'))
    assert (report.n_in.dropna() == len(learn.dls.valid_ds)).all()
    assert report.n_out['digits389'] == 537
    natural = report[report.group.isin(['near', 'far'])].AUROC.mean()
    with_noise = report[report.group != 'mean'].AUROC.mean()
    assert report.AUROC['mean natural'] == pytest.approx(natural)
    assert report.AUROC['mean natural'] != pytest.approx(with_noise)


def test_normalised_images_are_refused(learn, flower):
    x = (flower.x[:20].float() / 255 - 0.3) / 0.37
    with pytest.raises(ValueError, match='normalis'):
        learn.ood_scores(x)
    with pytest.raises(ValueError, match='normalise inside the loss'):
        fgsm(x, lambda x: energy(learn.model(x)), 0.03)


def test_eight_bit_rounding_would_undo_a_small_attack(learn, flower):
    images = flower.take(slice(0, 50))
    attack = FGSM(0.4 / 255)
    adv = learn.attacked_images(images, attack)
    clean = learn.ood_scores(images)
    kept = learn.ood_scores(adv)
    rounded = learn.ood_scores((adv * 255).round().byte())
    assert torch.equal(kept, learn.ood_scores(images, attack=attack))
    assert (kept < clean).float().mean() > 0.9
    assert torch.equal(rounded, clean), 'saved as uint8 the attack is gone, so it never is'


def test_scores_do_not_depend_on_neighbours_nor_move_statistics(learn, flower):
    images = flower.take(slice(0, 64))
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.model.train()
    by_64 = learn.ood_scores(images, bs=64)
    by_7 = learn.ood_scores(images, bs=7)
    moved = learn.attacked_images(images, FGSM(8 / 255))
    moved_by_7 = learn.attacked_images(images, FGSM(8 / 255), bs=7)
    assert torch.allclose(by_64, by_7, atol=1e-5)
    assert (moved - moved_by_7).abs().mean() < 1e-4
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())

    def in_training_mode(x):
        return energy(learn.model(x)).detach()

    x = images.x.float() / 255
    assert not torch.allclose(in_training_mode(x)[:7], in_training_mode(x[:7]), atol=1e-5)
    learn.model.load_state_dict(before)
    learn.model.eval()


def test_every_point_of_a_curve_is_fresh(learn, flower):
    sizes = [0, 8 / 255, 32 / 255]
    attacks = [PGD(eps, 5) if eps else None for eps in sizes]
    curve = learn.robustness_curve({'flower': flower}, sizes, partial(PGD, steps=5))
    curve = curve.query('set == "flower"').AUROC.tolist()
    fresh = [learn.ood_report({'flower': flower}, attack=o).AUROC['flower'] for o in attacks]
    assert curve == pytest.approx(fresh)
    s_in = learn.ood_scores(learn.dls.valid)
    pooled = torch.cat([learn.ood_scores(flower, attack=o) for o in attacks])
    gap = ood_metrics(s_in, pooled)['AUROC'] - curve[-1]
    assert abs(gap) > 0.02, 'a metric that is not reset pools all smaller eps'


def naive(model, x):
    return 1 - (3000 * model(x)).softmax(1).amax(1)


def rounding(model, x):
    return energy(model((x * 4).round() / 4))


def cut_off(model, x):
    return energy(model(x).detach())


@pytest.mark.parametrize('score', [naive, rounding, cut_off])
def test_masked_gradients_are_reported(learn, flower, score):
    with pytest.warns(UserWarning, match='masked'):
        check = learn.masking_check(flower.take(slice(0, 100)), on_input(score), steps=5, n_queries=20)
    assert check.suspicious['images without gradient']
    if score is cut_off:
        assert check.value['images without gradient'] == 1


def test_one_seed_gives_no_interval_and_few_no_p(learn, flower):
    report = learn.ood_report({'flower': flower})

    def compared(n):
        others = [report.assign(AUROC=report.AUROC + 0.001 * i) for i in range(n)]
        return compare_reports([report] * n, others)

    assert compared(1).lo.isna().all() and compared(1).p.isna().all()
    assert compared(5).p.isna().all() and compared(5).lo.notna().all()
    assert 0 < compared(6).p[('flower', 'AUROC')] < 1


# Size

BIG = """
import resource, sys, torch, fastai.callback.all
from torch import nn
from fastai.learner import Learner
from aoe_nb.data import inliers
from aoe_nb.attack import FGSM
import aoe_nb.evaluation
learn = Learner(inliers('digits7').dls(64), nn.Sequential(nn.Flatten(), nn.Linear(64, 7)))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
def report(n):
    x = torch.randint(256, (n,1,8,8), dtype=torch.uint8)
    learn.ood_report({'a': x}, inliers=255-x, attack=FGSM(.01), n_boot=5)
    return peak()
small = report(1000)
print(report(100_000) - small)
"""


def test_a_hundred_thousand_of_each_in_bounded_memory():
    command = [sys.executable, '-W', 'ignore', '-c', BIG]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
    more = float(out.split()[-1])
    assert more < 150, f'{more} MB more for 2 x 100,000 images, of 13 MB, than for 2 x 1,000'
