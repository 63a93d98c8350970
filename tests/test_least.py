"The least step that does: where it is known exactly, by brute force, and in training."

import numpy as np
import pytest
import torch
from fastai.vision.all import Callback
from fastcore.test import test_fail as fails  # pytest collects what is called test_
from hypothesis import given, settings, strategies as st
from test_callbacks import CHINA, fit, new_learner
from test_exposure import Third, looks
from aoe_nb.attack import FGSM, eval_mode
from aoe_nb.device import DeviceMixedPrecision
from aoe_nb.energy import energy
from aoe_nb.least import LeastFGSM, least_fgsm
import aoe_nb.evaluation  # noqa: F401, adds `learn.ood_scores`

numbers = st.floats(-1, 1, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.02, 0.4), st.integers(1, 6))
def test_a_linear_loss_has_a_known_step(seed, eps, tries):
    "The loss falls by eps times the sum of absolute weights, evenly: round its distance up to the next part"
    gen = torch.Generator().manual_seed(seed)
    x = 0.5 + 0.05 * torch.rand(7, 1, 3, 3, generator=gen, dtype=torch.float64)
    w = torch.randn(7, 1, 3, 3, generator=gen, dtype=torch.float64)

    def loss(x):
        return (w * x).flatten(1).sum(1)

    falls = eps * w.abs().flatten(1).sum(1)
    distance = torch.tensor([-0.5, 0.001, 0.3, 0.501, 0.7, 0.99, 1.5], dtype=torch.float64)
    target = loss(x) - distance * falls
    parts = 2**tries
    share = torch.minimum((distance * parts).ceil().clamp(min=0) / parts, torch.tensor(1.0))
    want = x - share[:, None, None, None] * eps * w.sign()
    assert torch.allclose(least_fgsm(x, loss, eps, target, tries), want, atol=1e-9)


@pytest.mark.parametrize('tries', [1, 3, 5])
def test_what_it_promises_of_any_loss(tries):
    "Low enough at the step, not a part below it; else the full step; nothing moves that need not"
    torch.manual_seed(tries)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    x = torch.rand(64, 1, 4, 4)

    def loss(x):
        return torch.sin(12 * net(x)[:, 0])  # up and down along the step

    eps, target, parts = 0.3, -0.4, 2**tries
    moved = least_fgsm(x, loss, eps, target, tries)
    y = x.clone().requires_grad_()
    sign = torch.autograd.grad(loss(y).sum(), y)[0].sign()
    with torch.no_grad():
        at = torch.stack([loss((x - k / parts * eps * sign).clamp(0, 1)) for k in range(parts + 1)])
        shares = torch.stack([(x - k / parts * eps * sign).clamp(0, 1) for k in range(parts + 1)])
    took = [int(torch.isclose(moved[i], shares[:, i], atol=1e-6).flatten(1).all(1).nonzero()[0]) for i in range(64)]
    for i, k in enumerate(took):
        if k == 0:
            assert at[0, i] <= target
        elif k < parts:
            assert at[k, i] <= target and at[k - 1, i] > target
        else:
            assert at[0, i] > target and at[parts - 1, i] > target
    assert len(set(took)) > 1 and torch.equal(moved[at[0] <= target], x[at[0] <= target])


def test_steps_of_any_length_and_in_l2():
    x = torch.full((2, 1, 4, 4), 0.5)

    def loss(x):
        return x.flatten(1).sum(1) - 8

    moved = least_fgsm(x, loss, torch.tensor([0.1, 0.2]), -0.85)
    assert np.allclose((x - moved).flatten(1).amax(1), [9 / 16 * 0.1, 5 / 16 * 0.2], atol=1e-6)
    moved = least_fgsm(x, loss, 1.0, -1.9, norm='l2')  # falls by 4 a unit of length
    assert np.allclose((x - moved).flatten(1).norm(dim=1), 0.5, atol=1e-6)
    assert len(least_fgsm(x[:0], loss, 0.1, 0.0)) == 0


