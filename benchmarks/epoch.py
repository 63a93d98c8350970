"""Images a second of AOE on a WRN-40-2: bfloat16, channels last, data on the device, beside the public code's way.

python benchmarks/epoch.py              # on a GPU one epoch of 50,000 + 50,000, compiled; else a few steps
python benchmarks/epoch.py --steps 4 --n 64

The images are random, since their values cost nothing. The file, results/benchmarks/epoch.json, holds the images
a second of AOE, of free AOE, and of a stand-in of the public code, which attacks through the graph of the whole
batch and loads images one by one, and the ratios to that. The authors' notebook took 163 s an epoch on their GPU.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from fastai.callback.fp16 import AMPMode
from fastai.learner import Learner
from fastai.torch_core import default_device
from step_cost import EPS, ByHand, Clock, new_images, new_model, now

import aoe_nb.exposure  # noqa: F401 gives a learner `expose`
from aoe_nb.attack import FGSM
from aoe_nb.data import Images
from aoe_nb.device import DeviceMixedPrecision, keep_memory
from aoe_nb.free import FreeFGSM
from aoe_nb.record import provenance, write_whole

OUT = Path(__file__).resolve().parent.parent / 'results/benchmarks/epoch.json'
ON_GPU = torch.cuda.is_available()
EPOCH = 50_000


def ours(attack, n, steps):
    "Seconds of each step but the first two, which warm up and compile"
    images = Images(new_images((steps + 2) * n, 32, 0), torch.arange((steps + 2) * n) % 10)
    model = new_model('wrn40_2').to(memory_format=torch.channels_last)
    dls = images.dls(n, valid=images.take(slice(0, 2)))
    cbs = [Clock(), DeviceMixedPrecision(amp_mode=AMPMode.BF16)]
    learn = Learner(dls, torch.compile(model) if ON_GPU else model, loss_func=F.cross_entropy, cbs=cbs)
    outliers = new_images(min(EPOCH, 4 * steps * n), 32, 1).to(default_device())
    learn.expose(outliers, attack=attack, bn='frozen')
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    return learn.clock.seconds[2:]


def public(n, steps):
    "The same of the stand-in"
    run = ByHand('wrn40_2', n, 32, 'public')
    seconds = []
    for _ in range(steps + 1):
        started = now()
        run.way()
        seconds.append(now() - started)
    return seconds[1:]


def main(n, steps, out):
    started = time.time()
    keep_memory()
    runs = {'AOE': ours(FGSM(EPS), n, steps), 'free AOE': ours(FreeFGSM(EPS), n, steps)}
    runs['as the public code'] = public(n, min(steps, 20))
    rows = {}
    for name, seconds in runs.items():
        a_step = sum(seconds) / len(seconds)
        rows[name] = dict(images_per_second=round(2 * n / a_step, 1), seconds_an_epoch=round(a_step * EPOCH / n, 1))
    slow = rows['as the public code']['seconds_an_epoch']
    for row in rows.values():
        row['times_as_fast'] = round(slow / row['seconds_an_epoch'], 2)
    config = dict(model='wrn40_2', inliers=n, outliers=n, steps=steps, eps=EPS, bn='frozen', precision='bfloat16')
    res = dict(experiment='benchmarks', benchmark='epoch', config=config, seed=0, **provenance(), ways=rows)
    res |= dict(compiled=ON_GPU, seconds=round(time.time() - started, 1))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(res, indent=1) + '\n')
    print(json.dumps(rows, indent=1))


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--n', type=int, default=256 if ON_GPU else 64, help='inliers in a batch, and outliers')
    parser.add_argument('--steps', type=int, default=EPOCH // 256 if ON_GPU else 4)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--out', default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    main(args.n, args.steps, args.out)
