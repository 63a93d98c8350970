"""A training that is killed goes on as if nothing had happened, or says why it cannot."""

import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders, Learner, load_learner, set_seed
from fastcore.test import test_eq as eq, test_fail as fails  # pytest collects what is called test_
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from aoe_nb.attack import PGD
from aoe_nb.data import Images, inliers, outliers
from aoe_nb.energy import uniform_ce
from aoe_nb.exposure import OutlierExposure
from aoe_nb.resumption import Door
from aoe_nb.generate import Checkpoint
from aoe_nb.loaders import RandomCropFlip

ROOT = Path(__file__).resolve().parent.parent
train = inliers('digits7')
few = Images(train.x[:48], train.y[:48], train.classes)
china = outliers('china')
EPOCHS = 4


def net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.LazyLinear(7)
    )


def drawn():
    return few.dls(16, valid=few, batch_tfms=RandomCropFlip(2), seed=None, device='cpu')


def new(folder, source=china.x, save=True, cbs=(), dls=drawn, **kw):
    "An exposed learner with everything that draws random numbers: shuffling, transforms, dropout and attack"
    model = net()
    model(few.x[:1].float())
    own = [SaveModelCallback(every_epoch=True, with_opt=True, fname='m')] if save else []
    learn = Learner(
        dls(), model, loss_func=CrossEntropyLossFlat(), path=folder, cbs=[*own, *cbs], train_bn=True, metrics=[]
    )
    kw = dict(attack=PGD(16 / 255, 2), bn='aux') | kw
    return learn.expose(source() if callable(source) and not hasattr(source, 'sample') else source, **kw)


def fit(learn, start=0, n=EPOCHS, one_cycle=True):
    with learn.no_bar(), learn.no_logging():
        if one_cycle:
            learn.fit_one_cycle(n, 0.01, start_epoch=start)
        else:
            learn.fit(n, 0.01, start_epoch=start)
    return weights(learn)


def weights(learn):
    return torch.cat([o.float().flatten() for o in learn.model.state_dict().values()]).clone()


def whole_run(folder, **kw):
    set_seed(3)
    return fit(new(folder, **kw))


class Killed(Exception):
    pass


class Kill(Callback):
    "As a signal would: nothing of the learner is there afterwards"

    def __init__(self, epoch, when, at=1):
        self.at = epoch, at
        self.when = when

    order = 99

    def die(self, when):
        if when == self.when and self.epoch == self.at[0] and (when != 'batch' or self.iter == self.at[1]):
            raise Killed('now')

    def after_batch(self):
        if self.training:
            self.die('batch')

    def before_validate(self):
        self.die('validate')

    def after_epoch(self):
        self.die('epoch')


def interrupted(folder, kill, again=True, **kw):
    "A run that is killed, and what a new learner makes of it"
    set_seed(3)
    with pytest.raises(Killed):
        fit(new(folder, cbs=[kill], **kw))
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)  # another process has other random numbers
    learn = new(folder, **kw)
    return fit(learn, learn.resume('m'))


def shuffled():
    return DataLoader(china.x[:60], batch_size=7, shuffle=True)


def fresh_noise(n):
    return torch.rand(n, 1, 8, 8)


@pytest.mark.parametrize('when', ['batch', 'validate', 'epoch'])
@pytest.mark.parametrize('epoch', [1, 3])
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path, epoch, when):
    want = whole_run(tmp_path / 'a')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert torch.equal(interrupted(tmp_path / 'b', Kill(epoch, when)), want)


@pytest.mark.parametrize(
    'source', [shuffled, lambda: fresh_noise, lambda: list(china.x)], ids=['loader', 'function', 'rows']
)
def test_every_kind_of_source_goes_on(tmp_path, source):
    want = whole_run(tmp_path / 'a', source=source)
    assert torch.equal(interrupted(tmp_path / 'b', Kill(2, 'batch'), source=source), want)


def generator():
    return torch.Generator().manual_seed(5)


LOADERS = dict(
    shuffled=lambda: dict(shuffle=True),
    generator=lambda: dict(shuffle=True, generator=generator()),
    sampler=lambda: dict(sampler=WeightedRandomSampler(torch.ones(48), 48, generator=generator())),
)


