"What `OutlierExposure` promises, beyond what its page shows."

import copy, sys, warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation
from fastai.vision.all import (
    Callback,
    CrossEntropyLossFlat,
    CSVLogger,
    DataLoaders,
    Flip,
    Learner,
    OptimWrapper,
    RandomErasing,
    SaveModelCallback,
    accuracy,
    create_head,
    load_learner,
    set_seed,
)
from fastcore.test import test_close as close, test_eq as eq, test_fail as fails  # pytest collects what is called test_
from aoe_nb.attack import APGD, FGSM, MIFGSM, PGD
from aoe_nb.batchnorm import bn_ways
from aoe_nb.data import Images, inliers, outliers
from aoe_nb.energy import energy
from aoe_nb.free import FreeFGSM
from aoe_nb.device import DeviceMixedPrecision
from aoe_nb.exposure import OutlierExposure
from aoe_nb.models import small_cnn

train = inliers('digits7')
valid = inliers('digits7', 'test')
china = outliers('china')
one = Images(train.x[:64], train.y[:64], train.classes)
sgd = partial(OptimWrapper, opt=torch.optim.SGD)


def new_net():
    torch.manual_seed(0)
    return small_cnn(1, 7)


def new_learner(net=None, tfms=None, bs=64, valid=valid, **kw):
    dls = train.dls(bs, valid=valid, normalize=([0.3], [0.37]), batch_tfms=tfms)
    return Learner(dls, net or new_net(), metrics=accuracy, opt_func=sgd, train_bn=True, wd=0.0, **kw)


@contextmanager
def silent(learn):
    with learn.no_bar(), learn.no_logging():
        yield


def fit(learn, *args):
    with silent(learn):
        learn.fit(*args)
    return learn


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def nothing_attached(model):
    return all('forward' not in m.__dict__ for m in model.modules())


class Order(Callback):
    "Keep the labels of all training batches"

    def before_fit(self):
        self.labels = []

    def after_pred(self):
        if self.training:
            self.labels += self.y.tolist()


def trained(expose=None, epochs=2, **kw):
    learn = new_learner(cbs=Order(), tfms=Flip(), **kw)
    set_seed(0)
    if expose:
        expose(learn)
    return fit(learn, epochs)


# modes, buffers and gradients


class Watch(Callback):
    "Modes, buffers and gradients at the start of each training batch, by `order` before or after the exposure"

    def __init__(self, order, seen):
        self.order = order
        self.seen = seen

    def before_batch(self):
        if not self.training:
            return
        modes = [m.training for m in self.model.modules()]
        buffers = [b.clone() for b in self.model.buffers()]
        self.seen.append((modes, buffers, [p.grad for p in self.model.parameters()]))


def test_the_attack_leaves_modes_buffers_and_gradients():
    net = new_net()
    net[4].requires_grad_(False)
    before, after = [], []
    learn = new_learner(net, cbs=[Watch(0, before), Watch(7, after)])
    fit(learn.expose(china, attack=PGD(16 / 255, 3), bn='aux'), 2)
    assert len(before) == len(after) == 2
    for (modes0, buffers0, _), (modes1, buffers1, grads) in zip(before, after):
        eq(modes0, modes1)
        eq(buffers0, buffers1)
        eq(set(map(type, grads)), {type(None)})


# who moves which statistics


def one_step(bn, lam=0.5):
    dl = train.take(slice(0, 64)).dl(64)
    learn = Learner(DataLoaders(dl, dl), new_net(), opt_func=sgd, wd=0.0, lr=0.1)
    cb = OutlierExposure(torch.full((64, 1, 8, 8), 1.0), lam, bn=bn)
    learn.add_cb(cb)
    fit(learn, 1)
    return learn.model, cb


