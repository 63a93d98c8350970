"""What loading costs: images/s of the fast path, of fastai's ordinary path, and of an epoch of ResNet-20; writes results/benchmarks/loading.json.

    python benchmarks/loading.py        # needs CIFAR-10 on this disk; about two minutes on 2 cores
"""
import json, time
from pathlib import Path
import torch
from aoe_nb.data import inliers
from aoe_nb.loaders import RandomCropFlip
from aoe_nb.device import DeviceMixedPrecision
from aoe_nb.models import cifar10_stats, resnet20
from aoe_nb.sources import _folder
from aoe_nb.record import provenance
from fastai.callback.all import *
from fastai.vision.all import ImageDataLoaders, Flip, Learner, Normalize

def rate(dl, n_batches):
    "Images per second of `n_batches`, after one to warm up"
    it = iter(dl); next(it); t,n = time.time(),0
    for _,b in zip(range(n_batches), it): n += len(b[0])
    return n/(time.time()-t)

class Clock(Callback):
    "When each training batch ended"
    def before_fit(self): self.ends = []
    def after_batch(self):
        if self.training: self.ends.append(time.time())

def epoch_rate(dls, bf16, bs=256):
    "Images per second of a fifth of an epoch of ResNet-20, channels last"
    clock = Clock()
    learn = Learner(dls, resnet20(stats=None).to(memory_format=torch.channels_last), cbs=[clock, ShortEpochCallback(.2)] + [DeviceMixedPrecision(amp_mode='bf16')]*bf16)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return bs*(len(clock.ends)-1)/(clock.ends[-1]-clock.ends[0])

if __name__ == '__main__':
    t0 = time.time()
    train,t = inliers('cifar10'),time.time(); inliers('cifar10'); again = time.time()-t
    fast = train.dls(256, valid=inliers('cifar10', 'test'), batch_tfms=RandomCropFlip(), normalize=cifar10_stats)
    ordinary = ImageDataLoaders.from_folder(_folder('cifar10', 'train').parent, train='train', valid='test', bs=256, num_workers=2, batch_tfms=[Flip(), Normalize.from_stats(*cifar10_stats)])
    res = dict(load_seconds=round(again, 2), fast_path=round(rate(fast.train, 100)), ordinary_path=round(rate(ordinary.train, 60)), resnet20_bf16=round(epoch_rate(fast, True)), resnet20_fp32=round(epoch_rate(fast, False)))
    out = Path(__file__).resolve().parent.parent/'results/benchmarks/loading.json'; out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(dict(config=dict(id='cifar10', bs=256, unit='images/s'), seed=0, **provenance(), seconds=round(time.time()-t0, 1), **res), indent=1))
    print(res)