def pytorchs(**kw):
    "PyTorch's loaders of inliers"
    ds = TensorDataset(few.x.float() / 255, few.y)
    return DataLoaders(DataLoader(ds, 16, **kw), DataLoader(ds, 16), device='cpu')


def sampled():
    "Outliers by a sampler that was given a generator"
    return DataLoader(china.x[:60], batch_size=7, sampler=RandomSampler(range(60), generator=generator()))


@pytest.mark.parametrize('kind', LOADERS)
def test_pytorchs_loaders_go_on(tmp_path, kind):
    "With the generators of their samplers; and an attack asks for a device, which they do not have"
    kw = dict(source=sampled, dls=lambda: pytorchs(**LOADERS[kind]()))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        want = whole_run(tmp_path / 'a', **kw)
        assert torch.equal(interrupted(tmp_path / 'b', Kill(2, 'batch'), **kw), want)


def test_resume_finds_its_own_files(tmp_path):
    "Beside those of another callback, wherever they are"
    other = SaveModelCallback(every_epoch=True, fname='m_best')
    fit(new(tmp_path, cbs=[other]), n=2)
    for epoch in 7, 8:
        shutil.copy(tmp_path / 'models/m_best_0.pth', tmp_path / f'models/m_best_{epoch}.pth')
    assert new(tmp_path).resume('m') == 2
    assert new(tmp_path / 'elsewhere').resume(str(tmp_path / 'models/m')) == 2


def test_killed_before_the_first_checkpoint_it_starts_over(tmp_path):
    learn = new(tmp_path)
    eq(learn.resume('m'), 0)


def test_killed_twice(tmp_path):
    want = whole_run(tmp_path / 'a')
    set_seed(3)
    with pytest.raises(Killed):
        fit(new(tmp_path / 'b', cbs=[Kill(1, 'batch')]))
    learn = new(tmp_path / 'b', cbs=[Kill(3, 'batch')])
    with pytest.raises(Killed):
        fit(learn, learn.resume('m'))
    learn = new(tmp_path / 'b')
    assert torch.equal(fit(learn, learn.resume('m')), want)


def test_the_attack_and_the_statistics_go_on(tmp_path):
    "State by state: what another learner has after loading is what the first one had"
    first = new(tmp_path, save=False)
    fit(first, n=2)
    first.save('m')
    second = new(tmp_path, save=False).load('m')
    a, b = (o.outlier_exposure.state_dict() for o in (first, second))
    eq(a['stream']['gen'], b['stream']['gen'])
    eq(a['stream']['pos'], b['stream']['pos'])
    eq(a['gen'], b['gen'])
    eq(list(a['aux']), ['1'])
    eq(a['aux']['1'], b['aux']['1'])
    eq(b['epochs_done'], 2)
    eq(first.outlier_exposure.stream.draw(3), second.outlier_exposure.stream.draw(3))


def test_statistics_follow_layers_that_are_replaced(tmp_path):
    "As fastai's `distrib_ctx` puts a SyncBatchNorm in place of each BatchNorm, in each fit anew"
    learn = new(tmp_path, save=False)
    fit(learn, n=1)
    (was,) = learn.outlier_exposure.aux.items()
    learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(learn.model)
    learn.outlier_exposure._take_part()
    (now,) = learn.outlier_exposure.aux.items()
    assert now[0] is learn.model[1] is not was[0]
    assert now[1] is was[1]


def test_files_are_fastais(tmp_path):
    "A learner without outliers reads them, and one with outliers reads those without; no code runs"
    first = new(tmp_path, save=False)
    fit(first, n=1)
    file = first.save('m')
    plain = new(tmp_path, save=False).unexpose()
    plain.load('m', with_opt=True)  # fastai's own, which reads tensors only
    assert torch.equal(weights(plain), weights(first))
    assert not isinstance(plain.save, Door)
    eq(set(torch.load(file, weights_only=False)), {'model', 'opt'})
    plain.save('p')
    assert 'outlier_exposure' not in torch.load(tmp_path / 'models/p.pth', weights_only=False)['opt']
    exposed = new(tmp_path, save=False).load('p')
    assert torch.equal(weights(exposed), weights(first))