def test_who_moves_which_statistics():
    plain, _ = one_step('inliers', lam=0.0)
    bns = {bn: one_step(bn) for bn in bn_ways}
    eq(list(bns), ['mixed', 'inliers', 'separate', 'aux', 'frozen'])
    means = {bn: model[1].running_mean for bn, (model, _) in bns.items()}
    for bn in 'inliers', 'separate', 'aux':
        eq(means[bn], plain[1].running_mean)  # inliers alone
    eq(means['frozen'], torch.zeros(16))  # nobody
    assert (means['mixed'] - means['inliers']).abs().max() > 0.01  # both
    model, cb = bns['aux']
    own = cb.aux[model[1]][0]
    assert (own - means['aux']).abs().max() > 0.01 and not bns['separate'][1].aux  # outliers have their own
    weights = {tuple(model[0].weight.flatten().tolist()) for model, _ in bns.values()}
    assert len(weights) == 4  # separate and aux differ under attack only
    assert all(nothing_attached(model) for model, _ in bns.values())


# lam=0, order, eps


def test_lam_0_is_plain_training_and_inliers_keep_their_order():
    never = trained()
    zero = trained(lambda l: l.expose(china, lam=0.0, attack=FGSM(0.1)))
    loader = torch.utils.data.DataLoader(china.x, 7, shuffle=True)
    aoe = trained(lambda l: l.expose(loader, attack=PGD(0.1, 2)))
    assert same(never.model, zero.model) and not same(never.model, aoe.model)
    eq(zero.outlier_exposure.stream.pos, 0)
    eq(aoe.order.labels, never.order.labels)


class Inside(nn.Module):
    "A network that normalises by itself"

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((x - 0.3) / 0.37)


def test_eps_is_in_pixels_wherever_these_are_normalised():
    a = new_learner().expose(china, attack=FGSM(16 / 255))
    b = Learner(train.dls(64, valid=valid), Inside(new_net())).expose(china, attack=FGSM(16 / 255))
    x, moved_a = a.exposed(20)
    _, moved_b = b.exposed(20)
    close(moved_a, moved_b)
    close((moved_a - x).abs().max(), 16 / 255, 1e-6)


# the rest of fastai


def flat():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 7))


def accumulated(bs, cbs):
    dls = DataLoaders(one.dl(bs), one.dl(bs))
    learn = Learner(dls, flat(), opt_func=sgd, wd=0.0, lr=0.1, cbs=cbs)
    return fit(learn.expose(china, attack=FGSM(0.05)), 1).model


def test_gradient_accumulation():
    whole = accumulated(64, [])
    parts = accumulated(16, GradientAccumulation(64))
    for p, q in zip(whole.parameters(), parts.parameters()):
        close(p, q, 1e-6)


def test_mixed_precision():
    dtypes = []

    def spy(module, args, out):
        dtypes.append(out.dtype)

    learn = new_learner(cbs=DeviceMixedPrecision(amp_mode='bf16')).expose(china, attack=FGSM(0.05))
    hook = learn.model[-1].register_forward_hook(spy)
    fit(learn, 1)
    hook.remove()
    eq(set(dtypes), {torch.bfloat16})
    eq(learn.model[0].weight.dtype, torch.float32)


@pytest.fixture(scope='module')
def after_mixup():
    "A learner that was exposed under MixUp, and where its stream was before and after `lr_find`"
    learn = new_learner(cbs=MixUp()).expose(china, attack=FGSM(0.05))

    def pos():
        return learn.outlier_exposure.state_dict()['stream']['pos']

    with silent(learn):
        before = pos()
        learn.lr_find(num_it=20, show_plot=False)
        after = pos()
        learn.fit(15, 0.1)
        learn.remove_cb(MixUp)
    return learn, before, after


def test_mixup_lr_find_and_show_results(after_mixup):
    learn, before, after = after_mixup
    eq(after, before)
    with silent(learn):
        eq(learn.get_preds()[0].shape, (len(valid), 7))
        learn.show_results(max_n=6, nrows=1, figsize=(6, 1.6))
    plt.close()


