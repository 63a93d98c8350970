"""A training is killed at a random instant, as by `kill -9`, and resumed: are its weights those of an undisturbed run?

python benchmarks/kills.py [kills] [kills of two processes]        # 100 and 20 take some minutes

Each trial trains a small network beside attacked outliers, with shuffling, random crops, dropout and bn='aux', and
keeps a checkpoint an epoch. Every second kill waits until a checkpoint is being written. A new process then goes on
with `learn.resume`, and its weights are compared bit by bit. It writes results/benchmarks/kills.json.
"""

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import torch
import torch._dynamo  # noqa: F401 (here, for it takes longer than a trial)
from fastai.callback.schedule import Learner
from fastai.callback.tracker import SaveModelCallback
from fastai.torch_core import set_seed
from torch import nn

from aoe_nb.attack import PGD
from aoe_nb.data import Images, inliers, outliers
from aoe_nb.exposure import OutlierExposure  # noqa: F401 (what Learner gains)
from aoe_nb.loaders import RandomCropFlip
from aoe_nb.record import provenance

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / 'results/benchmarks/kills.json'
config = dict(id='digits7', images=192, bs=16, epochs=6, attack='pgd-3', bn='aux', seed=0)
train_set = inliers(config['id'])
few = Images(train_set.x[: config['images']], train_set.y[: config['images']], train_set.classes)
china = outliers('china').x


def train(folder, world):
    "The training, from its last checkpoint to the end; the weights are kept when it is done"
    warnings.simplefilter('ignore')
    set_seed(config['seed'])
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(256, 7)
    )
    dls = few.dls(config['bs'] // world, valid=few, batch_tfms=RandomCropFlip(2), seed=None, device='cpu')
    save = SaveModelCallback(every_epoch=True, with_opt=True, fname='kept')
    learn = Learner(dls, net, path=folder, cbs=save, metrics=[], train_bn=True)
    learn.expose(china, attack=PGD(16 / 255, 3), bn=config['bn'])
    with learn.ranks_ctx(), learn.no_bar(), learn.no_logging():
        (folder / 'began').touch()
        learn.fit_one_cycle(config['epochs'], 0.01, start_epoch=learn.resume('kept'))
    if not int(os.environ.get('RANK', 0)):
        torch.save(net.state_dict(), folder / 'done.pth')


def started(folder, world):
    "Processes that train, which begin with everything imported"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        if world > 1:
            os.environ |= dict(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank))
            os.environ |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        try:
            train(folder, world)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pids


def ended(pids):
    "Whether all of them went to their end"
    return not any([os.waitpid(pid, 0)[1] for pid in pids])


def weights(folder):
    return torch.load(folder / 'done.pth', weights_only=True)


def equal(a, b):
    return all(torch.equal(v, b[k]) for k, v in a.items())


def parts(folder):
    return list((folder / 'models').glob('*.part'))


def kill(folder, pids, after, writing):
    "Kill all at once, so many seconds `after` training began, or when the next checkpoint is being written"
    while not (folder / 'began').exists():
        time.sleep(0.0005)
    until = time.time() + after
    while time.time() < until:
        time.sleep(0.0005)
    give_up = time.time() + 2
    while writing and not parts(folder) and time.time() < give_up:
        pass
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def trial(want, seconds, world, writing, rng):
    "One kill and what comes after it"
    folder = Path(mkdtemp())
    after = rng.uniform(0, seconds)
    pids = started(folder, world)
    kill(folder, pids, after, writing)
    res = dict(after=round(after, 3), checkpoints=len(list((folder / 'models').glob('*.pth'))))
    res |= dict(in_a_write=bool(parts(folder)), done=(folder / 'done.pth').exists())
    res['equal'] = ended(started(folder, world)) and equal(want, weights(folder))
    rmtree(folder)
    return res


def trials(n, world, rng):
    "`n` kills of a training by `world` processes"
    folder = Path(mkdtemp())
    assert ended(started(folder, world))
    seconds = time.time() - (folder / 'began').stat().st_mtime
    want = weights(folder)
    again = Path(mkdtemp())
    assert ended(started(again, world)) and equal(want, weights(again)), 'the training itself is not reproducible'
    kills = [trial(want, seconds, world, i % 2, rng) for i in range(n)]
    same = sum(o['equal'] for o in kills)
    return dict(processes=world, seconds_undisturbed=round(seconds, 2), n=n, equal=same, kills=kills)


def main(alone=100, two=20):
    torch.set_num_threads(1)
    began = time.time()
    rng = random.Random(config['seed'])
    about = dict(config=config, seed=config['seed'], **provenance())
    runs = [trials(n, world, rng) for world, n in ((1, int(alone)), (2, int(two))) if int(n)]
    res = about | dict(seconds=round(time.time() - began, 1), runs=runs)
    OUT.write_text(json.dumps(res, indent=1))
    for run in runs:
        print({k: v for k, v in run.items() if k != 'kills'})


if __name__ == '__main__':
    main(*sys.argv[1:])
