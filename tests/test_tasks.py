"What a learner is trained for: `expose` takes what has a meaning, and says at once what has none, and why."

import copy, subprocess, sys, warnings
from collections import namedtuple
from functools import partial
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import aoe_nb.evaluation  # noqa: F401 gives a learner its scores
from torch import nn
from fastai.callback.mixup import MixUp
from fastai.losses import BaseLoss
from fastai.vision.all import (
    BCELossFlat,
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    DataLoader,
    DataLoaders,
    ImageDataLoaders,
    L1LossFlat,
    Learner,
    MSELossFlat,
    SGD,
    TensorImage,
    accuracy_multi,
)
from fastcore.test import test_close as close, test_eq as eq, test_fail as fails
from PIL import Image
from test_callbacks import fit, silent
from aoe_nb.attack import FGSM, PGD
from aoe_nb.data import outliers
from aoe_nb.energy import energy, energy_margin, joint_energy, uniform_ce
from aoe_nb.exposure import OutlierExposure
from aoe_nb.models import past_softmax, small_cnn

gen = torch.Generator().manual_seed(0)
X = torch.rand(48, 1, 8, 8, generator=gen)
Y = torch.arange(48) % 3
HOT = F.one_hot(Y, 3).float()
TAGS = (torch.rand(48, 3, generator=gen) < 0.5).float()
NUMBERS = torch.randn(48, 3, generator=gen)
SHARES = torch.rand(48, 3, generator=gen)
CHINA = outliers('china')
ATTACK = FGSM(8 / 255)


def net(n=3, *more):
    torch.manual_seed(0)
    return nn.Sequential(*small_cnn(1, n), *more)


def loaders(y, x=X, cls=DataLoader):
    ds = list(zip(map(TensorImage, x) if x.ndim == 4 else x, y))
    return DataLoaders(*[cls(ds, bs=16, num_workers=0) for _ in range(2)], device=torch.device('cpu'))


def learner(model=None, y=Y, loss=None, **kw):
    return Learner(loaders(y), model or net(), loss_func=loss or CrossEntropyLossFlat(), opt_func=SGD, **kw)


def squares(p, y):
    return ((p - y) ** 2).mean()


def tags(p, y):
    return F.binary_cross_entropy_with_logits(p, y)


def own_sigmoids(p, y):
    return -(y * F.logsigmoid(p) + (1 - y) * F.logsigmoid(-p) * p.sigmoid()).mean()


class BinaryCrossEntropy(nn.Module):
    def forward(self, p, y):
        return F.binary_cross_entropy_with_logits(p, y)


# What is refused, with the reason


NO_CLASSES = [
    ('several labels', HOT, BCEWithLogitsLossFlat()),
    ('several labels', TAGS, BCEWithLogitsLossFlat()),
    ('several labels', TAGS, nn.BCEWithLogitsLoss()),
    ('several labels', HOT, F.binary_cross_entropy_with_logits),
    ('several labels', TAGS, nn.MultiLabelSoftMarginLoss()),
    ('several labels', HOT, BinaryCrossEntropy()),
    ('several labels', TAGS, tags),
    ('several labels', TAGS, lambda p, y: tags(p, y)),
    ('numbers', SHARES, MSELossFlat()),
    ('numbers', NUMBERS, MSELossFlat()),
    ('numbers', NUMBERS, L1LossFlat()),
    ('numbers', NUMBERS, nn.SmoothL1Loss()),
    ('numbers', NUMBERS, nn.HuberLoss()),
    ('numbers', NUMBERS, F.mse_loss),
    ('numbers', NUMBERS, squares),
    ('numbers', SHARES, squares),
    ('numbers', NUMBERS[:, 0], lambda p, y: squares(p[:, 0], y)),
    ('numbers', torch.rand(48, 3, 2), lambda p, y: squares(p[:, :, None], y)),
    ('several labels', HOT, lambda p, y: tags(p, y)),
    ('several labels', HOT, own_sigmoids),
    ('numbers', NUMBERS.softmax(1), MSELossFlat()),
    ('numbers', HOT, MSELossFlat()),
    ('numbers', NUMBERS.softmax(1), squares),
    ('numbers', torch.arange(48.0), lambda p, y: squares(p[:, 0], y)),
]


