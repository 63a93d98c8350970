"Networks that people really have: each passes inliers and outliers as the page on BatchNorm says, or is refused by name."

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aoe_nb.batchnorm import bn_ways, replace_once
from aoe_nb.models import get_logits

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
    return all('forward' not in m.__dict__ for m in net.modules())


def close(a, b, tol=1e-3):
    "Whether two results agree, relative to the larger entries"
    return torch.allclose(a.double(), b.double(), tol, tol * float(b.detach().abs().max()))


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


def test_dropout_inside_a_layer_goes_on(images):
    x, o = images
    net = around(lambda: L.BatchNormAct2d(8, drop_layer=partial(nn.Dropout, 0.5)), x)
    for way in bn_ways:
        got = [split_pass(net, torch.cat([x, o]), way, len(x)) for _ in range(2)]
        assert not torch.equal(*got)


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
