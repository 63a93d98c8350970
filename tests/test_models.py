"Networks that people really have pass inliers and outliers as the page on BatchNorm says, or are refused by name."

import copy
import os
import warnings
from collections import OrderedDict, namedtuple
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.all import DataLoaders, set_seed, vision_learner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import aoe_nb.exposure  # noqa: F401 (learn.expose)
from aoe_nb import peers
from aoe_nb.attack import FGSM, PGD, Square
from aoe_nb.batchnorm import bn_ways, replace_once
from aoe_nb.data import inliers, outliers
from aoe_nb.energy import energy
from aoe_nb.evaluation import on_input
from aoe_nb.models import get_logits, load_weights, resnet20, save_weights, small_cnn

timm = pytest.importorskip('timm')

WAYS = [way for way in bn_ways if way != 'mixed']


def split_pass(net, x, way, n, aux=None):
    "What `net` gives for `x` in one training pass, of whose images the first `n` are inliers"
    if bn_ways[way]:
        aux = {} if aux is None else aux
        replace_once(net, partial(bn_ways[way], n=n, total=len(x), aux=aux), len(x))
    return get_logits(net.train()(x))


def averages(net):
    return {k: v.clone() for k, v in net.state_dict().items() if 'running' in k or 'tracked' in k}


def untouched(net):
    "Whether no layer has a `forward` of its own, but for those that torch.compile gave one"
    kind = torch._dynamo.eval_frame.OptimizedModule
    return all('forward' not in m.__dict__ for m in net.modules() if not isinstance(m, kind))


def close(a, b, tol=1e-3):
    "Whether two results agree, relative to the larger entries; means of 0 differ by rounding"
    return torch.allclose(a.double(), b.double(), tol, tol * max(1e-3, float(b.detach().abs().max())))


def moved(before, after):
    return [k for k in before if not close(after[k], before[k])]


def keeps_its_promises(net, x, o, way, tol=1e-3):
    "The table of the page on BatchNorm, as properties of one network"
    n = len(x)
    state = copy.deepcopy(net.state_dict())

    def fresh():
        net.load_state_dict(state)
        return net.train()

    alone = get_logits(fresh()(x)).detach()
    stats_alone = averages(net)
    with torch.no_grad():
        net.load_state_dict(state)
        at_test = torch.cat([get_logits(net.eval()(x)), get_logits(net(o))])
    twice = split_pass(fresh(), torch.cat([x, x]), way, n).detach()
    assert close(twice[n:], twice[:n], tol), 'outliers that are the inliers get other logits'
    aux = {}
    both = split_pass(fresh(), torch.cat([x, o]), way, n, aux)
    assert untouched(net)
    if way == 'frozen':
        assert close(both, at_test, tol), 'frozen is not eval mode'
        assert not moved(averages(net), {k: state[k] for k in averages(net)}), 'frozen moved averages'
    else:
        assert close(both[:n], alone, tol), 'inliers are not what they are alone'
        assert not moved(stats_alone, averages(net)), 'averages are not those of the inliers'
    assert bool(aux) == (way == 'aux' and bool(moved(stats_alone, state))), 'the second set of averages'
    both.sum().backward()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads)
    net.zero_grad()
    return both.detach()


# layers


class NormAct(nn.BatchNorm2d):
    "An activation inside, as in timm"

    def forward(self, x):
        return super().forward(x).relu()


class Masked(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x * (torch.arange(x.shape[1]) % 2)[:, None, None]) * x.sigmoid()


class Direct(nn.BatchNorm2d):
    "PyTorch's own function, arguments by position, and a weight that is not the layer's"

    def forward(self, x):
        args = self.weight + 1, self.bias, self.running_mean, self.running_var, self.training, 0.2, 1e-3, False
        return torch.batch_norm(x, *args).tanh()