def test_export_leaves_the_outliers_out(after_mixup, tmp_path):
    learn, *_ = after_mixup
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # load_learner warns of pickles
        learn.path = tmp_path
        learn.export()
        again = load_learner(tmp_path / 'export.pkl')
    with silent(again), silent(learn):
        eq(again.predict(valid[0][0])[2], learn.predict(valid[0][0])[2])
    assert again.outlier_exposure.stream is None
    again.dls = learn.dls
    with silent(again):
        fails(lambda: again.fit(1), contains='give them again')
    fit(again.expose(china), 1)


def test_pytorch_loaders():
    ds = torch.utils.data.TensorDataset(train.x / 255, train.y)
    dls = DataLoaders(torch.utils.data.DataLoader(ds, 32), torch.utils.data.DataLoader(ds, 32))
    learn = Learner(dls, new_net(), loss_func=CrossEntropyLossFlat()).expose(china, attack=FGSM(0.05))
    fit(learn, 1)
    eq(learn.exposed(3)[0].shape, (3, 1, 8, 8))


def test_random_erasing_after_normalize():
    learn = new_learner(tfms=[RandomErasing(p=1.0, sl=0.1, sh=0.2, min_aspect=0.9)])
    fit(learn.expose(china, attack=FGSM(0.05)), 1)


def test_a_look_changes_nothing_and_a_copy_trains():
    a = trained(lambda l: l.expose(china, attack=FGSM(0.05)))
    b = trained(lambda l: (l.expose(china, attack=FGSM(0.05)), l.exposed(4)))
    assert same(a.model, b.model)
    fit(copy.deepcopy(a), 1)


# after an exception


class Stop(nn.Module):
    "Interrupts training on more than one population"

    def forward(self, x):
        if self.training and len(x) > 64:
            raise KeyboardInterrupt
        return x


def test_an_exception_leaves_nothing_attached():
    net = new_net()
    learn = new_learner(nn.Sequential(*net[:3], Stop(), *net[3:]))
    state = learn.model.state_dict()
    want = {k: v.clone() for k, v in state.items() if 'running' not in k and 'num_' not in k}
    with pytest.raises(KeyboardInterrupt):
        fit(learn.expose(china), 1)
    assert nothing_attached(learn.model)
    learn.unexpose()
    assert not hasattr(learn, 'outlier_exposure')
    for k, v in want.items():
        eq(learn.model.state_dict()[k], v)
    fit(learn, 1)


# what is refused


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = new_net()

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.net, x.requires_grad_(), use_reentrant=True)


@pytest.mark.parametrize('bn', ['inliers', 'separate', 'aux', 'frozen'])
def test_activation_checkpointing_is_refused(bn):
    learn = new_learner(Checkpointed()).expose(china, bn=bn)
    fails(lambda: fit(learn, 1), contains='activation checkpointing')


def scalar_head():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 1))


REFUSED = [
    ('channels and size', dict(outliers=torch.rand(9, 3, 8, 8))),
    ('channels and size', dict(outliers=torch.rand(9, 1, 16, 16))),
    ('divide 0..255', dict(outliers=china.x.float())),
    ('dtype', dict(outliers=china.x.long())),
    ('give their folder', dict(outliers=[Path('a.png')])),
    ('inlier labels', dict(outliers=valid)),
    ('inlier labels', dict(outliers=Images(valid.x, valid.y))),
    ('is empty', dict(outliers=china.x[:0])),
    ('neither a file', dict(outliers='no/such/place')),
    ('such as FGSM(8/255)', dict(attack=FGSM)),
    ('must be an attack', dict(attack='fgsm')),
    ('lam must be', dict(lam=-1)),
    ('lam must be', dict(lam=float('nan'))),
    ('lam must be', dict(lam=None)),
    ('frac must be', dict(frac=2)),
    ('ratio must be', dict(ratio=0)),
    ('a scalar', dict(loss=lambda i, o: o.mean(1))),
    ('uniform, margin', dict(loss='energy')),
    ('mixed, inliers, separate', dict(bn='own')),
    ('energy, msp', dict(score='magic')),
]