def test_a_learner_is_itself_again_when_the_exposure_goes(tmp_path):
    learn = new(tmp_path, save=False)
    assert isinstance(learn.save, Door)
    learn.remove_cb(learn.outlier_exposure)
    assert not isinstance(learn.save, Door) and not isinstance(learn.load, Door)
    cb = OutlierExposure(china)
    assert isinstance(learn.add_cb(cb).load, Door)
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path / 'export.pkl')
    assert not isinstance(again.save, Door) and not isinstance(again.load, Door)


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    learn = new(tmp_path, save=False)
    fit(learn, n=1)
    file = learn.save('m')
    before = file.read_bytes()

    def half(state, f, **kw):
        f.write(b'half of it')
        raise Killed

    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(Killed):
        learn.save('m')
    eq(file.read_bytes(), before)
    assert type(learn.opt).__name__ != '_Beside'


# what cannot be exact says why


def said(learn, start, n=EPOCHS):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        fit(learn, start, n)
    return ' '.join(str(o.message) for o in seen if 'will differ' in str(o.message))


class Keeps(Callback):
    "A checkpoint as users write it, before or after other callbacks have their turn"

    def __init__(self, order, event='after_epoch'):
        self.order = order
        setattr(self, event, self.keep)

    def keep(self):
        torch.rand(1)
        self.learn.save(f'm_{self.epoch}', with_opt=True)


@pytest.mark.parametrize('order', [-5, 0, 70])
def test_checkpoints_of_ones_own(tmp_path, order):
    def run(f, name, **kw):
        return f(tmp_path / name, save=False, cbs=[Keeps(order)], **kw)

    want = run(whole_run, 'a')
    set_seed(3)
    with pytest.raises(Killed):
        fit(new(tmp_path / 'b', save=False, cbs=[Keeps(order), Kill(2, 'batch')]))
    torch.manual_seed(99)
    learn = run(new, 'b')
    eq(learn.resume('m'), 2)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert torch.equal(fit(learn, 2), want)


def test_a_checkpoint_before_the_end_of_validation_says_so(tmp_path):
    fit(new(tmp_path, save=False, cbs=[Keeps(0, 'before_validate')]), n=2)
    for start in 1, 2:
        assert 'middle of an epoch' in said(new(tmp_path, save=False).load('m_1'), start)


class InBetween(Callback):
    "A checkpoint in the middle of an epoch"

    def after_batch(self):
        if self.training and self.iter == 1:
            self.learn.save('m_1', with_opt=True)


def test_reasons(tmp_path):
    fit(new(tmp_path), n=2)

    def loaded(name='m_1', with_opt=True, **kw):
        return new(tmp_path, **kw).load(name, with_opt=with_opt)

    eq(said(loaded(), 2), '')
    assert 'nothing was loaded' in said(new(tmp_path, save=False), 2)
    fit(new(tmp_path / 'b'), n=2)
    model = tmp_path / 'b/models/m_1'
    assert 'state after epoch 2, and not after 3' in said(loaded(model, save=False), 3)
    assert 'with_opt=True' in said(loaded(model, with_opt=False, save=False), 2)
    stream = iter(DataLoader(china.x, 16))
    assert 'iterator' in said(loaded(model, source=stream, save=False), 2)
    fit(new(tmp_path / 'c', save=False, cbs=[InBetween()]), n=2)
    assert 'middle of an epoch' in said(loaded(tmp_path / 'c/models/m_1', save=False), 2)
    fit(new(tmp_path / 'd', cbs=[GradientAccumulation(32)]), n=2)
    assert 'accumulated' in said(loaded(tmp_path / 'd/models/m_0', save=False), 1)
    workers = DataLoader(china.x, 16, num_workers=1, persistent_workers=True)
    assert 'workers of a loader live on' in said(loaded(model, source=workers, save=False), 2)


def test_other_settings_and_other_images_are_named(tmp_path):
    def own(logits_in, logits_out):
        return uniform_ce(logits_out).mean()

    fit(new(tmp_path, loss=own), n=2)
    for changed in (
        dict(lam=1.0),
        dict(bn='inliers'),
        dict(attack=PGD(8 / 255, 2)),
        dict(attack=None),
        dict(frac=0.5),
        dict(ratio=2.0),
        dict(seed=1),
        dict(loss='uniform'),
    ):
        (name,) = changed
        learn = new(tmp_path, save=False, **dict(loss=own) | changed).load('m_1')
        assert f'{name} was ' in said(learn, 2), changed
    learn = new(tmp_path, source=china.x.flip(0), save=False, loss=own).load('m_1')
    assert 'other images' in said(learn, 2)
    twice = new(tmp_path / 'b', save=False, loss=own).load(tmp_path / 'models/m_1')
    twice.save('m_1')  # as a callback does in an epoch that is skipped
    assert 'lam was' in said(new(tmp_path / 'b', save=False, loss=own, lam=1.0).load('m_1'), 2)
    eq(said(new(tmp_path / 'b', save=False, loss=own).load('m_1'), 2), '')