class NotASubclass(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.register_buffer('running_mean', torch.zeros(c))
        self.register_buffer('running_var', torch.ones(c))
        self.momentum = 0.1

    def forward(self, x):
        kw = dict(training=self.training, momentum=self.momentum)
        return F.batch_norm(x, self.running_mean, self.running_var, **kw).relu()


class ByHand(nn.BatchNorm2d):
    "Normalises by its own arithmetic, and does nothing else"

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            self.running_mean = (0.9 * self.running_mean + 0.1 * mean).detach()
            self.running_var.data.lerp_(var.detach(), 0.1)
        x = (x - mean[:, None, None]) / (var[:, None, None] + self.eps).sqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class ByHandAct(ByHand):
    def forward(self, x):
        return super().forward(x).relu()


class Conditional(nn.BatchNorm2d):
    def forward(self, x, shift):
        return super().forward(x) + shift


class WithShift(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = Conditional(c)

    def forward(self, x):
        return self.norm(x, x.mean((1, 2, 3), keepdim=True))


class Renorm(nn.Module):
    "No subclass, averages under names of its own, and arithmetic by hand"

    def __init__(self, c):
        super().__init__()
        self.register_buffer('mean', torch.zeros(c))
        self.register_buffer('var', torch.ones(c))

    def forward(self, x):
        mean, var = self.mean, self.var
        if self.training:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            self.mean.lerp_(mean.detach(), 0.1)
            self.var.lerp_(var.detach(), 0.1)
        return (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()


class InABlock(nn.Module):
    "PyTorch's function in the middle of a block that holds the layer"

    def __init__(self, c):
        super().__init__()
        self.norm = nn.BatchNorm2d(c)

    def forward(self, x):
        return F.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=self.training)


class Centred(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x - x.mean(0, keepdim=True))


class PlacesFirst(nn.Module):
    "Rows in the order of places: the first ones are not the inliers'"

    def __init__(self, c):
        super().__init__()
        self.norm = nn.BatchNorm1d(c)

    def forward(self, x):
        n, c, h, w = x.shape
        rows = x.permute(2, 3, 0, 1).reshape(-1, c)
        return self.norm(rows).view(h, w, n, c).permute(2, 3, 0, 1)


class TwoViews(nn.Module):
    "Each image and its mirror image, in one batch"

    def __init__(self, c):
        super().__init__()
        self.norm = nn.BatchNorm2d(c)

    def forward(self, x):
        return sum(self.norm(torch.cat([x, x.flip(3)])).chunk(2))


class Named2d(nn.Module):
    "The layer's input by its name"

    def __init__(self, c):
        super().__init__()
        self.norm = nn.BatchNorm2d(c)

    def forward(self, x):
        return self.norm(input=x)


def on_rows(norm):
    "A layer of rows (N,C), fed with rows for each of 36 places"

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
            return self.norm(rows).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)

    return Rows()


def flat(norm):
    return nn.Sequential(nn.Flatten(2), norm, nn.Unflatten(2, (6, 6)))


def deep(norm):
    return nn.Sequential(nn.Unflatten(2, (1, 6)), norm, nn.Flatten(2, 3))


L = timm.layers
MIXING = {
    'BatchNorm2d': lambda: nn.BatchNorm2d(8),
    'no running statistics': lambda: nn.BatchNorm2d(8, track_running_stats=False),
    'cumulative average': lambda: nn.BatchNorm2d(8, momentum=None),
    'without weights': lambda: nn.BatchNorm2d(8, affine=False),
    'BatchNorm1d, rows': lambda: on_rows(nn.BatchNorm1d(8)),
    'BatchNorm1d, (N,C,L)': lambda: flat(nn.BatchNorm1d(8)),
    'BatchNorm3d': lambda: deep(nn.BatchNorm3d(8)),
    'SyncBatchNorm': lambda: nn.SyncBatchNorm(8),
    'LazyBatchNorm2d': lambda: nn.LazyBatchNorm2d(),
    'InstanceNorm2d, tracked': lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    'activation inside': lambda: NormAct(8),
    'mask inside': lambda: Masked(8),
    'torch.batch_norm': lambda: Direct(8),
    'no subclass': lambda: NotASubclass(8),
    'by hand': lambda: ByHand(8),
    'input by name': lambda: Named2d(8),
    'timm BatchNormAct2d': lambda: L.BatchNormAct2d(8),
    'timm SyncBatchNormAct': lambda: L.convert_sync_batchnorm(L.BatchNormAct2d(8, act_layer=nn.SiLU)),
}
APART = {
    'GroupNorm': lambda: nn.GroupNorm(2, 8),
    'LayerNorm': lambda: nn.LayerNorm((8, 6, 6)),
    'InstanceNorm2d': lambda: nn.InstanceNorm2d(8),
    'torchvision FrozenBatchNorm2d': lambda: __import__('torchvision').ops.FrozenBatchNorm2d(8),
    'timm FrozenBatchNormAct2d': lambda: L.FrozenBatchNormAct2d(8),
    'timm GroupNormAct': lambda: L.GroupNormAct(8, 2),
    'timm LayerNormAct2d': lambda: L.LayerNormAct2d(8),
    'timm FilterResponseNormAct2d': lambda: L.FilterResponseNormAct2d(8),
    'timm EvoNorm2dS0': lambda: L.EvoNorm2dS0(8, group_size=4),
}
REFUSED = {
    'activation by hand': (lambda: ByHandAct(8), 'ByHandAct'),
    'no subclass, by hand': (lambda: Renorm(8), 'Renorm'),
    'a function in a block': (lambda: InABlock(8), 'InABlock'),
    'means of the batch': (lambda: Centred(8), 'Centred'),
    'rows in another order': (lambda: PlacesFirst(8), 'BatchNorm1d'),
    'two views': (lambda: TwoViews(8), 'BatchNorm2d'),
    'two inputs': (lambda: WithShift(8), 'Conditional'),
    'timm EvoNorm2dB0': (lambda: L.EvoNorm2dB0(8), 'EvoNorm2dB0'),
    'timm SplitBatchNorm2d': (lambda: L.convert_splitbn_model(nn.BatchNorm2d(8)), 'SplitBatchNorm2d'),
}


def around(layer, x):
    "A small network with `layer` in it, in front of which activations have means and variances of their own"
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        layer(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    with torch.no_grad():
        for _ in range(3):
            net.train()(x)
    return net


@pytest.fixture(scope='module')
def images():
    gen = torch.Generator().manual_seed(0)
    return torch.rand(8, 3, 8, 8, generator=gen), torch.rand(8, 3, 8, 8, generator=gen) ** 3


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('kind', MIXING)
def test_layers_that_mix_a_batch(kind, way, images):
    x, o = images
    net = around(MIXING[kind], x)
    state = copy.deepcopy(net.state_dict())
    got = keeps_its_promises(net, x, o, way), averages(net)
    net.load_state_dict(state)
    mixed = get_logits(net.train()(torch.cat([x, o])))
    assert not close(got[0], mixed) or moved(got[1], averages(net)), 'nothing was done differently'


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('kind', APART)
def test_layers_that_keep_images_apart_are_left_alone(kind, way, images):
    x, o = images
    net = around(APART[kind], x)
    keeps_its_promises(net, x, o, way)
    want = split_pass(net, torch.cat([x, o]), 'mixed', len(x))
    assert torch.equal(split_pass(net, torch.cat([x, o]), way, len(x)), want)


@pytest.mark.parametrize('way', ['inliers', 'separate', 'aux'])
@pytest.mark.parametrize('kind', REFUSED)
def test_layers_that_cannot_tell_are_refused_by_name(kind, way, images):
    x, o = images
    make, name = REFUSED[kind]
    net = around(make, x)
    with pytest.raises((ValueError, RuntimeError), match=name) as e:
        split_pass(net, torch.cat([x, o]), way, len(x))
    assert 'mixed' in str(e.value) and untouched(net)


def test_a_layer_that_computes_by_hand_can_be_frozen(images):
    x, o = images
    for make in ByHandAct, L.EvoNorm2dB0:
        keeps_its_promises(around(lambda: make(8), x), x, o, 'frozen')


def test_a_scripted_network_is_refused(images):
    x, o = images
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net = torch.jit.script(around(MIXING['BatchNorm2d'], x))
    with pytest.raises(ValueError, match='scripted'):
        split_pass(net, torch.cat([x, o]), 'inliers', len(x))


@pytest.mark.parametrize('make', [Renorm, InABlock, Centred])
def test_a_batch_that_is_mixed_by_hand_cannot_be_frozen(make, images):
    x, o = images
    net = around(lambda: make(8), x)
    with pytest.raises(ValueError, match=make.__name__):
        split_pass(net, torch.cat([x, o]), 'frozen', len(x))


def test_averages_taken_away_after_the_layer_was_made(images):
    x, o = images
    net = around(lambda: nn.BatchNorm2d(8), x)
    net[1].running_mean = net[1].running_var = None
    want = split_pass(net, torch.cat([x, o]), 'separate', len(x))
    for way in 'aux', 'frozen':
        assert torch.equal(split_pass(net, torch.cat([x, o]), way, len(x)), want)


def test_a_learner_looks_once_in_each_fit(plain):
    learn = new_learner(nn.Sequential(nn.Conv2d(1, 8, 3), InABlock(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with pytest.raises(ValueError, match='InABlock.*mixed'), silent(learn):
        learn.expose(CHINA).fit(1)
    with silent(learn):
        learn.expose(CHINA, bn='mixed').fit(1)


def test_dropout_inside_a_layer_goes_on(images):
    x, o = images
    net = around(lambda: L.BatchNormAct2d(8, drop_layer=partial(nn.Dropout, 0.5)), x)
    for way in bn_ways:
        got = [split_pass(net, torch.cat([x, o]), way, len(x)) for _ in range(2)]
        assert not torch.equal(*got)


@pytest.mark.parametrize('way', WAYS)
def test_a_forward_that_somebody_put_there_is_used_and_stays(way, images):
    x, o = images
    net = around(MIXING['BatchNorm2d'], x)
    own = net[1].forward
    net[1].forward = hooked = lambda x: own(x).relu()
    want = around(MIXING['activation inside'], x)
    want[1].load_state_dict(net[1].state_dict())
    both = torch.cat([x, o])
    assert close(split_pass(net, both, way, len(x)), split_pass(want, both, way, len(x)))
    assert net[1].forward is hooked


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('way', WAYS)
def test_precisions(way, dtype, images):
    x, o = images
    net = around(MIXING['activation inside'], x).to(dtype)
    keeps_its_promises(net, x.to(dtype), o.to(dtype), way, {torch.float64: 1e-6}.get(dtype, 0.1))


@pytest.mark.parametrize('reentrant', [True, False])
@pytest.mark.parametrize('way', WAYS)
def test_activation_checkpointing_is_refused(way, reentrant, images):
    x, o = images
    net = around(MIXING['BatchNorm2d'], x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=reentrant)

    with pytest.raises(RuntimeError):
        both = torch.cat([x, o]).requires_grad_()
        split_pass(Checkpointed(), both, way, len(x)).sum().backward()


# architectures

# a small member of each family of timm, and the size of image that it takes
FAMILIES = {
    'test_byobnet': 64,
    'test_efficientnet': 64,
    'mobilenetv3_small_050': 64,
    'densenet121': 32,
    'regnetx_002': 64,
    'resnetv2_18': 64,
    'test_resnet': 64,
    'cs3darknet_s': 64,
    'ghostnet_050': 64,
    'levit_128s': 64,
    'efficientvit_m0': 64,
    'fastvit_t8': 64,
    'test_convnext': 64,
    'test_vit': 64,
}


def without_dropout(net):
    for m in net.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        if type(m).__name__ in ('DropPath', 'StochasticDepth'):
            m.drop_prob = m.p = 0.0
    return net


def a_little_trained(net, size):
    "`net` with running averages that describe something, and two populations for it"
    gen = torch.Generator().manual_seed(0)
    x, o = (torch.rand(4, 3, size, size, generator=gen) ** k for k in (1, 3))
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = 0.5
    with torch.no_grad():
        for _ in range(2):
            net.train()(x)
    return net, x, o


def whole_table(net, size, tol=1e-2):
    "Each way through `net`; one without layers that mix a batch must not see a difference"
    net, x, o = a_little_trained(without_dropout(net), size)
    mixing = bool(averages(net))
    for way in WAYS:
        if mixing:
            keeps_its_promises(net, x, o, way, tol)
        else:
            with torch.no_grad():
                want = split_pass(net, torch.cat([x, o]), 'mixed', len(x))
            assert torch.equal(split_pass(net, torch.cat([x, o]), way, len(x)), want)


# and of all others that have one: minutes, if asked for by AOE_ALL_MODELS=1
OTHERS = """cait_xxs24_224 coat_tiny convit_tiny cpubone_nano crossvit_tiny_240 cspnext_tiny deit_tiny_patch16_224
    dla46x_c dpn48b edgenext_xx_small efficientformerv2_s0 efficientvim_m1 efficientvit_b0 eva02_tiny_patch14_224
    fasternet_t0
    hardcorenas_b hgnetv2_b0 hrnet_w18_small iformer_t inception_next_atto lcnetv2_small test_mambaout test_coatnet
    test_nfnet pit_ti_224 pvt_v2_b0 repghostnet_050 repvit_m1 resnest14d rexnet_100 legacy_seresnet18 shvit_s1
    skresnet18 starnet_s050 swiftformer_xs tiny_vit_5m_224 visformer_tiny vit_tiny_r_s16_p8_224 test_vit_relpos
    ese_vovnet19b_slim_dw xcit_nano_12_p8_224"""


def small_timm(name, size):
    torch.manual_seed(0)
    kw = dict(num_classes=4, drop_rate=0.0)
    net = timm.create_model(name, **kw)
    try:
        net.eval()(torch.rand(1, 3, size, size))
    except (AssertionError, RuntimeError):
        net = timm.create_model(name, img_size=size, **kw)
    return net


@pytest.mark.parametrize('name', FAMILIES)
def test_families_of_timm(name):
    whole_table(small_timm(name, FAMILIES[name]), FAMILIES[name])


@pytest.mark.skipif('AOE_ALL_MODELS' not in os.environ, reason='takes minutes: AOE_ALL_MODELS=1 runs it')
@pytest.mark.parametrize('name', OTHERS.split())
def test_all_other_families_of_timm(name):
    whole_table(small_timm(name, 64), 64)


@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v3_small', 'shufflenet_v2_x0_5', 'googlenet', 'mnasnet0_5'])
def test_torchvision(name):
    from torchvision import models

    torch.manual_seed(0)
    kw = {'init_weights': False} if name == 'googlenet' else {}
    whole_table(getattr(models, name)(num_classes=4, **kw), 64)


def test_our_own():
    torch.manual_seed(0)
    whole_table(resnet20(4), 16)


# what networks give, take and are wrapped in

TRAIN = inliers('digits7')
TEST = inliers('digits7', 'test').take(slice(0, 64))
CHINA = outliers('china')
Named = namedtuple('Named', 'logits aux')


class Out:
    def __init__(self, logits):
        self.logits = logits
        self.hidden = [logits.relu()]
        self.loss = None


class LikeHuggingFace(OrderedDict):
    "A dict whose entries are attributes too"

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.__dict__[key] = value


class Slots:
    __slots__ = ('logits',)

    def __init__(self, logits):
        self.logits = logits


class Gives(nn.Module):
    "`net`, whose logits come as `wrap` makes them"

    def __init__(self, wrap, net=None):
        super().__init__()
        self.net = net or new_net()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.net(x))


class InPlace(Gives):
    def forward(self, x):
        return self.wrap(self.net(x.sub_(0.5).div_(0.5)))


class Shifted(Gives):
    "What `InPlace` does, on a copy"

    def forward(self, x):
        return self.wrap(self.net((x - 0.5) / 0.5))


def itself(logits):
    return logits


def new_net():
    torch.manual_seed(0)
    return small_cnn(1, 7)


def loss_of(get):
    "Cross-entropy of a loss function that knows what its network gives, and for how many images"

    def loss(out, y):
        logits = get(out)
        assert len(logits) == len(y)
        return F.cross_entropy(logits, y)

    return loss


WRAPS = {
    'namedtuple': (lambda z: Named(z, 2 * z), lambda o: o.aux / 2),
    'namedtuple of more': (lambda z: Named(z, [z, dict(z=z)]), lambda o: o.aux[1]['z']),
    'object': (Out, lambda o: o.logits),
    'dict and object': (
        lambda z: LikeHuggingFace(logits=z, hidden=(z,)),
        lambda o: o.logits + o.hidden[0] - o['logits'],
    ),
}


@contextmanager
def silent(learn):
    with learn.no_bar(), learn.no_logging():
        yield


def new_learner(net, loss=None):
    set_seed(0)
    dls = TRAIN.dls(32, valid=TEST, seed=0)
    return Learner(dls, net, loss_func=loss or CrossEntropyLossFlat(), train_bn=True)


def fitted(net, loss=None, **kw):
    "A learner with `net`, exposed for two epochs"
    learn = new_learner(net, loss)
    kw = dict(attack=FGSM(8 / 255), bn='aux') | kw
    with silent(learn):
        learn.expose(CHINA, **kw).fit(2, 1e-3)
    return learn


def weights(learn):
    return [p.detach().float() for p in learn.model.parameters()]


def everything(learn, peer=True):
    "All that is said of a learner, as numbers"
    x = CHINA.take(slice(0, 16))
    res = {
        'scores': learn.ood_scores(x),
        'attacked': learn.ood_scores(x, attack=FGSM(8 / 255)),
        'images': learn.attacked_images(x, Square(8 / 255, 20)),
        'id': torch.tensor(list(learn.id_report().values())),
        'report': torch.tensor(learn.ood_report(dict(china=x), score='msp', attack=FGSM(8 / 255)).AUROC.to_numpy()),
    }
    if peer:
        pytest.importorskip('pytorch_ood')
        for name in 'EnergyBased', 'Mahalanobis':
            res[name] = learn.ood_scores(x, peers.pytorch_ood_score(name, learn), attack=FGSM(8 / 255))
    return res


def agree(got, want, tol=1e-4):
    for k in want:
        assert close(got[k], want[k], tol), k


@pytest.fixture(scope='module')
def plain():
    "What is said of a network that gives logits"
    learn = fitted(new_net())
    return weights(learn), everything(learn)


@pytest.mark.parametrize('kind', WRAPS)
def test_outputs_are_read_alike(kind, plain):
    wrap, get = WRAPS[kind]
    learn = fitted(Gives(wrap), loss_of(get))
    agree(dict(enumerate(weights(learn))), dict(enumerate(plain[0])))
    agree(everything(learn), plain[1])


@pytest.mark.parametrize('kind', WRAPS)
def test_inliers_are_attacked_by_the_networks_own_loss(kind):
    wrap, get = WRAPS[kind]
    kw = dict(lam=0.0, attack=None, attack_in=FGSM(8 / 255), bn='inliers')
    got, want = fitted(Gives(wrap), loss_of(get), **kw), fitted(new_net(), **kw)
    agree(dict(enumerate(weights(got))), dict(enumerate(weights(want))))


UNNAMED = {
    'nothing': lambda z: None,
    'text': lambda z: 'logits',
    'empty tuple': lambda z: (),
    'tuple': lambda z: (z, z.exp(), None),
    'list': lambda z: [z],
    'dict': lambda z: dict(logits=z),
    'features': lambda z: dict(features=z),
}


@pytest.mark.parametrize('kind', UNNAMED)
def test_outputs_that_name_no_logits_are_refused(kind):
    wrap = UNNAMED[kind]
    learn = new_learner(Gives(wrap), lambda out, y: torch.zeros((), requires_grad=True))
    for f in learn.ood_scores, learn.id_report:
        with pytest.raises(ValueError, match=r'logits of shape \(N, C\)'), silent(learn):
            f(TEST)
    for attack in None, FGSM(8 / 255):
        with pytest.raises(ValueError, match=r'logits of shape \(N, C\)'), silent(learn):
            learn.expose(CHINA, attack=attack).fit(1)


def test_inliers_alone_need_no_logits():
    kw = dict(lam=0.0, attack=None, attack_in=FGSM(8 / 255), bn='inliers')
    got = fitted(Gives(lambda z: (z.exp(), z)), loss_of(lambda o: o[1]), **kw)
    agree(dict(enumerate(weights(got))), dict(enumerate(weights(fitted(new_net(), **kw)))))


def test_outputs_that_cannot_be_split_are_refused():
    learn = new_learner(Gives(Slots), lambda out, y: F.cross_entropy(out.logits, y))
    with pytest.raises(ValueError, match='Slots.*logits of shape'), silent(learn):
        learn.expose(CHINA).fit(1)


@pytest.mark.parametrize('bn', bn_ways)
def test_networks_that_write_on_their_input(bn):
    got, want = (fitted(kind(itself), bn=bn) for kind in (InPlace, Shifted))
    agree(dict(enumerate(weights(got))), dict(enumerate(weights(want))))
    agree(everything(got), everything(want))
    x = torch.rand(16, 1, 8, 8)
    before = x.clone()
    got.ood_scores(x)
    got.ood_scores(x, attack=PGD(8 / 255, 2))
    got.ood_scores(x, on_input(lambda model, x: energy(model(x))), attack=FGSM(8 / 255))
    got.ood_scores(x, attack=Square(8 / 255, 5))
    got.attacked_images(x, FGSM(8 / 255))
    got.ood_report(dict(mine=x), inliers=TEST)
    with silent(got):
        got.expose(x, attack=FGSM(8 / 255), attack_in=FGSM(8 / 255)).fit(1)
    got.exposed(4)
    assert torch.equal(x, before)


@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-3), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_precisions_are_scored_alike(dtype, tol, plain):
    learn = fitted(new_net())
    learn.model.to(dtype)
    got = everything(learn)
    for k in 'scores', 'attacked', 'Mahalanobis', 'EnergyBased':
        if k != 'Mahalanobis' or dtype != torch.bfloat16:
            agree({k: got[k]}, {k: plain[1][k]}, tol)
    assert learn.model[0].weight.dtype == dtype


def test_float16_keeps_the_gradient_of_its_images():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    with torch.no_grad():
        net[1].weight.mul_(1e-6)
    x = torch.rand(16, 1, 8, 8)
    signs = [new_learner(o).attacked_images(x, FGSM(8 / 255)) - x for o in (net, copy.deepcopy(net).half())]
    assert (signs[0].sign() == signs[1].sign()).float().mean() > 0.9


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('bn', bn_ways)
def test_precisions_are_exposed(bn, dtype):
    ds = TensorDataset((TRAIN.x[:64] / 255).to(dtype), TRAIN.y[:64])
    dls = DataLoaders(DataLoader(ds, 32), DataLoader(ds, 32))
    learn = Learner(dls, new_net().to(dtype), loss_func=loss_of(torch.Tensor.float), lr=1e-3)
    with silent(learn):
        learn.expose(CHINA, bn=bn, attack=FGSM(8 / 255), attack_in=FGSM(8 / 255)).fit(1)
    assert learn.recorder.losses[-1].isfinite()


def compiled(net):
    return torch.compile(net, backend='eager')


def compiled_in_place(net):
    net.compile(backend='eager')
    return net


def compiled_inside(net):
    net[4].compile(backend='eager')
    return net.append(torch.compile(net.pop(11), backend='eager'))


COMPILED = [compiled, compiled_in_place, compiled_inside]


@pytest.mark.parametrize('bn', bn_ways)
@pytest.mark.parametrize('how', [*COMPILED, nn.DataParallel])
def test_wrapped_networks_train_alike(how, bn):
    torch._dynamo.reset()
    got, want = fitted(how(new_net()), bn=bn), fitted(new_net(), bn=bn)
    assert untouched(got.model)
    agree(dict(enumerate(weights(got))), dict(enumerate(weights(want))))
    if bn in ('inliers', 'aux'):
        agree(everything(got), everything(want))


@pytest.mark.parametrize('how', COMPILED)
def test_a_compiled_network_is_compiled_again_after_the_pass(how):
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    net = torch.compile(new_net(), backend=backend)
    x = torch.rand(4, 1, 8, 8)
    split_pass(net, torch.cat([x, x]), 'inliers', 4)
    assert not seen
    net(x)
    assert seen


def test_frozen_layers_leave_a_network_compiled():
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    net = torch.compile(new_net(), backend=backend).train()
    x = torch.rand(8, 1, 8, 8)
    want = new_net().eval()(x)
    for _ in range(3):
        got = split_pass(net, x, 'frozen', 4)
        assert close(got, want) and all(m.training for m in net.modules())
    assert len(seen) == 1
    with pytest.raises(RuntimeError, match='keeps no graph'), torch.no_grad():
        split_pass(net, x, 'frozen', 4)


def test_scores_of_a_wrapped_network_can_be_kept(tmp_path):
    x = torch.rand(4, 1, 8, 8)
    for how in [*COMPILED, nn.DataParallel]:
        learn = new_learner(how(new_net()))
        want = learn.ood_scores(x)
        for _ in range(2):
            assert torch.equal(learn.ood_scores(x, cache=tmp_path), want)


def test_a_float16_network_with_norms_in_float32(plain):
    learn = fitted(new_net())
    want = learn.ood_scores(CHINA.take(slice(0, 16)), attack=FGSM(8 / 255))
    learn.model = nn.Sequential(nn.BatchNorm2d(1, eps=0.0), learn.model.half())
    for m in learn.model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.float()
    assert close(learn.ood_scores(CHINA.take(slice(0, 16)), attack=FGSM(8 / 255)), want, 0.02)


def test_inference_mode(plain):
    learn = fitted(new_net())
    with torch.inference_mode():
        got = everything(learn)
        x = torch.rand(4, 1, 8, 8)
        learn.ood_scores(x, attack=FGSM(8 / 255))
        learn.expose(CHINA)
        with pytest.raises(RuntimeError, match='gradients'), silent(learn):
            learn.fit(1)
        learn.expose(x)
    agree(got, plain[1])
    with silent(learn):
        learn.fit(1)


def test_auxiliary_heads_of_googlenet():
    from torchvision.models import googlenet

    def loss(out, y):
        if isinstance(out, torch.Tensor):
            return F.cross_entropy(out, y)
        return sum(F.cross_entropy(o, y) for o in out)

    torch.manual_seed(0)
    ds = TensorDataset(torch.rand(8, 3, 64, 64), torch.arange(8) % 4)
    net = googlenet(num_classes=4, init_weights=False, aux_logits=True)
    learn = Learner(DataLoaders(DataLoader(ds, 4), DataLoader(ds, 4)), net, loss_func=loss)
    with silent(learn):
        learn.expose(torch.rand(9, 3, 64, 64), attack=FGSM(8 / 255), attack_in=FGSM(8 / 255)).fit(1, 1e-4)
    assert learn.ood_scores(torch.rand(2, 3, 64, 64)).isfinite().all()


def test_efficientnet_in_a_vision_learner():
    ds = TensorDataset(torch.rand(16, 3, 32, 32), torch.arange(16) % 4)
    dls = DataLoaders(DataLoader(ds, 8), DataLoader(ds, 8))
    learn = vision_learner(
        dls, 'test_efficientnet', n_out=4, pretrained=False, loss_func=F.cross_entropy, normalize=False
    )
    with silent(learn):
        learn.expose(torch.rand(16, 3, 32, 32), attack=FGSM(8 / 255)).fit(2, 1e-3)
    assert max(learn.recorder.losses) < 10


# weights


def test_numbers_that_half_precision_cannot_hold_are_saved_in_full(tmp_path):
    net = new_net()
    save_weights(net, tmp_path / 'w.pt')
    size = (tmp_path / 'w.pt').stat().st_size
    assert all(v.dtype != torch.float32 for v in torch.load(tmp_path / 'w.pt').values())
    net[1].running_var.fill_(1e5)
    net[4].running_mean.fill_(1e-9)
    save_weights(net, tmp_path / 'w.pt')
    again = load_weights(small_cnn(1, 7), tmp_path / 'w.pt')
    assert torch.equal(again[1].running_var, net[1].running_var)
    assert torch.equal(again[4].running_mean, net[4].running_mean)
    assert (tmp_path / 'w.pt').stat().st_size < size + 1000


class Two(nn.Module):
    "Two layers of one shape, with names that others have for the last one"

    def __init__(self, first, second):
        super().__init__()
        self.add_module(first, nn.Linear(3, 3))
        self.add_module(second, nn.Linear(3, 3))


@pytest.mark.parametrize('names', [('fc', 'head'), ('fc', 'classifier'), ('linear', 'head'), ('head', 'fc')])
@pytest.mark.parametrize('place', ['', 'backbone.'])
def test_layers_of_one_shape_are_told_apart_by_name(names, place):
    theirs = Two(*names).state_dict()
    own = load_weights(nn.Sequential(nn.Identity(), Two('fc', 'head')), {place + k: v for k, v in theirs.items()})
    exact = set(names) == {'fc', 'head'}
    first, second = ('fc', 'head') if exact else names
    assert torch.equal(own[1].fc.weight, theirs[f'{first}.weight'])
    assert torch.equal(own[1].head.weight, theirs[f'{second}.weight'])


def test_no_tensor_is_loaded_twice():
    own, state = Two('fc', 'head'), Two('fc', 'other').state_dict()
    head = own.head.weight.clone()
    load_weights(own, {k: v for k, v in state.items() if 'fc' in k}, strict=False)
    assert torch.equal(own.fc.weight, state['fc.weight']) and torch.equal(own.head.weight, head)