@pytest.mark.parametrize('why,y,loss', NO_CLASSES, ids=map(str, range(len(NO_CLASSES))))
def test_what_has_no_classes_is_refused_at_once(why, y, loss):
    learn = learner(y=list(y), loss=loss)
    before = copy.deepcopy(learn.model.state_dict())
    modes = [m.training for m in learn.model.modules()]
    rng = torch.get_rng_state()
    fails(lambda: learn.expose(CHINA, attack=ATTACK), contains=why)
    for loss_out in 'margin', partial(energy_margin, m_in=-8):
        fails(lambda: learn.expose(CHINA, loss=loss_out), contains=why)
    eq(rng, torch.get_rng_state())
    for k, v in learn.model.state_dict().items():
        eq(v, before[k])
    eq(modes, [m.training for m in learn.model.modules()])
    fails(lambda: fit(learner(y=list(y), loss=loss), 1, cbs=OutlierExposure(CHINA)), contains=why)
    fit(learn, 1)  # nothing is lost


def head(f):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return f(self.net(x))

    return Head()


Named = namedtuple('Named', 'logits aux')
PAST_SOFTMAX = {
    'layer': (lambda: net(3, nn.LogSoftmax(1)), nn.NLLLoss(), 'LogSoftmax'),
    'function': (lambda: head(lambda z: z.log_softmax(1)), F.nll_loss, 'LogSoftmax'),
    'in an object': (
        lambda: head(lambda z: Named(z.log_softmax(1), z)),
        lambda p, y: F.nll_loss(p.logits, y),
        'LogSoftmax',
    ),
    'in half': (
        lambda: head(lambda z: z.log_softmax(1).bfloat16()),
        lambda p, y: F.nll_loss(p.float(), y),
        'LogSoftmax',
    ),
    'probabilities': (lambda: net(3, nn.Softmax(1)), lambda p, y: F.nll_loss(p.log(), y), 'Softmax'),
}


@pytest.mark.parametrize('kind', PAST_SOFTMAX)
def test_outputs_past_a_softmax(kind):
    make, loss, name = PAST_SOFTMAX[kind]
    fails(lambda: learner(make(), loss=loss).expose(CHINA, attack=ATTACK), contains=f'ends in a {name}')
    for kw in dict(loss='margin'), dict(loss=partial(energy_margin, m_in=-8)):
        fails(lambda: learner(make(), loss=loss).expose(CHINA, **kw), contains=f'ends in a {name}')
    learn = learner(make(), loss=loss)
    fails(lambda: fit(learn, 1, cbs=OutlierExposure(CHINA, attack=ATTACK)), contains=f'ends in a {name}')
    if name == 'Softmax':
        fails(lambda: learner(make(), loss=loss).expose(CHINA), contains='ends in a Softmax')


def test_log_probabilities_have_an_outlier_exposure_without_energies():
    with pytest.warns(UserWarning, match='ends in a LogSoftmax'):
        logp = learner(net(3, nn.LogSoftmax(1)), loss=nn.NLLLoss()).expose(CHINA)
    fit(logp, 2, 0.05)
    logits = fit(learner().expose(CHINA), 2, 0.05)
    for p, q in zip(logp.model.parameters(), logits.model.parameters()):
        close(p, q, 1e-5)
    under = learner(net(3, nn.LogSoftmax(1)), loss=nn.NLLLoss())
    with pytest.warns(UserWarning, match='ends in a LogSoftmax'):
        under.expose(CHINA, attack=ATTACK, score='msp')
    assert fit(under, 1).recorder.losses[-1].isfinite()


class OnlyInTraining(nn.Module):
    "Gives log-probabilities in training, logits else"

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x).log_softmax(1) if self.training else self.net(x)


