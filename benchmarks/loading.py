"""What loading costs: images/s of the fast path, of fastai's ordinary path, and of an epoch of ResNet-20.

python benchmarks/loading.py        # needs CIFAR-10 on this disk; about two minutes on 2 cores

It writes results/benchmarks/loading.json.
"""

import json
import time
from itertools import islice
from pathlib import Path

import torch
from fastai.callback.all import Callback, ShortEpochCallback
from fastai.vision.all import Flip, ImageDataLoaders, Learner, Normalize

from aoe_nb.data import inliers
from aoe_nb.device import DeviceMixedPrecision
from aoe_nb.loaders import RandomCropFlip
from aoe_nb.models import cifar10_stats, resnet20
from aoe_nb.record import provenance
from aoe_nb.sources import _folder

OUT = Path(__file__).resolve().parent.parent / 'results/benchmarks/loading.json'


def rate(dl, n_batches):
    "Images per second of `n_batches`, after one to warm up"
    batches = iter(dl)
    next(batches)
    start = time.time()
    n = sum(len(batch[0]) for batch in islice(batches, n_batches))
    return n / (time.time() - start)


class Clock(Callback):
    "When each training batch ended"

    def before_fit(self):
        self.ends = []

    def after_batch(self):
        if self.training:
            self.ends.append(time.time())


def epoch_rate(dls, bf16, bs=256):
    "Images per second of a fifth of an epoch of ResNet-20, channels last"
    clock = Clock()
    cbs = [clock, ShortEpochCallback(0.2)]
    if bf16:
        cbs.append(DeviceMixedPrecision(amp_mode='bf16'))
    model = resnet20(stats=None)
    learn = Learner(dls, model.to(memory_format=torch.channels_last), cbs=cbs)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    return bs * (len(clock.ends) - 1) / (clock.ends[-1] - clock.ends[0])


def ordinary_path():
    "The same images as fastai loads them, each decoded from its file"
    return ImageDataLoaders.from_folder(
        _folder('cifar10', 'train').parent,
        train='train',
        valid='test',
        bs=256,
        num_workers=2,
        batch_tfms=[Flip(), Normalize.from_stats(*cifar10_stats)],
    )


def main():
    began = time.time()
    train = inliers('cifar10')
    again = time.time()
    inliers('cifar10')
    load_seconds = time.time() - again
    test = inliers('cifar10', 'test')
    fast = train.dls(256, valid=test, batch_tfms=RandomCropFlip(), normalize=cifar10_stats)
    res = dict(
        load_seconds=round(load_seconds, 2),
        fast_path=round(rate(fast.train, 100)),
        ordinary_path=round(rate(ordinary_path().train, 60)),
        resnet20_bf16=round(epoch_rate(fast, True)),
        resnet20_fp32=round(epoch_rate(fast, False)),
    )
    config = dict(id='cifar10', bs=256, unit='images/s')
    about = dict(config=config, seed=0, **provenance(), seconds=round(time.time() - began, 1))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(about | res, indent=1))
    print(res)


if __name__ == '__main__':
    main()
