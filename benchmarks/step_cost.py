"""What a training step costs, in units of one step of Outlier Exposure: every way, on the same model and batch.

python benchmarks/step_cost.py                        # three networks, about an hour on one core
python benchmarks/step_cost.py --models resnet20 --repeats 3 --out cost.json

Ways take turns, so that a slow minute falls on all of them. A ratio is that of one turn, and the file,
results/benchmarks/step_cost.json, holds their median and quartiles, seconds, floating-point operations as
PyTorch counts them, and the memory that one step adds. On a GPU the same command measures there.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.torch_core import default_device
from torch.utils.flop_counter import FlopCounterMode

import aoe_nb.exposure  # noqa: F401 gives a learner `expose`
from aoe_nb.attack import FGSM, PGD, Gaussian, fgsm
from aoe_nb.data import Images
from aoe_nb.device import keep_memory
from aoe_nb.energy import energy, uniform_ce
from aoe_nb.free import FreeFGSM, FreePGD
from aoe_nb.models import resnet20, wrn40_2
from aoe_nb.record import provenance, write_whole

OUT = Path(__file__).resolve().parent.parent / 'results/benchmarks/step_cost.json'
EPS = 8 / 255
UNIT = 'OE, frozen'
BN = 'frozen', 'mixed', 'separate', 'aux', 'inliers'
SIZES = dict(resnet20=32, wrn40_2=32, convnext_atto=64)
STEPS = 3  # of a turn; the first, on which the callback looks at the network, does not count


def new_model(name, classes=10):
    "The network of that name, or that a function of the number of classes makes"
    torch.manual_seed(0)
    if callable(name):
        return name(classes)
    if name == 'convnext_atto':
        import timm

        return timm.create_model(name, num_classes=classes)
    return dict(resnet20=resnet20, wrn40_2=wrn40_2)[name](classes)


def new_images(n, size, seed):
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=gen)


class Clock(Callback):
    "Seconds of each step, drawing and attacking outliers included; with a `counter` also its operations"

    order = -1000
    run_valid = False
    counter = None

    def before_fit(self):
        self.seconds = []

    def before_batch(self):
        if self.counter and len(self.seconds) == STEPS - 1:
            self.counter.__enter__()
        self.started = now()

    def after_batch(self):
        self.seconds.append(now() - self.started)
        if self.counter and len(self.seconds) == STEPS:
            self.counter.__exit__(None, None, None)


def now():
    "Seconds; on one thread those of the processor, so that other programs count less"
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


class ByCallback:
    "Steps of a learner, exposed with some settings or not at all"

    def __init__(self, name, n, size, classes=10, **exposure):
        train = Images(new_images(STEPS * n, size, 0), torch.arange(STEPS * n) % classes)
        model = new_model(name, classes).to(memory_format=torch.channels_last)
        self.learn = Learner(train.dls(n, valid=train.take(slice(0, 2))), model, loss_func=F.cross_entropy, cbs=Clock())
        if exposure:
            self.learn.expose(new_images(4 * n, size, 1), **exposure)

    def turn(self):
        with self.learn.no_bar(), self.learn.no_logging():
            self.learn.fit(1, 1e-3)
        return self.learn.clock.seconds[1:]

    def flops(self):
        self.learn.clock.counter = FlopCounterMode(display=False)
        self.turn()
        counter, self.learn.clock.counter = self.learn.clock.counter, None
        return counter.get_total_flops()


class ByHand:
    "Steps of a loop of one's own; `way` is a method that trains on a batch"

    def __init__(self, name, n, size, way):
        self.model = new_model(name).to(default_device())
        self.opt = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9)
        self.x_in, self.x_out = new_images(n, size, 0), new_images(n, size, 1)
        self.y = (torch.arange(n) % 10).to(default_device())
        self.way = getattr(self, way)

    def turn(self):
        seconds = []
        for _ in range(STEPS):
            started = now()
            self.way()
            seconds.append(now() - started)
        return seconds[1:]

    def flops(self):
        with FlopCounterMode(display=False) as counter:
            self.way()
        return counter.get_total_flops()

    def train_on(self, x, n):
        logits = self.model(x)
        loss = F.cross_entropy(logits[:n], self.y) + 0.5 * uniform_ce(logits[n:]).mean()
        loss.backward()
        self.opt.step()
        self.opt.zero_grad()

    def ten_lines(self):
        "The loop on the page about exposure"
        x_in, x_out = (x.to(default_device()) / 255 for x in (self.x_in, self.x_out))
        self.model.eval()
        x_adv = fgsm(x_out, lambda x: energy(self.model(x)), EPS)
        self.model.train()
        self.train_on(torch.cat([x_in, x_adv]), len(x_in))

    def public(self):
        "As the public code does it: images one by one, the attack through the graph of the whole batch"
        n = len(self.x_in)
        every = [torch.from_numpy(x.numpy().astype(np.float32) / 255) for x in [*self.x_in, *self.x_out]]
        x = torch.stack([(o - 0.5) / 0.25 for o in every]).to(default_device()).requires_grad_()
        self.model.train()
        energy(self.model(x)[n:]).mean().backward()
        step = EPS / 0.25 * x.grad[n:].sign()
        self.opt.zero_grad()
        self.train_on(torch.cat([x.detach()[:n], x.detach()[n:] - step]), n)


def ways():
    "{name: what makes its steps}"
    table = {'plain': ByCallback}
    for bn in BN:
        table[f'OE, {bn}'] = partial(ByCallback, bn=bn)
        table[f'AOE, {bn}'] = partial(ByCallback, bn=bn, attack=FGSM(EPS))
    frozen = partial(ByCallback, bn='frozen')
    table['OE and noise, frozen'] = partial(frozen, attack=Gaussian(EPS))
    table['AOE on half, frozen'] = partial(frozen, attack=FGSM(EPS), frac=0.5)
    table['free AOE, frozen'] = partial(frozen, attack=FreeFGSM(EPS))
    table['free PGD, frozen'] = partial(frozen, attack=FreePGD(EPS))
    table['PGD-5, frozen'] = partial(frozen, attack=PGD(EPS, 5))
    table['PGD-5 on half, frozen'] = partial(frozen, attack=PGD(EPS, 5), frac=0.5)
    table['ten lines'] = partial(ByHand, way='ten_lines')
    table['as the public code'] = partial(ByHand, way='public')
    return table


def kilobytes(what):
    "Of this process, as Linux counts them: VmRSS now, VmHWM at most"
    return int(re.search(rf'{what}:\s+(\d+)', Path('/proc/self/status').read_text())[1])


def added_by(run):
    "Megabytes that steps need beyond what is there before them"
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run.turn()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = kilobytes('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # forget the peak so far
    run.turn()
    return (kilobytes('VmHWM') - before) * 1024 / 1e6


def memory_of(model, way, n, threads):
    "Megabytes that steps add to what the network and its images take, in a process of its own"
    args = [sys.executable, __file__, '--memory', way, '--models', model, '--n', n, '--threads', threads]
    done = subprocess.run([str(o) for o in args], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_memory(model, way, n):
    print(round(added_by(ways()[way](model, n, SIZES[model])), 1))


def peak(n=2048):
    "Floating-point operations a second in the product of two large matrices"
    a = torch.rand(n, n, device=default_device())
    seconds = []
    for _ in range(5):
        started = now()
        a @ a
        seconds.append(now() - started)
    return 2 * n**3 / min(seconds)


def measured(model, n, repeats, threads, only):
    "One row for each way"
    runs = {name: make(model, n, SIZES[model]) for name, make in ways().items() if not only or name in only}
    flops = {name: run.flops() for name, run in runs.items()}  # warms up as well
    turns = {name: [] for name in runs}
    for k in range(repeats):
        for name, run in runs.items():
            turns[name].append(float(np.median(run.turn())))
        print(model, f'turn {k + 1} of {repeats}', flush=True)
    unit = np.array(turns[UNIT])
    rows = {}
    for name, seconds in turns.items():
        low, mid, high = np.percentile(np.array(seconds) / unit, [25, 50, 75]).round(3).tolist()
        rows[name] = dict(
            ratio=mid,
            quartiles=[low, high],
            seconds=round(float(np.median(seconds)), 4),
            images_per_second=round(2 * n / float(np.median(seconds)), 1),
            gflop=round(flops[name] / 1e9, 2),
            megabytes=memory_of(model, name, n, threads),
        )
    return rows


def main(models, n, repeats, threads, only, out):
    started = time.time()
    keep_memory()
    rows = {model: measured(model, n, repeats, threads, only) for model in models}
    config = dict(models={m: SIZES[m] for m in models}, inliers=n, outliers=n, repeats=repeats, unit=UNIT, eps=EPS)
    res = dict(experiment='benchmarks', benchmark='step_cost', config=config, seed=0, **provenance(), steps=rows)
    res |= dict(peak_gflop_per_second=round(peak() / 1e9, 1), seconds=round(time.time() - started, 1))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(res, indent=1) + '\n')
    for model, table in rows.items():
        for name, o in table.items():
            ratio = f'{o["ratio"]:6.2f}  {o["quartiles"]}'
            print(f'{model:14}{name:24}{ratio}  {o["gflop"]:8.1f} GFLOP {o["megabytes"]:7.0f} MB')


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--models', nargs='+', default=list(SIZES), choices=list(SIZES))
    parser.add_argument('--n', type=int, default=64, help='inliers in a batch, beside as many outliers')
    parser.add_argument('--repeats', type=int, default=8)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--ways', nargs='+', help=f'only these, {UNIT!r} among them')
    parser.add_argument('--memory', help='print the megabytes of this way, and nothing else')
    parser.add_argument('--out', '--json', default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        print_memory(args.models[0], args.memory, args.n)
    else:
        main(args.models, args.n, args.repeats, args.threads, args.ways, args.out)