def test_outputs_past_a_softmax_in_training_only():
    learn = learner(OnlyInTraining(), loss=nn.NLLLoss()).expose(CHINA, loss='margin')
    for _ in range(2):
        fails(lambda: fit(learn, 1), contains='ends in a LogSoftmax')
    learn.expose(CHINA)
    with pytest.warns(UserWarning, match='ends in a LogSoftmax'):
        fit(learn, 1)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        fit(learn, 1)


def test_no_logits_are_taken_for_probabilities():
    eq(past_softmax(torch.zeros(9, 3)), '')
    eq(past_softmax(torch.eye(3)[:1]), '')  # one row says nothing
    eq(past_softmax(torch.rand(9, 3)), '')
    eq(past_softmax(torch.rand(9, 3, 2).softmax(1)), '')
    eq(past_softmax(torch.full((9, 3), torch.nan)), '')


def test_a_head_that_starts_with_the_shares_of_the_classes_gives_logits():
    model = net()
    nn.init.zeros_(model[-1].weight)
    model[-1].bias.data = torch.tensor([0.5, 0.3, 0.2]).log()
    learn = learner(model).expose(CHINA, attack=ATTACK)
    assert learn.ood_scores(X).isfinite().all()
    for _ in range(2):
        fit(learn, 1, 1e-5)
    shares = torch.full((9, 1000), 1e-3) * (1 + 1e-3 * torch.randn(9, 1000, generator=gen))
    eq(past_softmax(shares.log()), '')
    eq(past_softmax(shares.log().log_softmax(1)), 'LogSoftmax')


def test_sigmoids_are_named():
    learn = learner(net(3, nn.Sigmoid()), y=list(TAGS), loss=BCELossFlat())
    fails(lambda: learn.expose(CHINA, loss='no_label', score='joint_energy'), contains='BCEWithLogitsLoss')


class Pixelwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


HEADS = {
    'one logit': (lambda: net(1), list(Y.float() % 2), lambda p, y: F.binary_cross_entropy_with_logits(p[:, 0], y)),
    'squeezed': (lambda: net(1, nn.Flatten(0)), list(Y.float() % 2), BCEWithLogitsLossFlat()),
    'pixels': (Pixelwise, list(torch.zeros(48, 8, 8).long()), CrossEntropyLossFlat(axis=1)),
    'points': (lambda: net(6, nn.Unflatten(1, (3, 2))), list(torch.rand(48, 3, 2)), MSELossFlat()),
}


@pytest.mark.parametrize('kind', HEADS)
def test_heads_of_another_shape(kind):
    make, y, loss = HEADS[kind]
    fails(lambda: learner(make(), y=y, loss=loss).expose(CHINA), contains='classification head')
    learn = learner(make(), y=y, loss=loss)
    before = copy.deepcopy(dict(learn.model.named_parameters()))
    fails(lambda: fit(learn, 1, cbs=OutlierExposure(CHINA)), contains='classification head')
    for k, v in learn.model.named_parameters():
        eq(v, before[k])


def text_learner():
    words = torch.randint(0, 20, (48, 12), generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 3))
    return Learner(loaders(Y, words), model, loss_func=CrossEntropyLossFlat())


def tabular_learner():
    from fastai.tabular import all as tabular

    rng = np.random.default_rng(0)
    a, y = (rng.integers(0, 3, 60).astype(str) for _ in range(2))
    df = pd.DataFrame(dict(a=a, b=rng.random(60), y=y))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pd.set_option('mode.chained_assignment', None)
        kw = dict(procs=[tabular.Categorify, tabular.Normalize], y_block=tabular.CategoryBlock(), num_workers=0)
        dls = tabular.TabularDataLoaders.from_df(df, y_names='y', cat_names=['a'], cont_names=['b'], bs=16, **kw)
    return tabular.tabular_learner(dls, layers=[8])


def vector_learner():
    return Learner(loaders(Y, torch.rand(48, 5)), nn.Linear(5, 3), loss_func=CrossEntropyLossFlat())


NO_IMAGES = [(text_learner, 'words'), (tabular_learner, 'one input'), (vector_learner, 'tables')]