def test_other_outliers_are_named(tmp_path):
    fit(new(tmp_path), n=2)
    learn = new(tmp_path, source=china.x[:60], save=False).load('m_1')
    assert f'that of {len(china)} outliers, these are 60' in said(learn, 2)


def no_state(sd):
    return [1, 2]


def without_stream(sd):
    return {k: v for k, v in sd.items() if k != 'stream'}


def other_layers(sd):
    return sd | dict(aux={name: (torch.zeros(3), torch.zeros(3)) for name in sd['aux']})


def other_generator(sd):
    return sd | dict(stream=sd['stream'] | dict(gen=torch.zeros(3)))


@pytest.mark.parametrize('damage', [no_state, without_stream, other_layers, other_generator])
def test_a_damaged_state_is_named_and_the_run_goes_on(tmp_path, damage):
    fit(new(tmp_path), n=2)
    file = tmp_path / 'models/m_1.pth'
    state = torch.load(file, weights_only=False)
    state['opt']['outlier_exposure'] = damage(state['opt']['outlier_exposure'])
    torch.save(state, file)
    why = 'have another shape' if damage is other_layers else 'is damaged'
    assert why in said(new(tmp_path, save=False).load('m_1'), 2)


def test_resume_names_a_file_that_was_cut(tmp_path):
    fit(new(tmp_path), n=2)
    file = tmp_path / 'models/m_1.pth'
    file.write_bytes(file.read_bytes()[:-1000])
    fails(lambda: new(tmp_path).resume('m'), contains='models/m_1.pth')
    fails(lambda: new(tmp_path).resume('m'), contains='remove it to go on from the one before')
    file.unlink()
    eq(new(tmp_path).resume('m'), 1)


def test_going_on_without_start_epoch_says_nothing(tmp_path):
    fit(new(tmp_path), n=2)
    eq(said(new(tmp_path, save=False).load('m_1'), 0, 1), '')


def test_lr_find_leaves_the_state(tmp_path):
    learn = new(tmp_path, save=False)
    fit(learn, n=1)
    before = learn.outlier_exposure.state_dict()
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=6, show_plot=False)
    after = learn.outlier_exposure.state_dict()
    eq(before['stream']['pos'], after['stream']['pos'])
    eq(before['gen'], after['gen'])
    eq(before['epochs_done'], after['epochs_done'])
    eq(before['random_then'][0]['torch'], after['random_then'][0]['torch'])


def test_checkpoint_keeps_the_exposure(tmp_path):
    def of(name):
        check = Checkpoint(tmp_path / name, 0)
        return new(tmp_path, save=False, cbs=[check]), check

    set_seed(3)
    want = fit(of('a')[0])
    set_seed(3)
    learn, _ = of('b')
    learn.add_cb(Kill(2, 'batch'))
    with pytest.raises(Killed):
        fit(learn)
    learn, check = of('b')
    start = check.resume()
    eq(start, 2)
    assert torch.equal(fit(learn, start), want)


def test_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'ran',)

    torch.save(dict(model=Evil(), opt={}, log=[]), tmp_path / 'c.pth')
    check = Checkpoint(tmp_path / 'c', 0)
    new(tmp_path, save=False, cbs=[check])
    fails(check.resume, contains='cannot read the checkpoint')
    assert not (tmp_path / 'ran').exists()


def test_a_handful_of_kills_at_any_instant():
    "By SIGKILL, while a checkpoint is written or not; benchmarks/kills.py does it a hundred times"
    code = 'import kills, random; print(kills.trials(4, 1, random.Random(7))["equal"])'
    here = os.pathsep.join([str(ROOT / 'benchmarks'), str(ROOT), os.environ.get('PYTHONPATH', '')])
    env = os.environ | dict(PYTHONPATH=here, OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env=env)
    eq(done.stdout.strip(), '4')
