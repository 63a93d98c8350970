"""What tests/test_distributed.py runs in several processes: torchrun ranks.py FOLDER TASK... It is no test."""

import os
import signal
import sys
import warnings
from pathlib import Path
from tempfile import mkdtemp

import torch
from accelerate.utils import DistributedDataParallelKwargs
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam
from fastai.torch_core import TensorImage, rank_distrib, set_seed
from fastai.vision.all import Callback, CrossEntropyLossFlat, Transform, imagenet_stats
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import aoe_nb.exposure  # noqa: F401 (what Learner gains)
from aoe_nb.attack import FGSM, PGD
from aoe_nb.batchnorm import bn_aux, bn_inliers, bn_separate
from aoe_nb.loaders import Pixels, RandomCropFlip
from aoe_nb.mining import Mining

torch.set_num_threads(1)
N, GLOBAL = 48, 12  # inliers, and how many of them make a step of all processes together
gen = torch.Generator().manual_seed(0)
INLIERS = torch.rand(N, 3, 8, 8, generator=gen)
OUTLIERS = torch.rand(30, 3, 8, 8, generator=gen)
LABELS = torch.arange(N) % 3


def net(bn=False):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8) if bn else nn.GroupNorm(2, 8)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)
    )


def in_order(world):
    "The inliers so that one process has in each step those that `world` processes have together"
    bs = GLOBAL // world
    return torch.arange(N).view(world, -1, bs).transpose(0, 1).flatten()


class Recorded:
    "An attack that keeps what it was given and where it began"

    def __init__(self, attack):
        self.attack = attack
        self.seen = []
        self.noise = []

    def __call__(self, x, loss, generator=None):
        self.seen.append(x.clone())
        self.noise.append(torch.rand(4, generator=generator))
        return self.attack(x, loss)


class Pair(list):
    split_idx = 0


def learner(world=1, order=None, tfms=(), folder=None, cbs=(), **kw):
    order = torch.arange(N) if order is None else order
    ds = Pair((TensorImage(INLIERS[i]), LABELS[i]) for i in order)
    bs = GLOBAL // world

    def dl():
        return TfmdDL(ds, bs=bs, num_workers=0, device='cpu', after_batch=list(tfms))

    model = kw.pop('model', None) or net()
    opt_func = kw.pop('opt_func', SGD)
    dls = DataLoaders(dl(), dl(), device='cpu')
    return Learner(dls, model, CrossEntropyLossFlat(), opt_func, path=folder or mkdtemp(), cbs=list(cbs), wd=0.0)


def fit(learn, n=2, start=0):
    with learn.no_bar(), learn.no_logging():
        learn.fit(n, 0.1, start_epoch=start)
    return torch.cat([o.float().flatten() for o in learn.model.state_dict().values()])


def exposed(learn, source=OUTLIERS, attack=None, **kw):
    attack = attack or Recorded(FGSM(8 / 255))
    learn.expose(source, attack=attack, seed=5, **kw)
    return attack


# tasks: each gives what its rank keeps for the test


def share(folder, world):
    learn = learner(world)
    attack = exposed(learn)
    with learn.ranks_ctx():
        weights = fit(learn)
    values = list(learn.recorder.values[-1])
    return dict(seen=attack.seen, noise=attack.noise, weights=weights, values=values)


def mined(folder, world):
    learn = learner(world)
    exposed(learn, mine=Mining(0.1, 0.5))
    with learn.ranks_ctx():
        weights = fit(learn)
    return dict(rows=learn.outlier_exposure.stream.rows, weights=weights)


class Count(Callback):
    "How often gradients are averaged, and whether that is during an attack"

    order = 12

    def __init__(self, inside):
        self.inside = inside
        self.inside.update(averages=0, passes=0)

    def before_fit(self):
        def hook(state, bucket):
            self.inside['averages'] += 1
            return allreduce_hook(state, bucket)

        def seen(module, args):
            self.inside['passes'] += 1

        self.model.register_comm_hook(None, hook)
        self.model.register_forward_pre_hook(seen)


def silent_attack(folder, world):
    count, during = {}, []

    def attack(x, loss, generator=None):
        before = dict(count)
        x = PGD(8 / 255, 3)(x, loss, generator=generator)
        during.append({k: count[k] - before[k] for k in count})
        return x

    learn = learner(world, cbs=[Count(count)])
    exposed(learn, attack=attack)
    with learn.ranks_ctx():
        fit(learn)
    return dict(during=during, count=count)


class Mark(Transform):
    order, split_idx = 20, 0

    def encodes(self, x: TensorImage):
        x = x.clone()
        x[:, :, 0, 0] = 1.0
        return x