@pytest.mark.parametrize('make,why', NO_IMAGES)
def test_learners_without_images(make, why):
    learn = make()
    fails(lambda: learn.expose(CHINA, attack=ATTACK), contains=why)
    fails(lambda: learn.expose(torch.rand(9, 3, 8, 8)), contains=why)
    with pytest.raises(ValueError):
        fit(make(), 1, cbs=OutlierExposure(CHINA))
    assert fit(learn, 1).recorder.losses


@pytest.mark.parametrize('how', [torch.jit.script, lambda m: torch.jit.trace(m, X[:2], check_trace=False)])
def test_torchscript(how):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = learner(how(net()))
        before = [p.clone() for p in learn.model.parameters()]
        for bn in 'inliers', 'frozen':
            fails(lambda: learn.expose(CHINA, attack=ATTACK, bn=bn), contains='scripted')
            by_hand = OutlierExposure(CHINA, attack=ATTACK, bn=bn)
            fails(lambda: fit(learn, 1, cbs=by_hand), contains='scripted')
        for p, q in zip(learn.model.parameters(), before):
            eq(p, q)
        learn.expose(CHINA, attack=ATTACK, bn='mixed')
        assert fit(learn, 1).recorder.losses[-1].isfinite()


# What is taken


def test_several_labels():
    learn = learner(y=list(TAGS), loss=BCEWithLogitsLossFlat(), metrics=accuracy_multi)
    learn.expose(CHINA, attack=PGD(8 / 255, 2), loss='no_label', score='joint_energy')
    x, moved = learn.exposed(16)
    e = [learn.ood_scores(o, score='joint_energy') for o in (x, moved)]
    assert (e[1] < e[0]).float().mean() > 0.9
    fit(learn, 20, 0.1)
    values = pd.DataFrame(list(learn.recorder.values), columns=learn.recorder.metric_names[1:-1])
    assert values.energy_gap.iloc[-1] > values.energy_gap[0] + 0.1
    assert values.out_loss.iloc[-1] < values.out_loss[0]
    means = [learn.ood_scores(o, score='joint_energy').mean() for o in (X, CHINA)]
    assert means[1] > means[0]


def test_the_loss_of_no_label_is_their_own_with_all_labels_off():
    logits = torch.randn(9, 3)
    cb = OutlierExposure(CHINA, loss='no_label')
    want = F.binary_cross_entropy_with_logits(logits, torch.zeros(9, 3))
    close(cb.loss_out(None, logits), want, 1e-6)
    close(cb.loss_out(None, logits), -joint_energy(logits).mean() / 3, 1e-6)


@pytest.mark.parametrize('mixup', [False, True])
def test_several_labels_under_mixup(mixup):
    learn = learner(y=list(TAGS), loss=BCEWithLogitsLossFlat(), cbs=MixUp() if mixup else None)
    settings = dict(loss='no_label', score='joint_energy', attack=ATTACK)
    fit(learn.expose(CHINA, **settings), 2)
    fit(learn.unexpose(), 2, cbs=OutlierExposure(CHINA, **settings))


def soft(p, y):
    return -(y * p.log_softmax(1)).sum(1).mean()


TAKEN = {
    'numbers of classes': (list(Y), CrossEntropyLossFlat()),
    'in a column': (list(Y[:, None]), lambda p, y: F.cross_entropy(p, y[:, 0])),
    'whole floats': (list(Y.float()), lambda p, y: F.cross_entropy(p, y.long())),
    'one-hot': (list(HOT), nn.CrossEntropyLoss()),
    'whole one-hot': (list(HOT.long()), lambda p, y: F.cross_entropy(p, y.float())),
    'soft labels': (list(NUMBERS.softmax(1)), nn.CrossEntropyLoss()),
    'soft labels by hand': (list(NUMBERS.softmax(1)), soft),
    'one-hot squares': (list(HOT), lambda p, y: squares(p.softmax(1), y)),
    'binary but of one class': (list(Y), lambda p, y: tags(p, F.one_hot(y, 3).float())),
    'two labels': (list(Y), BaseLoss(nn.CrossEntropyLoss)),
}