@pytest.mark.parametrize('why,kw', REFUSED, ids=[f'{why}-{i}' for i, (why, _) in enumerate(REFUSED)])
def test_refused(why, kw):
    fails(lambda: fit(new_learner().expose(**(dict(outliers=china) | kw)), 1), contains=why)


def test_a_head_without_classes_is_refused():
    learn = new_learner(scalar_head(), loss_func=lambda p, y: p.mean())
    fails(lambda: fit(learn.expose(china), 1), contains='classification head')


# what the recorder shows, and what a large untrained network is told


def columns(learn):
    return list(learn.recorder.metric_names)


def test_columns_are_there_in_training_alone():
    learn = fit(new_learner().expose(china, attack=FGSM(16 / 255)), 2)
    eq(columns(learn), ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'out_loss', 'energy_gap', 'moved', 'time'])
    eq([len(o) for o in learn.recorder.values], [6, 6])
    eq([m.name for m in learn.metrics], ['accuracy'])
    with silent(learn):
        eq(len(learn.validate()), 2)
        eq(learn.get_preds()[0].shape, (len(valid), 7))
    fit(learn.unexpose(), 1)
    eq(columns(learn), ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time'])


def test_without_an_attack_nothing_moves_and_without_outliers_there_are_no_columns():
    eq(columns(fit(new_learner().expose(china), 1))[4:], ['out_loss', 'energy_gap', 'time'])
    eq(columns(fit(new_learner().expose(china, lam=0), 1))[4:], ['time'])


def test_train_loss_is_that_of_the_inliers_and_lr_find_sees_the_sum():
    shown = {}
    for name, lam in dict(little=1e-6, much=1.0).items():
        learn = fit(new_learner().expose(china, lam=lam, bn='frozen'), 1)
        shown[name] = learn.recorder.losses[0].item()
    close(shown['little'], shown['much'], 1e-6)
    first = {}
    for name, lam in dict(little=1e-6, much=1.0).items():
        learn = new_learner().expose(china, lam=lam, bn='frozen')
        set_seed(0)
        with silent(learn):
            learn.lr_find(num_it=20, show_plot=False)
        first[name] = learn.recorder.losses[0].item()
    assert first['much'] > first['little'] + 1  # log 7 = 1.9 on outliers


def test_columns_are_what_they_say():
    learn = new_learner().expose(china)
    outs, terms = [], []

    class Keep(Callback):
        order = 6
        run_valid = False

        def after_loss(self):
            cb = self.learn.outlier_exposure
            terms.append((self.learn.loss_grad - self.learn.loss).item() / 0.5)
            outs.append((energy(cb.logits_out).mean() - energy(self.learn.pred).mean()).item())

    learn.add_cb(Keep())
    fit(learn, 1)
    out_loss, gap = learn.recorder.values[-1][-2:]
    close(out_loss, sum(terms) / len(terms), 1e-5)
    close(gap, sum(outs) / len(outs), 1e-5)


def test_an_interrupted_fit_leaves_no_column_behind():
    class Stop(Callback):
        def after_batch(self):
            raise KeyboardInterrupt

    learn = new_learner().expose(china)
    with silent(learn):
        with pytest.raises(KeyboardInterrupt):
            learn.fit(1, cbs=Stop())
        eq(len(learn.validate()), 2)
    eq([m.name for m in learn.metrics], ['accuracy'])


def test_a_callback_can_watch_the_gap(tmp_path):
    learn = new_learner(path=tmp_path).expose(china)
    fit(learn, 2, None, None, [SaveModelCallback(monitor='energy_gap'), CSVLogger()])
    assert 'energy_gap' in (tmp_path / 'history.csv').read_text()


def told(learn, n=1):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        fit(learn, n)
    return [str(o.message) for o in said if 'untrained' in str(o.message)]


def with_head(*layers):
    "A body of `small_cnn` with fastai's head, or with these `layers` before its own last"
    torch.manual_seed(0)
    net = small_cnn(1, 7)
    if not layers:
        return nn.Sequential(net[:-3], create_head(64, 7))
    return nn.Sequential(*net[:-1], *layers, net[-1])


def test_an_untrained_network_with_few_images_and_fastais_head_is_told_once():
    said = told(new_learner(with_head()).expose(china), 2)
    assert len(said) == 1 and '126 images' in said[0] and 'BatchNorm1d and Dropout' in said[0]
    assert 'custom_head' in said[0], 'the remedy'


def test_no_false_alarm():
    assert not told(new_learner().expose(china))  # a linear head
    assert not told(new_learner(with_head(nn.Dropout(0.0))).expose(china))  # dropout that is off
    assert not told(new_learner(with_head()).expose(china, lam=0))  # no outliers
    assert not told(fit(new_learner(with_head()), 1).expose(china))  # trained before
    trained_body = with_head()
    trained_body[0].load_state_dict(fit(new_learner(), 1).model[:-3].state_dict())
    assert not told(new_learner(trained_body).expose(china))  # a new head on a trained body
    many = Images(train.x.repeat(8, 1, 1, 1), train.y.repeat(8), train.classes)
    assert not told(Learner(many.dls(64, valid=valid), with_head()).expose(china))  # many images


def looks(monkeypatch):
    "Where this package asks for the value of a tensor, other than of a setting, which stays on the CPU"
    found = []

    def watched(name):
        ask = getattr(torch.Tensor, name)

        def asked(self, *args, **kwargs):
            frame = sys._getframe(1)
            while '/site-packages/torch/' in frame.f_code.co_filename:
                frame = frame.f_back
            name = frame.f_code.co_name
            if Path(frame.f_code.co_filename).parent.name == 'aoe_nb' and name not in ('_check_eps', '_at_least_0'):
                found.append(f'{name}:{frame.f_lineno}')
            return ask(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, asked)

    for name in ('__bool__', '__float__', '__int__', '__index__', 'item', 'tolist', 'nonzero', 'cpu', 'numpy'):
        watched(name)
    return found


class Third(Callback):
    "Looks on in the third step, from its first callback to its backward pass"

    order = -100

    def __init__(self, found):
        self.found = found

    def before_batch(self):
        if self.training and self.train_iter == 2:
            self.found.clear()

    def before_backward(self):
        if self.training and self.train_iter == 2:
            self.learn.looked = list(self.found)


SIX = FGSM(0.1), PGD(0.1, 3), PGD(0.1, 2, keep_best=True), APGD(0.1, 5), MIFGSM(0.1, 2), FreeFGSM(0.1)


@pytest.mark.parametrize('bn', bn_ways)
@pytest.mark.parametrize('i', range(len(SIX)))
def test_a_step_asks_for_no_value_where_that_takes_long(i, bn, monkeypatch):
    learn = new_learner(bs=16)
    learn.expose(china, attack=SIX[i], attack_in=PGD(0.1, 2), bn=bn)
    found = looks(monkeypatch)
    learn.add_cb(Third(found))
    fit(learn, 1, 1e-3)
    usual = learn.looked
    learn.outlier_exposure.looks_at_once = ()
    fit(learn, 1, 1e-3)
    assert learn.looked == [] and usual


def test_a_check_that_was_put_off_comes_before_the_step():
    net = new_net()
    learn = new_learner(net, bs=16)
    learn.expose(china, attack=FGSM(0.1), score=lambda logits: energy(logits) * torch.nan)
    before = [p.clone() for p in net.parameters()]
    for where in ('cpu',), ():
        learn.outlier_exposure.looks_at_once = where
        with pytest.raises(FloatingPointError, match='NaN in the gradient of the loss'):
            fit(learn, 1, 1e-3)
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
