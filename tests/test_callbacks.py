"`OutlierExposure` beside fastai's other callbacks, and callbacks of a user's own, in any order."

import copy, math, pickle, random
from contextlib import contextmanager
from functools import partial
import pandas as pd
import pytest
import torch
from torch import nn
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import ShowGraphCallback
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedLin, combine_scheds
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.vision.all import (
    Adam,
    Callback,
    CrossEntropyLossFlat,
    CSVLogger,
    DataLoaders,
    EarlyStoppingCallback,
    FetchPredsCallback,
    FocalLossFlat,
    Interpretation,
    LabelSmoothingCrossEntropy,
    LabelSmoothingCrossEntropyFlat,
    Learner,
    Normalize,
    OptimWrapper,
    RandomErasing,
    SaveModelCallback,
    SGD,
    TensorImage,
    Transform,
    accuracy,
    set_seed,
)
from fastcore.test import test_close as close, test_eq as eq, test_fail as fails
from aoe_nb.attack import FGSM, PGD, eval_mode
from aoe_nb.batchnorm import bn_ways
from aoe_nb.data import inliers, outliers
from aoe_nb.device import DeviceMixedPrecision
from aoe_nb.exposure import OutlierExposure
from aoe_nb.loaders import Pixels
from aoe_nb.models import small_cnn

TRAIN = inliers('digits7')
VALID = inliers('digits7', 'test').take(slice(0, 40))
CHINA = outliers('china')
WRAPPED = partial(OptimWrapper, opt=torch.optim.SGD)


def new_learner(bs=32, tfms=None, **kw):
    torch.manual_seed(0)
    dls = TRAIN.dls(bs, valid=VALID, normalize=([0.3], [0.37]), batch_tfms=tfms, seed=0)
    return Learner(dls, small_cnn(1, 7), **dict(metrics=accuracy, opt_func=SGD, train_bn=True) | kw)


@contextmanager
def silent(learn):
    with learn.no_bar(), learn.no_logging():
        yield


def fit(learn, *args, **kw):
    set_seed(0)
    with silent(learn):
        learn.fit(*args, **kw)
    return learn


def same(a, b):
    states = a.model.state_dict(), b.model.state_dict()
    return all(torch.equal(p, q) for p, q in zip(*(state.values() for state in states)))


def untouched(model):
    return all('forward' not in m.__dict__ for m in model.modules())


# A pass of their own


class Own(Callback):
    "Does `f(self)` at an event of training"

    def __init__(self, event, order, f):
        self.order = order
        setattr(self, event, lambda: f(self) if self.training else None)


def looks(cb):
    with eval_mode(cb.model), torch.no_grad():
        cb.model(cb.xb[0])


def looks_at_inliers(cb):
    with eval_mode(cb.model), torch.no_grad():
        cb.model(cb.xb[0][: len(cb.y)])


def takes_a_gradient(cb):
    with eval_mode(cb.model):
        x = cb.xb[0].detach().requires_grad_()
        torch.autograd.grad(cb.model(x).sum(), x)


def looks_at_validation(cb):
    with eval_mode(cb.model), torch.no_grad():
        cb.model(cb.dls.valid.one_batch()[0])