@pytest.mark.parametrize('kind', TAKEN)
def test_classes_in_any_form(kind):
    y, loss = TAKEN[kind]
    mixes = y[0].ndim and y[0].is_floating_point()  # as fastai's MixUp does not whole numbers
    for mix in [None, MixUp()] if mixes else [None]:
        learn = learner(y=y, loss=loss, cbs=mix)
        assert fit(learn.expose(CHINA, attack=ATTACK), 1).recorder.losses[-1].isfinite()
        fit(learn.unexpose(), 1, cbs=OutlierExposure(CHINA, attack=ATTACK))


def test_who_brings_loss_and_score_is_not_asked():
    own = dict(loss=lambda i, o: uniform_ce(o).mean(), score=lambda z: energy(z))
    for y, loss in (NUMBERS, MSELossFlat()), (TAGS, BCEWithLogitsLossFlat()):
        fit(learner(y=list(y), loss=loss).expose(CHINA, attack=ATTACK, **own), 1)
    fit(learner(net(3, nn.LogSoftmax(1)), loss=nn.NLLLoss()).expose(CHINA, attack=ATTACK, **own), 1)


def test_without_outliers_any_head_will_do():
    learn = learner(y=list(NUMBERS), loss=MSELossFlat())
    fit(learn.expose(CHINA, lam=0, attack_in=FGSM(8 / 255)), 1)
    fit(learn.expose(CHINA, lam=0), 1)
    one = learner(net(1), y=list(NUMBERS[:, 0]), loss=MSELossFlat())
    fit(one.expose(CHINA, lam=0, attack_in=FGSM(8 / 255)), 1)


@pytest.mark.parametrize('attack', [None, ATTACK])
@pytest.mark.parametrize('wrap', [lambda z: (z, z), lambda z: dict(logits=z), lambda z: [z, None]])
def test_tuples_and_dicts_do_not_say_where_the_logits_are(wrap, attack):
    learn = learner(head(wrap), loss=lambda p, y: torch.zeros((), requires_grad=True))
    fails(lambda: learn.expose(CHINA, attack=attack), contains='an object that has them as `.logits`')


def test_an_object_names_its_logits():
    named = learner(head(lambda z: Named(z, None)), loss=lambda p, y: F.cross_entropy(p.logits, y))
    got = fit(named.expose(CHINA, attack=ATTACK), 2, 0.05)
    want = fit(learner().expose(CHINA, attack=ATTACK), 2, 0.05)
    for p, q in zip(got.model.parameters(), want.model.parameters()):
        close(p, q, 1e-6)


def test_pytorch_loaders_are_asked_too():
    ds = torch.utils.data.TensorDataset(X, TAGS)
    dls = DataLoaders(torch.utils.data.DataLoader(ds, 16), torch.utils.data.DataLoader(ds, 16))
    learn = Learner(dls, net(), loss_func=BCEWithLogitsLossFlat())
    fails(lambda: learn.expose(CHINA), contains='several labels')


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(zip(X, TAGS))

    def __len__(self):
        return len(X)


def test_a_loader_that_cannot_be_asked_is_looked_at_in_its_first_batch():
    dl = torch.utils.data.DataLoader(Stream(), 16)
    learn = Learner(DataLoaders(dl, dl), net(), loss_func=BCEWithLogitsLossFlat())
    before = [p.clone() for p in learn.model.parameters()]
    fails(lambda: fit(learn.expose(CHINA), 1), contains='several labels')
    for p, q in zip(learn.model.parameters(), before):
        eq(p, q)


# An exported learner where the library is not installed

OPENS = """
import sys, warnings
warnings.simplefilter('ignore')
class No:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'aoe_nb': raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, No())
from fastai.vision.all import load_learner
photo,*exports = sys.argv[1:]
for file in exports:
    learn = load_learner(file)
    with learn.no_bar(), learn.no_logging(): print(*learn.predict(photo)[2].tolist())
assert not any(name.startswith('aoe_nb') for name in sys.modules)
"""


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('photos')
    for i, y in enumerate(Y):
        file = folder / f'c{y}' / f'{i}.png'
        file.parent.mkdir(exist_ok=True)
        image = (255 * X[i, 0]).byte().numpy()
        Image.fromarray(image).resize((16, 16)).save(file)
    return folder