def test_meaningless_settings_are_refused():
    x = torch.rand(2, 1, 4, 4)

    def loss(x):
        return x.flatten(1).sum(1)

    fails(lambda: least_fgsm(x, loss, 0.1, 0.0, tries=1.5), contains='whole number from 1 to 20')
    fails(lambda: least_fgsm(x, lambda x: loss(x).sum(), 0.1, 0.0), contains='do not average over the batch')
    fails(lambda: least_fgsm(x, lambda x: loss(x) * float('nan'), 0.1, 0.0), contains='NaN')
    fails(lambda: least_fgsm(x, loss, 8, 0.0), contains='divide by 255')
    fails(lambda: LeastFGSM(0.1, quantile=95), contains='must lie in [0, 1]')
    fails(lambda: LeastFGSM(0.1)(x, loss), contains='give it a target, or use it in training first')


def test_a_step_asks_for_no_value_where_that_takes_long(monkeypatch):
    learn = new_learner(bs=16)
    learn.expose(CHINA, attack=LeastFGSM(16 / 255), bn='inliers')
    learn.add_cb(Third(looks(monkeypatch)))
    learn.outlier_exposure.looks_at_once = ()
    fit(learn, 1, 1e-3)
    assert learn.looked == []


class Look(Callback):
    "The energies of inliers and outliers in each step, as the attack has seen them"

    order = 1000
    run_valid = False

    def before_fit(self):
        self.seen = []

    def before_batch(self):
        cb = self.learn.outlier_exposure
        with torch.no_grad(), eval_mode(self.model):
            scores = energy(self.model(self.xb[0].as_subclass(torch.Tensor)))
        self.seen.append((scores[: cb.n], scores[cb.n :], cb.attack.band.clone()))


@pytest.mark.parametrize('quantile', [0.5, 0.95])
@pytest.mark.parametrize('bn', ['frozen', 'inliers', 'aux'])
def test_training_aims_at_its_inliers(bn, quantile):
    learn = new_learner(cbs=Look())
    fit(learn.expose(CHINA, attack=LeastFGSM(0.5, quantile=quantile), bn=bn), 3, 0.05)
    for known, moved, band in learn.look.seen:
        assert torch.isclose(band, known.sort().values[round(quantile * (len(known) - 1))], atol=1e-5)
    assert len(learn.look.seen) > 3
    x = CHINA.x[:40] / 255
    after = learn.attacked_images(x, learn.outlier_exposure.attack)  # a report goes on with the last aim
    assert after.shape == x.shape and (after - x).abs().max() <= 0.5 + 1e-6


def test_most_outliers_reach_the_aim():
    learn = new_learner(cbs=Look())
    fit(learn.expose(CHINA, attack=LeastFGSM(0.5, tries=8), bn='frozen'), 4, 0.05)
    _, moved, band = learn.look.seen[-1]
    assert (moved <= band + 1e-4).float().mean() > 0.5


def test_a_target_of_ones_own():
    "No pass over the inliers then, and with an unreachable target it is FGSM, bit for bit"
    same = []
    for attack in LeastFGSM(16 / 255, target=-1e9), FGSM(16 / 255):
        learn = fit(new_learner().expose(CHINA, attack=attack), 2, 0.05)
        same.append(torch.cat([o.flatten() for o in learn.model.parameters()]))
        assert getattr(learn.outlier_exposure.attack, 'band', None) is None
    assert torch.equal(*same)


def test_exposed_uses_nothing_up_and_bf16_works():
    learn = new_learner(cbs=DeviceMixedPrecision(amp_mode='bf16'))
    learn.expose(CHINA, attack=LeastFGSM(16 / 255), frac=0.5)
    before, after = learn.exposed(8)
    again = learn.exposed(8)
    assert torch.equal(before, again[0]) and torch.equal(after, again[1])
    assert torch.equal(before[4:], after[4:])
    fit(learn, 2, 0.05)
    assert all(p.isfinite().all() for p in learn.model.parameters())
