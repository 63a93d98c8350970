"Holding the logits of inliers: the right term, a copy that nothing moves, and files without it."

import copy, pickle
import pytest
import torch
from fastai.callback.fp16 import AMPMode
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner
from fastai.vision.all import Callback, SaveModelCallback
from fastcore.test import test_fail as fails  # pytest collects what is called test_
from hypothesis import given, settings, strategies as st
from test_callbacks import CHINA, fit, new_learner, same
from aoe_nb.attack import FGSM
from aoe_nb.device import DeviceMixedPrecision
from aoe_nb.hold import HoldLogits, held


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 6), st.floats(0.2, 5))
def test_the_divergence_by_hand(seed, n, classes, temperature):
    gen = torch.Generator().manual_seed(seed)
    start, now = torch.randn(2, n, classes, generator=gen, dtype=torch.float64)
    total = 0
    for a, b in zip(start / temperature, now / temperature):
        p, q = a.exp() / a.exp().sum(), b.exp() / b.exp().sum()
        total += sum(float(p[k] * (p[k] / q[k]).log()) for k in range(classes))
    assert float(held(start, now, temperature)) == pytest.approx(temperature**2 * total / n, abs=1e-9)
    assert held(start, now, temperature) >= -1e-12
    assert float(held(start, start + 3.7, temperature)) == pytest.approx(0, abs=1e-9)


class Terms(Callback):
    "What was added in each step, and what it should have been"

    order = 5.7
    run_valid = False

    def before_fit(self):
        self.seen = []

    def after_pred(self):
        self.learn.wanted = None

    def after_loss(self):
        cb = self.learn.hold_logits
        x = self.xb[0].as_subclass(torch.Tensor)
        assert len(x) == len(self.yb[0]) == len(self.pred)
        with torch.no_grad():
            want = held(self.start(x).float(), self.pred.float().as_subclass(torch.Tensor), cb.temperature)
        self.seen.append((float(want), float(self.loss_grad - self.learn.before_hold)))


class Before(Callback):
    order = 5.2
    run_valid = False

    def after_loss(self):
        self.learn.before_hold = self.loss_grad.detach().clone()


@pytest.mark.parametrize('expose', [True, False])
def test_the_term_is_added_to_the_loss(expose):
    learn = new_learner(cbs=[HoldLogits(2.5, temperature=2.0), Before(), Terms()])
    learn.terms.start = copy.deepcopy(learn.model).eval()
    if expose:
        learn.expose(CHINA, attack=FGSM(8 / 255), bn='frozen')
    fit(learn, 2, 0.05)
    seen = learn.terms.seen
    assert len(seen) > 4 and all(abs(2.5 * want - added) < 1e-4 for want, added in seen)
    if expose:  # BatchNorm is that of the copy, so the first step has not moved yet
        assert seen[0][1] == pytest.approx(0, abs=1e-6) and seen[-1][1] > 1e-5


def test_a_large_weight_holds():
    ends = []
    for weight in 0.0, 30.0:
        learn = new_learner(cbs=HoldLogits(weight))
        start = copy.deepcopy(learn.model).eval()
        fit(learn.expose(CHINA, attack=FGSM(8 / 255), bn='frozen'), 4, 0.05)
        x = learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
        with torch.no_grad():
            ends.append(float(held(start(x), learn.model.eval()(x))))
    assert ends[1] < ends[0] / 3


def test_no_weight_changes_nothing():
    one, other = new_learner(cbs=HoldLogits(0.0)), new_learner()
    for learn in one, other:
        fit(learn.expose(CHINA, attack=FGSM(8 / 255)), 2, 0.05)
    assert same(one, other)


def test_the_copy_stays_what_it_was():
    learn = new_learner(cbs=HoldLogits())
    before = copy.deepcopy(learn.model.state_dict())
    fit(learn.expose(CHINA), 2, 0.05)
    copied = learn.hold_logits.start
    assert not copied.training and not any(p.requires_grad for p in copied.parameters())
    assert all(torch.equal(before[k], v) for k, v in copied.state_dict().items())
    assert any(not torch.equal(before[k], v) for k, v in learn.model.state_dict().items())
    fit(learn, 1, 0.05)  # a second fit holds to the same
    assert learn.hold_logits.start is copied


def test_gradients_are_accumulated():
    "Two half batches give the term once, not twice"
    learn = new_learner(bs=16, cbs=[HoldLogits(2.0), GradientAccumulation(32)])
    fit(learn.expose(CHINA, bn='frozen'), 1, 0.05)
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_bf16():
    learn = new_learner(cbs=[HoldLogits(), DeviceMixedPrecision(amp_mode=AMPMode.BF16)])
    fit(learn.expose(CHINA, attack=FGSM(8 / 255)), 2, 0.05)
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_files_do_without_the_copy(tmp_path):
    sizes = []
    for cbs in [], [HoldLogits(3.0)]:
        learn = new_learner(cbs=cbs)
        learn.path = tmp_path
        fit(learn.expose(CHINA), 1, 0.05)
        learn.export('held.pkl')
        sizes.append((tmp_path / 'held.pkl').stat().st_size)
    assert sizes[1] - sizes[0] < 3000
    again = load_learner(tmp_path / 'held.pkl')
    assert again.hold_logits.start is None and again.hold_logits.weight == 3
    assert len(again.predict(CHINA.x[0])) == 3
    assert pickle.loads(pickle.dumps(learn.hold_logits)).start is None
    assert learn.hold_logits.start is not None


def test_a_run_goes_on_with_the_start_it_is_given(tmp_path):
    def new(**kw):
        save = SaveModelCallback(every_epoch=True, with_opt=True, fname='m')
        learn = new_learner(cbs=[save, HoldLogits(5.0, **kw)])
        learn.path = tmp_path
        return learn.expose(CHINA, attack=FGSM(8 / 255), bn='frozen')

    whole = fit(new(), 3, 0.05)
    half = new()
    start = copy.deepcopy(half.model)
    half.load('m_0', with_opt=True)
    fails(lambda: fit(half, 3, 0.05, start_epoch=1), contains='HoldLogits(start=...)')
    half = new(start=start)
    half.load('m_0', with_opt=True)
    fit(half, 3, 0.05, start_epoch=1)
    assert same(whole, half)


def test_meaningless_settings_are_refused():
    fails(lambda: HoldLogits(-1), contains='weight must be a number from 0')
    fails(lambda: HoldLogits(float('nan')), contains='weight must be a number from 0')
    fails(lambda: HoldLogits(temperature=0), contains='temperature must be above 0')
    learn = new_learner(cbs=HoldLogits(start=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))))
    fails(lambda: fit(learn, 1, 0.05), contains='one shape (N, C)')