def finished(learn):
    fit(learn, 1)


def on_schedule(learn):
    from fastai.callback.schedule import ParamScheduler, SchedLin

    fit(learn, 1, cbs=ParamScheduler(dict(lam=SchedLin(0, 1), eps=SchedLin(0, 0.1))))


def interrupted(learn):
    from fastai.vision.all import Callback

    class Stop(Callback):
        def after_epoch(self):
            raise KeyboardInterrupt

    stop = Stop()
    with pytest.raises(KeyboardInterrupt):
        fit(learn, 2, cbs=stop)
    learn.remove_cb(stop)


def untrained(learn):
    pass


def searched(learn):
    with silent(learn):
        learn.lr_find(num_it=6, show_plot=False)


def exported(before, photos, folder):
    "A learner, and the path of what `export` wrote of it"
    from fastai.vision.all import accuracy

    dls = ImageDataLoaders.from_folder(photos, valid_pct=0.2, bs=16, num_workers=0, seed=0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    learn = Learner(dls, nn.Sequential(*layers), metrics=accuracy, path=folder)
    learn.expose(torch.rand(20, 3, 16, 16), attack=FGSM(8 / 255), attack_in=PGD(2 / 255, 2), bn='aux', score='msp')
    before(learn)
    learn.export(f'{before.__name__}.pkl')
    return learn, folder / f'{before.__name__}.pkl'


def test_an_export_opens_without_the_library(photos, tmp_path, fastai_exports):
    from fastai.vision.all import load_learner

    moments = finished, on_schedule, interrupted, untrained, searched
    learners, files = zip(*[exported(before, photos, tmp_path) for before in moments])
    photo = str(next(photos.rglob('*.png')))
    o = subprocess.run([sys.executable, '-c', OPENS, photo, *files], capture_output=True, text=True)
    assert not o.returncode, o.stderr
    for learn, file, line in zip(learners, files, o.stdout.splitlines(), strict=True):
        with silent(learn):
            close(torch.tensor([float(p) for p in line.split()]), learn.predict(photo)[2], 1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            again = load_learner(file)
        cb = again.outlier_exposure
        eq((cb.stream, cb.attack, cb.score.__name__), (None, FGSM(8 / 255), 'msp'))
        again.dls = learn.dls
        fails(lambda: fit(again, 1), contains='give them again')
        fit(again.expose(torch.rand(20, 3, 16, 16)), 1)
        eq(again.recorder.metric_names[3:], ['accuracy', 'out_loss', 'energy_gap', 'time'])


# Evaluation


@pytest.mark.parametrize('last', [nn.LogSoftmax(1), nn.Softmax(1)])
def test_energies_past_a_softmax_are_refused_in_evaluation_too(last):
    learn = learner(net(3, last), loss=nn.NLLLoss())
    for attack in None, ATTACK:
        fails(lambda: learn.ood_scores(X, attack=attack), contains=f'ends in a {type(last).__name__}')
    fails(lambda: learn.ood_report(dict(china=CHINA), inliers=X), contains=f'ends in a {type(last).__name__}')
    fails(lambda: learn.attacked_images(X, ATTACK), contains=f'ends in a {type(last).__name__}')
    assert learn.ood_scores(X, partial(energy, T=2.0)).std() > 0  # with another temperature it varies
    assert learn.ood_scores(X, 'msp').isfinite().all()
    assert learn.ood_scores(X, lambda p: -p.max(1).values, attack=ATTACK).isfinite().all()


def test_a_network_that_is_sure_of_nothing_is_no_softmax():
    learn = learner(net())
    with torch.no_grad():
        for p in learn.model.parameters():
            p.zero_()
    close(learn.ood_scores(X), torch.full((48,), -np.log(3.0)), 1e-5)
    assert fit(learn.expose(CHINA, attack=None), 1).recorder.losses[-1].isfinite()