def pipeline(folder, world):
    tfms = [Mark(), Normalize.from_stats(*imagenet_stats, cuda=False)]
    learn = learner(world, tfms=tfms)
    attack = exposed(learn)
    found = []

    class Look(Callback):
        def before_batch(self):
            found.append(Pixels(self.dls.train).norm is not None)

    learn.add_cb(Look())
    with learn.ranks_ctx():
        fit(learn, 1)
    return dict(marked=bool((torch.cat(attack.seen)[:, :, 0, 0] == 1).all()), found=all(found))


class GlooSync(nn.SyncBatchNorm):
    "The forward of SyncBatchNorm in training, which PyTorch has on GPUs only"

    def forward(self, x):
        from torch.distributed.nn.functional import all_reduce

        dims = [d for d in range(x.ndim) if d != 1]
        moments = torch.stack([x.mean(dims), (x**2).mean(dims)])
        mean, square = all_reduce(moments) / distributed.get_world_size()
        var = square - mean**2
        return (x - mean[:, None, None]) / (var[:, None, None] + self.eps).sqrt()


def together():
    if not distributed.is_initialized():
        distributed.init_process_group('gloo')


def sync_bn(folder, world):
    together()
    rank = distributed.get_rank()
    torch.manual_seed(rank)
    x = torch.randn(16, 3, 4, 4) + 2 * rank
    everywhere = [torch.empty_like(x) for _ in range(world)]
    distributed.all_gather(everywhere, x)
    res = {}
    for way in bn_inliers, bn_separate, bn_aux:
        layer, aux = GlooSync(3), {}
        got = way(layer, x, 8, 16, aux)[8:]
        ref = torch.cat([o[:8] if way is bn_inliers else o[8:] for o in everywhere])
        mean, var = ref.mean((0, 2, 3)), ref.var((0, 2, 3), correction=0)
        want = (x[8:] - mean[:, None, None]) / (var[:, None, None] + layer.eps).sqrt()
        res[way.__name__] = (got - want).abs().max().item()
        if aux:
            own = ref.var((0, 2, 3), correction=1)
            res['aux mean'] = (aux[layer][0] - 0.1 * mean).abs().max().item()
            res['aux var'] = (aux[layer][1] - (0.9 + 0.1 * own)).abs().max().item()
    return res


def bn_local(folder, world):
    "Running averages, and those of `aux`, in each process when an attack begins"
    learn = learner(world, model=net(bn=True))
    starts = []
    layer = learn.model[1]

    def attack(x, loss, generator=None):
        starts.append([layer.running_mean.clone()] + [o.clone() for o, _ in learn.outlier_exposure.aux.values()])
        return FGSM(8 / 255)(x, loss)

    exposed(learn, attack=attack, bn='aux')
    with learn.ranks_ctx():
        fit(learn, 2)
    return dict(starts=starts)


def kept(folder, world, epochs, start):
    set_seed(1 + rank_distrib(), reproducible=True)  # each process has random numbers of its own
    save = SaveModelCallback(every_epoch=True, with_opt=True, fname='m')
    model = net(bn=True)
    model.insert(3, nn.Dropout(0.3))
    learn = learner(world, model=model, opt_func=Adam, folder=folder, cbs=[save], tfms=[RandomCropFlip(1)])
    exposed(learn, attack=PGD(8 / 255, 2), bn='aux')
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if world > 2 else []
    with learn.ranks_ctx(kwargs_handlers=handlers):
        first = learn.resume('m') if start else 0
        return dict(weights=fit(learn, epochs, first), first=first)


def whole_run(folder, world):
    return kept(folder, world, 4, False)


def half_run(folder, world):
    return kept(folder / 'killed', world, 2, False)


def other_half(folder, world):
    return kept(folder / 'killed', world, 4, True)


def alone(folder, world):
    "Processes that train a model each, though they could talk: each sees all outliers"
    together()
    learn = learner(1)
    attack = exposed(learn)
    fit(learn, 1)
    return dict(seen=attack.seen)


class Die(Callback):
    def __init__(self, how):
        self.how = how

    def after_batch(self):
        if rank_distrib() == 1 and self.training and self.iter == 1:
            os.kill(os.getpid(), self.how)


def death(folder, world, how=signal.SIGKILL, timeout=50):
    learn = learner(world, cbs=[Die(how)])
    exposed(learn)
    with learn.ranks_ctx(timeout=timeout):
        fit(learn)


def silence(folder, world):
    death(folder, world, signal.SIGSTOP, 3)


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    for task in sys.argv[2:]:  # one start for several: it takes longer than they do
        res = globals()[task](Path(sys.argv[1]), int(os.environ['WORLD_SIZE']))
        torch.save(res, Path(sys.argv[1]) / f'{task}-{rank_distrib()}.pt')
