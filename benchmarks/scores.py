"""Time of a report's metrics on a million scores beside pytorch-ood's, of PGD-20 beside torchattacks', and of a report.

The report is the whole way from images to metrics: a trained ResNet-20 scores inliers and outliers, the outliers under
PGD-20. The peer is torchattacks' PGD on cross-entropy, which is as long a way, and pytorch-ood's metrics.

Both sides alternate, on the same numbers, model, batch and machine. The file, results/benchmarks/scores.json,
holds every repetition, and the ratio is the median over pairs of neighbours.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchattacks
from fastai.learner import Learner
from pytorch_ood.metrics import AUPR, AUROC, FPRAtTPR, MetricCollection

from aoe_nb.attack import PGD, pgd, square
from aoe_nb.data import inliers, outliers
import aoe_nb.evaluation  # noqa: F401 (brings `learn.ood_report`)
from aoe_nb.energy import energy
from aoe_nb.metrics import ood_metrics
from aoe_nb.models import imagenet_stats, load_weights, resnet20, small_cnn
from aoe_nb.record import provenance

ROOT = Path(__file__).resolve().parent.parent
config = dict(
    scores=1_000_000,
    batch=128,
    shape=[3, 32, 32],
    model='small_cnn(3, 10)',
    eps_255=8,
    alpha_255=2,
    steps=20,
    repeats=15,
    report=dict(model='resnet20', images=128, eps_255=2, steps=20, repeats=7),
    square=dict(images=100, queries=50),
)


def alternate(sides, repeats, wait=lambda: None):
    "Seconds of each of `sides`, {name: function}, taken in turn after one round to warm up"
    seconds = {name: [] for name in sides}
    for i in range(repeats + 1):
        for name, func in sides.items():
            wait()
            start = time.perf_counter()
            func()
            wait()
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def metric_sides(n, seed):
    "Metrics from two vectors, as a report needs them; the peer gets one vector and labels, ready made"
    rng = np.random.default_rng(seed)
    s_in = torch.tensor(rng.normal(0, 1, n // 2), dtype=torch.float32)
    s_out = torch.tensor(rng.normal(1, 1, n // 2), dtype=torch.float32)
    scores = torch.cat([s_in, s_out])
    labels = torch.cat([torch.zeros(n // 2), -torch.ones(n // 2)]).long()

    def peer():
        metrics = MetricCollection([AUROC(), AUPR('id'), AUPR('ood'), FPRAtTPR(0.95)])
        metrics.update(scores=scores, labels=labels)
        return metrics.compute()

    return {'aoe_nb': lambda: ood_metrics(s_in, s_out), 'pytorch-ood': peer}


def attack_sides(c, device, seed):
    "PGD on the cross-entropy of one small network, by both libraries"
    torch.manual_seed(seed)
    net = small_cnn(3, 10).to(device).eval()
    x = torch.rand(c['batch'], *c['shape'], device=device)
    y = torch.randint(10, (c['batch'],), device=device)
    eps = c['eps_255'] / 255
    alpha = c['alpha_255'] / 255
    peer = torchattacks.PGD(net, eps=eps, alpha=alpha, steps=c['steps'], random_start=True)

    def ours():
        return pgd(x, lambda x: -F.cross_entropy(net(x), y, reduction='none'), eps, c['steps'], alpha=alpha)

    return {'aoe_nb': ours, 'torchattacks': lambda: peer(x, y)}


def report_sides(c, device, seed):
    "The AUROC of a trained network under PGD-20, from images to number"
    net = load_weights(resnet20(stats=imagenet_stats), 'resnet20').to(device, memory_format=torch.channels_last).eval()
    test = inliers('cifar10', 'test').take(slice(0, c['images']))
    other = outliers('tinyimagenet_aux').take(slice(0, c['images']))
    learn = Learner(test.dls(64, valid=test, device=device), net)
    eps = c['eps_255'] / 255
    alpha = 2.5 * eps / c['steps']
    peer = torchattacks.PGD(net, eps=eps, alpha=alpha, steps=c['steps'], random_start=True)
    attack = PGD(eps, c['steps'], alpha)

    def theirs():
        x, moved = (o.x.to(device) / 255 for o in (test, other))
        moved = peer(moved, torch.zeros(len(moved), dtype=torch.long, device=device))
        with torch.no_grad():
            scores = torch.cat([energy(net(x)), energy(net(moved))]).cpu()
        labels = torch.cat([torch.zeros(len(x)), -torch.ones(len(moved))]).long()
        metrics = MetricCollection([AUROC(), AUPR('id'), AUPR('ood'), FPRAtTPR(0.95)])
        metrics.update(scores=scores, labels=labels)
        return metrics.compute()

    return {'aoe_nb': lambda: learn.ood_report(dict(other=other), attack=attack, bs=128), 'peers': theirs}


def outside_the_network(c, seed):
    "The share of a Square Attack's time that is not spent in the network, {network: {norm: share}}"
    torch.manual_seed(seed)
    nets = dict(resnet20=resnet20().to(memory_format=torch.channels_last).eval(), small_cnn=small_cnn(3, 10).eval())
    x = torch.rand(c['images'], 3, 32, 32)
    res = {name: {} for name in nets}
    for name, net in nets.items():
        inside = []

        def loss(x, net=net, inside=inside):
            start = time.process_time()
            value = energy(net(x))
            inside.append(time.process_time() - start)
            return value

        for norm, eps in dict(linf=4 / 255, l2=0.5).items():
            inside.clear()
            start = time.process_time()
            square(x, loss, eps, c['queries'], norm=norm, generator=torch.Generator().manual_seed(seed))
            res[name][norm] = 1 - sum(inside) / (time.process_time() - start)
    return res


def medians(runs):
    return {name: float(np.median(seconds)) for name, seconds in runs.items()}


def ratio(runs):
    "How many times as long as we the peer takes, median over pairs of neighbours"
    ours, peer = runs.values()
    return float(np.median(np.divide(peer, ours)))


def with_peers(about):
    "Provenance that also names the versions of the peers"
    peers = {name: version(name) for name in ('pytorch-ood', 'torchattacks')}
    return about | dict(versions=about['versions'] | peers)


def main(out=ROOT / 'results/benchmarks/scores.json', seed=0):
    start = time.time()
    on_gpu = torch.cuda.is_available()
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    metrics = alternate(metric_sides(config['scores'], seed), config['repeats'])
    attacks = alternate(attack_sides(config, 'cuda' if on_gpu else 'cpu', seed), config['repeats'], wait)
    c = config['report']
    reports = alternate(report_sides(c, 'cuda' if on_gpu else 'cpu', seed), c['repeats'], wait)
    runs = dict(metrics=metrics, pgd20=attacks, report=reports)
    res = dict(
        median_seconds={what: medians(o) for what, o in runs.items()},
        pgd20_images_per_second={name: config['batch'] / s for name, s in medians(attacks).items()},
        ratios={what: ratio(o) for what, o in runs.items()},
        square_outside_the_network=outside_the_network(config['square'], seed),
    )
    about = dict(experiment='benchmarks', benchmark='scores', config=config, seed=seed, **with_peers(provenance()))
    seconds = round(time.time() - start, 1)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(about | dict(runs=runs) | res | dict(seconds=seconds), indent=1) + '\n')
    for name, value in res.items():
        print(name, value)


if __name__ == '__main__':
    main(*map(Path, sys.argv[1:2]))