def trains_a_copy(cb):
    twin = copy.deepcopy(cb.model)
    twin(cb.xb[0].detach()).sum().backward()
    before = [m.running_mean for m in cb.model.modules() if isinstance(m, nn.BatchNorm2d)]
    after = [m.running_mean for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(torch.equal(a, b) for a, b in zip(before, after))


def pickles(cb):
    pickle.loads(pickle.dumps(cb.model))


PASSES = [looks, looks_at_inliers, takes_a_gradient, looks_at_validation, trains_a_copy, pickles]
EVENTS = [('before_batch', 0), ('before_batch', 10), ('before_batch', 1000), ('after_pred', 0), ('after_pred', 10),
          ('after_loss', 5), ('after_batch', 5)]  # fmt: skip


@pytest.fixture(scope='module')
def undisturbed():
    return {bn: fit(new_learner().expose(CHINA, attack=FGSM(8 / 255), bn=bn), 2, 0.05) for bn in bn_ways}


@pytest.mark.parametrize('bn', bn_ways)
@pytest.mark.parametrize('does', PASSES)
def test_a_pass_of_another_callback_changes_nothing(does, bn, undisturbed):
    cbs = [Own(event, order, does) for event, order in EVENTS]
    learn = new_learner(cbs=cbs).expose(CHINA, attack=FGSM(8 / 255), bn=bn)
    assert same(fit(learn, 2, 0.05), undisturbed[bn])
    assert untouched(learn.model)


@pytest.mark.parametrize('bn', bn_ways)
def test_predictions_amid_training_change_nothing(bn, undisturbed):
    learn = new_learner(cbs=FetchPredsCallback()).expose(CHINA, attack=FGSM(8 / 255), bn=bn)
    assert same(fit(learn, 2, 0.05), undisturbed[bn])
    eq(learn.recorder.metric_names, undisturbed[bn].recorder.metric_names)
    eq(learn.recorder.values, undisturbed[bn].recorder.values)


def test_a_batch_that_another_callback_cancels():
    def cancels(cb):
        from fastai.callback.core import CancelBatchException

        if cb.iter == 1:
            raise CancelBatchException

    for order in 1, 10, 1000:
        learn = new_learner(cbs=Own('before_batch', order, cancels)).expose(CHINA, bn='aux')
        fit(learn, 2, 0.05)
        assert untouched(learn.model)


def test_the_callbacks_go_with_the_exposure():
    learn = fit(new_learner().expose(CHINA), 1)
    fit(learn.expose(CHINA), 1)
    n = len(learn.cbs)
    fit(learn.expose(CHINA), 1)
    eq(len(learn.cbs), n)
    eq(len(learn.unexpose().cbs), len(new_learner().cbs))
    once = new_learner()
    fit(once, 1, cbs=OutlierExposure(CHINA))
    fit(once, 1)  # the exposure is gone again
    eq(once.recorder.metric_names, new_learner_columns())


def new_learner_columns():
    return fit(new_learner(), 1).recorder.metric_names


# Any order of adding


def crowd(folder):
    return [
        MixUp(0.4),
        DeviceMixedPrecision(amp_mode='bf16'),
        GradientClip(1.0),
        GradientAccumulation(64),
        CSVLogger(folder / 'log.csv'),
        EarlyStoppingCallback(monitor='energy_gap', patience=9),
        SaveModelCallback(monitor='energy_gap', fname=str(folder / 'best')),
        ParamScheduler(dict(lam=SchedLin(0.2, 0.6), eps=SchedCos(0.0, 0.06))),
        ParamScheduler(dict(lr=SchedLin(0.05, 0.01))),
        Own('before_batch', 10, looks),
        OutlierExposure(CHINA, attack=PGD(8 / 255, 2), frac=0.5, bn='aux'),
    ]


def test_any_order_of_adding_gives_the_same(tmp_path):
    rng = random.Random(0)
    first = None
    for _ in range(6):
        cbs = crowd(tmp_path)
        rng.shuffle(cbs)
        learn = new_learner(path=tmp_path)
        for cb in cbs:
            learn.add_cb(cb)
        fit(learn, 2)
        first = first or learn
        assert same(learn, first), [type(cb).__name__ for cb in cbs]
        eq(learn.recorder.values, first.recorder.values)
        eq(learn.recorder.hps['lr' if 'lr' in learn.recorder.hps else 'lam'][0] > 0, True)


# Losses and mixed batches

WEIGHTS = torch.linspace(0.5, 1.5, 7)
LOSSES = dict(
    smooth=LabelSmoothingCrossEntropyFlat(eps=0.1),
    smooth_torch=nn.CrossEntropyLoss(label_smoothing=0.1),
    smooth_fastai=LabelSmoothingCrossEntropy(),
    focal=FocalLossFlat(gamma=2.0),
    weighted=CrossEntropyLossFlat(weight=WEIGHTS),
)


class Parts(Callback):
    "The loss that is backpropagated, and its parts"

    order, run_valid = 6, False

    def before_fit(self):
        self.pairs = []

    def after_loss(self):
        cb = self.learn.outlier_exposure
        whole = self.loss_func(self.pred, *self.yb) + cb.lam * cb.seen['out_loss'][-1]
        self.pairs.append((self.learn.loss_grad.item(), whole.item()))


@pytest.mark.parametrize('mix', [None, MixUp, CutMix])
@pytest.mark.parametrize('loss', LOSSES)
def test_losses(loss, mix):
    if mix and not getattr(LOSSES[loss], 'y_int', False):
        return  # fastai mixes labels only where a loss says that they are numbers of classes
    cbs = [Parts()] + ([mix()] if mix else [])
    learn = new_learner(loss_func=LOSSES[loss], cbs=cbs)
    learn.expose(CHINA, attack=FGSM(8 / 255), attack_in=FGSM(2 / 255))
    fit(learn, 2, 0.05)
    for whole, parts in learn.parts.pairs:
        close(whole, parts, 1e-5)
    plain = fit(new_learner(loss_func=LOSSES[loss], cbs=[mix()] if mix else []), 1, 0.05)
    zero = new_learner(loss_func=LOSSES[loss], cbs=[mix()] if mix else []).expose(CHINA, lam=0)
    assert same(fit(zero, 1, 0.05), plain)


# Schedules of lam and eps


class Steps(Callback):
    "What the exposure had at each step, by its own account and by the loss and the pixels"

    order, run_valid = 6, False

    def before_fit(self):
        self.lam, self.eps, self.pct, self.share = [], [], [], []

    def after_loss(self):
        cb = self.learn.outlier_exposure
        self.pct.append(self.pct_train)
        self.lam.append(cb.lam)
        self.eps.append(cb.eps)
        term = self.learn.loss_grad - self.learn.loss_func(self.learn.pred, *self.learn.yb)
        self.share.append((term / cb.seen['out_loss'][-1]).item())


def swings(pct):
    return 0.03 * (1 - math.cos(4 * math.pi * pct))


WAYS = dict(
    up=SchedLin(0.0, 0.06),
    down=SchedLin(0.06, 0.0),
    swings=swings,
    warm=combine_scheds([0.3, 0.7], [SchedLin(0.0, 0.06), SchedCos(0.06, 0.01)]),
)
OPTIMIZERS = dict(sgd=SGD, adam=Adam, wrapped=WRAPPED, adamw=partial(OptimWrapper, opt=torch.optim.AdamW))


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_schedules(opt, way):
    learn = new_learner(opt_func=OPTIMIZERS[opt], cbs=Steps()).expose(CHINA, attack=FGSM(0.1), bn='frozen')
    f = WAYS[way]
    hyper = copy.deepcopy(learn.create_opt() or learn.opt.hypers[0])
    fit(learn, 3, 0.01, cbs=ParamScheduler(dict(eps=f, lam=lambda pct: 10 * f(pct))))
    seen = learn.steps
    close(seen.eps, [f(p) for p in seen.pct], 1e-9)
    close(seen.lam, [10 * f(p) for p in seen.pct], 1e-9)
    close(seen.share, seen.lam, 1e-4)
    eq(learn.recorder.hps['eps'], seen.eps)
    eq(learn.recorder.hps['lam'], seen.lam)
    after = learn.opt.hypers[0]
    eq(after.keys() - {'eps'}, hyper.keys() - {'eps'})
    eq(after.get('eps'), hyper.get('eps'))  # Adam's own
    names = learn.recorder.metric_names
    eq(names[-3:-1], ['eps', 'lam'])
    close(learn.recorder.values[-1][-1], sum(seen.lam[-3:]) / 3, 1e-5)
    eq((learn.outlier_exposure.lam, learn.outlier_exposure.eps), (0.5, 0.1))  # as they were given
    fit(learn, 1, 0.01)
    eq(set(learn.steps.lam), {0.5})
    eq(set(learn.steps.eps), {0.1})


def test_a_schedule_that_says_nothing_is_no_schedule():
    def same_again(lam, eps):
        return ParamScheduler(dict(lam=SchedLin(lam, lam), eps=SchedLin(eps, eps)))

    given = fit(new_learner().expose(CHINA, attack=FGSM(0.05), lam=0.3), 2, 0.05)
    scheduled = new_learner().expose(CHINA, attack=FGSM(0.02), lam=0.9)
    assert same(fit(scheduled, 2, 0.05, cbs=same_again(0.3, 0.05)), given)
    oe = fit(new_learner().expose(CHINA), 2, 0.05)
    none = new_learner().expose(CHINA, attack=FGSM(0.02))
    assert same(fit(none, 2, 0.05, cbs=same_again(0.5, 0.0)), oe)


def test_a_copy_amid_a_schedule_has_what_was_given():
    copies = []

    class Keep(Callback):
        def after_epoch(self):
            copies.append(copy.deepcopy(self.learn))

    learn = new_learner().expose(CHINA, attack=FGSM(0.02))
    fit(learn, 1, cbs=[Keep(), ParamScheduler(dict(lam=SchedLin(0.1, 1), eps=SchedLin(0.05, 0.1)))])
    for o in [learn, *copies]:
        eq((o.outlier_exposure.lam, o.outlier_exposure.eps), (0.5, 0.02))


def test_a_schedule_of_lam_draws_the_same_outliers():
    a, b = (new_learner().expose(CHINA, lam=lam) for lam in (0.0, 0.5))
    fit(a, 1, cbs=ParamScheduler(dict(lam=SchedLin(0.0, 0.0))))
    fit(b, 1)
    eq(a.outlier_exposure.stream.pos, b.outlier_exposure.stream.pos)
    c = new_learner().expose(CHINA, lam=0.0)
    eq(fit(c, 1).outlier_exposure.stream.pos, 0)


def test_one_scheduler_serves_many_fits_and_outlives_an_interruption():
    scheduler = ParamScheduler(dict(lam=SchedLin(0.0, 1.0), lr=SchedLin(0.1, 0.01)))

    def stops(cb):
        if cb.iter == 1:
            raise KeyboardInterrupt

    learn = new_learner(cbs=[scheduler, Steps()]).expose(CHINA)
    stop = Own('after_loss', 9, stops)
    with pytest.raises(KeyboardInterrupt):
        fit(learn, 1, cbs=stop)
    learn.remove_cb(stop)
    for _ in range(2):
        fit(learn, 2)
        close(learn.steps.lam, learn.steps.pct, 1e-9)
        eq(set(learn.recorder.hps), {'lam', 'lr'})
    learn.remove_cb(scheduler)
    fit(learn, 1)
    eq(set(learn.steps.lam), {0.5})
    other = new_learner(cbs=Steps()).expose(CHINA)
    fit(other, 1, cbs=scheduler)
    close(other.steps.lam, other.steps.pct, 1e-9)


@pytest.mark.parametrize('how', ['fit_one_cycle', 'fit_flat_cos', 'fine_tune', 'fit_sgdr'])
def test_schedules_beside_fastais_own(how):
    learn = new_learner(cbs=[Steps(), ParamScheduler(dict(lam=SchedLin(0.0, 1.0)))]).expose(CHINA, attack=FGSM(0.05))
    set_seed(0)
    with silent(learn):
        getattr(learn, how)(*(2, 1, 0.01)[: 2 if how == 'fit_sgdr' else 1])
    close(learn.steps.lam, learn.steps.pct, 1e-9)


def test_schedules_that_cannot_be():
    for attack in None, lambda x, loss, generator=None: x:
        learn = new_learner().expose(CHINA, attack=attack)
        fails(lambda: fit(learn, 1, cbs=ParamScheduler(dict(eps=SchedLin(0, 0.1)))), contains='no attack whose eps')
    adam = new_learner(opt_func=Adam).expose(CHINA)
    fit(adam, 1, cbs=ParamScheduler(dict(eps=SchedLin(1e-8, 1e-5))))  # Adam's own
    assert adam.opt.hypers[0]['eps'] > 1e-8
    learn = new_learner().expose(CHINA, attack=FGSM(0.1))
    fails(lambda: fit(learn, 1, cbs=ParamScheduler(dict(lam=lambda pct: -1))), contains='lam must be')
    fails(lambda: fit(learn, 1, cbs=ParamScheduler(dict(eps=lambda pct: 8))), contains='divide by 255')
    eq((learn.outlier_exposure.lam, untouched(learn.model)), (0.5, True))


# The rest of fastai


def test_rates_of_groups_and_frozen_layers():
    def split(model):
        return [list(model[:6].parameters()), list(model[6:].parameters())]

    learn = new_learner(splitter=split, train_bn=False).expose(CHINA, attack=FGSM(8 / 255))
    body = copy.deepcopy(learn.model[:6].state_dict())
    learn.freeze()
    fit(learn, 1, 0.05)
    for k, v in body.items():
        if 'weight' in k or 'bias' in k:
            eq(learn.model[:6].state_dict()[k], v)
    learn.unfreeze()
    fit(learn, 1, slice(1e-4, 1e-2))
    eq([h['lr'] for h in learn.opt.hypers], [1e-4, 1e-2])
    assert not torch.equal(learn.model[0].weight, body['0.weight'])
    with silent(learn):
        learn.fine_tune(1)
    assert learn.recorder.losses[-1].isfinite()


def test_lr_find_changes_nothing():
    a, b = (new_learner(cbs=ParamScheduler(dict(lam=SchedLin(0, 1)))) for _ in range(2))
    for learn in a, b:
        learn.expose(CHINA, attack=PGD(8 / 255, 2), bn='aux')
    set_seed(0)
    with silent(a):
        a.lr_find(num_it=8, show_plot=False)
    eq(a.outlier_exposure.lam, 0.5)
    assert same(a, b)
    a.dls.train.rng, b.dls.train.rng = random.Random(0), random.Random(0)  # fastai's loader goes on where it was
    assert same(fit(a, 1, 0.05), fit(b, 1, 0.05))


def test_predictions_are_those_of_the_model():
    learn = fit(new_learner().expose(CHINA, attack=FGSM(8 / 255)), 1)
    with silent(learn):
        preds, y = learn.get_preds()
        augmented, _ = learn.tta(n=2)
        losses = Interpretation.from_learner(learn).top_losses(3)[0]
    learn.unexpose()
    with silent(learn):
        eq(learn.get_preds()[0], preds)
        close(learn.tta(n=2)[0], augmented, 1e-6)
        eq(Interpretation.from_learner(learn).top_losses(3)[0], losses)


def test_loggers(tmp_path):
    learn = new_learner(path=tmp_path, cbs=[CSVLogger(), ShowGraphCallback()])
    learn.expose(CHINA, attack=FGSM(8 / 255), frac=0.5)
    scheduler = ParamScheduler(dict(eps=SchedLin(0.0, 0.06)))
    set_seed(0)
    learn.fit(2, 0.05, cbs=scheduler)
    log = pd.read_csv(tmp_path / 'history.csv')
    eq(list(log), list(learn.recorder.metric_names))
    close(log.eps, [v[6] for v in learn.recorder.values], 1e-5)
    assert log.eps[1] > 2 * log.eps[0] > 0
    close(log.energy_gap, [v[4] for v in learn.recorder.values], 1e-5)
    assert 0.2 < log.moved[0] < 0.45 < log.moved[1] < 0.55  # the first step was of size 0


def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learn = new_learner(path=tmp_path).expose(CHINA, attack=FGSM(8 / 255))
    board = TensorBoardCallback(tmp_path / 'board', trace_model=False, log_preds=False)
    fit(learn, 2, 0.05, cbs=[board, ParamScheduler(dict(eps=SchedLin(0.0, 0.06)))])
    events = EventAccumulator(str(tmp_path / 'board'))
    events.Reload()
    for name in 'out_loss', 'energy_gap', 'moved', 'eps':
        want = [v[learn.recorder.metric_names.index(name) - 1] for v in learn.recorder.values]
        close([o.value for o in events.Scalars(name)], want, 1e-5)


def test_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    from fastai.callback.wandb import WandbCallback

    logged = []
    run = wandb.init(mode='offline', dir=str(tmp_path))
    monkeypatch.setattr(wandb, 'log', lambda d, **kw: logged.append(d))
    learn = new_learner(path=tmp_path).expose(CHINA, attack=FGSM(8 / 255))
    fit(learn, 2, 0.05, cbs=WandbCallback(log_preds=False, log_model=False))
    run.finish()
    assert {'out_loss', 'energy_gap', 'moved'} <= set().union(*logged)


# Transforms: the loader's own split


class Marks(Transform):
    "A transform of training that leaves its mark"

    split_idx, order = 0, 20

    def encodes(self, x: TensorImage):
        return x * 0 + 0.5


class Marked(Callback):
    "Which of both populations has the mark"

    order, run_valid = 7, False

    def before_batch(self):
        n = len(self.y)
        pixels = Pixels(self.dls.train).decode(self.xb[0])
        self.learn.marked = [bool((part == pixels[0, 0, 0, 0]).all()) for part in (pixels[:n], pixels[n:])]


@pytest.mark.parametrize('split', [0, 1, None])
def test_outliers_get_the_transforms_that_the_inliers_get(split):
    dls = new_learner(tfms=[Marks()]).dls
    if split is None:
        del dls.train.dataset.split_idx
    else:
        dls.train.dataset.split_idx = split
    learn = Learner(dls, small_cnn(1, 7), cbs=Marked()).expose(CHINA)
    fit(learn, 1)
    eq(learn.marked, [split == 0] * 2)


def test_a_list_has_no_training_transforms():
    from fastai.data.core import TfmdDL

    ds = [(TensorImage(x / 255), int(y)) for x, y in zip(TRAIN.x[:32], TRAIN.y)]
    dls = DataLoaders(*[TfmdDL(ds, bs=16, num_workers=0, after_batch=[Marks()]) for _ in range(2)])
    learn = Learner(dls, small_cnn(1, 7), loss_func=CrossEntropyLossFlat(), cbs=Marked()).expose(CHINA)
    fit(learn, 1)
    eq(learn.marked, [False, False])


def test_inliers_are_attacked_beside_random_erasing():
    before, after = [], []

    def keeps(seen):
        return lambda cb: seen.append(Pixels(cb.dls.train).unscaled(cb.xb[0][: len(cb.y)]))

    tfms = [RandomErasing(p=1.0, sl=0.1, sh=0.2, min_aspect=0.9)]
    cbs = [Own('before_batch', 0, keeps(before)), Own('before_batch', 7, keeps(after))]
    learn = new_learner(tfms=tfms, cbs=cbs).expose(CHINA, attack=FGSM(0.05), attack_in=PGD(16 / 255, 3))
    fit(learn, 2)
    for x, moved in zip(before, after):
        noise = (x < -1e-3) | (x > 1 + 1e-3)
        assert noise.any()
        close(moved[noise], x[noise], 1e-5)
        assert (moved - x)[~noise].abs().max() <= 16 / 255 + 2e-3  # cut off at the borders
        assert (moved - x)[~noise].abs().mean() > 1 / 255


def test_what_follows_normalize_is_named():
    class Brighter(Transform):
        order = 101

        def encodes(self, x: TensorImage):
            return x + 3

    for kw in dict(attack_in=PGD(4 / 255, 2)), dict(attack=FGSM(0.1), attack_in=PGD(4 / 255, 2)):
        learn = new_learner(tfms=[Brighter()]).expose(CHINA, **kw)
        fails(lambda: fit(learn, 1), contains='Brighter may have done it after Normalize')
    assert Normalize.order < Brighter.order
