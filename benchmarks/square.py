"""Square Attack in L2 beside torchattacks' on the same losses: a ResNet-20 that others trained, and a small network.

python benchmarks/square.py [IMAGES] [QUERIES ...]    # 100 images; 1,000 and 5,000 queries: about an hour on one core

Both make the margin of the right class smaller and never stop early, so that they ask as often. The file,
results/benchmarks/square.json, holds the margins that each left, image by image, and what `stop` saves.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
import torchattacks

from aoe_nb.attack import square
from aoe_nb.data import inliers
from aoe_nb.models import imagenet_stats, load_weights, resnet20, small_cnn
from aoe_nb.record import provenance, write_whole

ROOT = Path(__file__).resolve().parent.parent
config = dict(images=100, queries=[1000, 5000], eps=dict(resnet20=0.5, small_cnn=0.25), weights='resnet20-12fca82f')


def small(x, y, steps=600):
    "A small network, trained for a minute on CIFAR-10"
    torch.manual_seed(0)
    net = small_cnn(3, 10)
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(steps):
        i = torch.randint(len(x), (128,))
        opt.zero_grad()
        F.cross_entropy(net(x[i].float() / 255), y[i]).backward()
        opt.step()
    return net.eval()


def networks():
    "{name: network}, both in eval mode"
    train = inliers('cifar10', 'train')
    published = load_weights(resnet20(stats=imagenet_stats), 'resnet20').eval()
    return dict(resnet20=published, small_cnn=small(train.x, train.y))


def recognised(net, n):
    "The first `n` test images whose class `net` knows, and these classes"
    test = inliers('cifar10', 'test')
    x, y = test.x[: 4 * n].float() / 255, test.y[: 4 * n]
    with torch.no_grad():
        right = (net(x).argmax(1) == y).nonzero()[:n, 0]
    return x[right], y[right]


def margin_of(net, y):
    "By how much the logit of the right class leads"

    def loss(x):
        logits = net(x)
        own = logits.gather(1, y[:, None])[:, 0]
        return own - logits.scatter(1, y[:, None], -torch.inf).max(1).values

    return loss


def theirs(net, x, y, loss, eps, n_queries, seed):
    "torchattacks' L2 update on `loss`; the margin that decides when it stops is kept positive"
    peer = torchattacks.Square(net, norm='L2', eps=eps, n_queries=n_queries)
    peer.init_hyperparam(x)
    peer.margin_and_loss = lambda x, y: (torch.ones(len(x)), loss(x))
    torch.manual_seed(seed)
    return peer.attack_single_run(x, y)[1]


def saved(net, x, eps, n_queries, seed):
    "Seconds until the energy of each image has fallen to the median of all, with `stop` and without"
    seconds = {}

    def loss(x):
        return -net(x).logsumexp(1)

    threshold = loss(x).median().item()
    for name, stop in dict(stop=threshold, through=None).items():
        start = time.perf_counter()
        square(x, loss, eps, n_queries, norm='l2', stop=stop, generator=torch.Generator().manual_seed(seed))
        seconds[name] = time.perf_counter() - start
    return seconds


def compare(net, x, y, eps, n_queries, seed):
    "Margins left by both, their difference and its standard error over images"
    loss = margin_of(net, y)
    gen = torch.Generator().manual_seed(seed)
    ours = loss(square(x, loss, eps, n_queries, norm='l2', generator=gen))
    peer = loss(theirs(net, x, y, loss, eps, n_queries, seed))
    gap = (ours - peer).numpy()
    return dict(
        margins=dict(aoe_nb=ours.tolist(), torchattacks=peer.tolist()),
        mean_margin=dict(clean=loss(x).mean().item(), aoe_nb=ours.mean().item(), torchattacks=peer.mean().item()),
        accuracy_left=dict(aoe_nb=(ours > 0).float().mean().item(), torchattacks=(peer > 0).float().mean().item()),
        difference=float(gap.mean()),
        standard_error=float(gap.std(ddof=1) / len(gap) ** 0.5),
    )


def written(out, seed, images, runs, stops, seconds):
    "Write what is there, whole"
    about = provenance()
    about['versions']['torchattacks'] = version('torchattacks')
    done = [int(q) for q in next(iter(runs.values()))]
    res = dict(experiment='benchmarks', benchmark='square', config=config | dict(images=images, queries=done)) | about
    res |= dict(seed=seed, runs=runs, seconds_to_the_median=stops, seconds=round(seconds, 1))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(res, indent=1) + '\n')


@torch.no_grad()
def main(images=config['images'], queries=config['queries'], seed=0, out=ROOT / 'results/benchmarks/square.json'):
    start = time.time()
    with torch.enable_grad():
        nets = networks()
    shown = {name: recognised(net, images) for name, net in nets.items()}
    eps = config['eps']
    stops = {name: saved(net, shown[name][0], eps[name], min(queries), seed) for name, net in nets.items()}
    runs = {name: {} for name in nets}
    for q in queries:
        for name, net in nets.items():
            found = compare(net, *shown[name], eps[name], q, seed)
            runs[name][str(q)] = found
            print(name, q, {k: v for k, v in found.items() if k != 'margins'}, flush=True)
        written(out, seed, images, runs, stops, time.time() - start)  # the last number of queries takes most of an hour


if __name__ == '__main__':
    numbers = [int(o) for o in sys.argv[1:]]
    main(*numbers[:1], *([numbers[1:]] if numbers[1:] else []))
