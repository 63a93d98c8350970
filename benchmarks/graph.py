"""What a detector's graph costs over its bare network, as .onnx in onnxruntime and as .pt2 in torch.

The bare network is exported the same way, from the same bytes to logits. The graph gives class, probability, score,
p-value and flag beside 5,000 known scores. The cost is measured twice, in one thread: as the median ratio over pairs of
neighbours, which is noisy where the cost is small, and directly: both with a network that only copies ten pixels.
The file, results/benchmarks/graph.json, holds every repetition.
"""

import json
import os
import sys
import time
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
import torch
from fastai.learner import Learner

from aoe_nb.graph import Graph
from aoe_nb.images import Images
from aoe_nb.models import get_logits, resnet20
from aoe_nb.record import provenance

ROOT = Path(__file__).resolve().parent.parent
config = dict(model='resnet20', shape=[3, 32, 32], batch=64, known=5000, repeats=100, threads=1)


def detector(c, seed):
    "A network that nobody trained, with known scores of random images"
    torch.manual_seed(seed)
    n = c['known'] + 64
    images = Images(torch.randint(256, (n, *c['shape']), dtype=torch.uint8), torch.arange(n) % 10, list('0123456789'))
    learn = Learner(images.take(slice(64)).dls(32, valid=images.take(slice(64))), resnet20())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return learn.ood_detector(images.x[64:])


class Bare(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pixels):
        return get_logits(self.net(pixels.float() / 255))


class Stub(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x.flatten(1)[:, :10] * self.scale


def run_onnx(file):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = config['threads']
    session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    return lambda x: session.run(None, {'pixels': x.numpy()})


def run_pt2(file):
    module = torch.export.load(file).module()

    def run(x):
        with torch.no_grad():
            return module(x)

    return run


def exported(module, x, folder):
    "The module by both ways, {kind: function of images}"
    batch = torch.export.Dim('batch', min=1)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, f'{folder}/graph.pt2')
    torch.onnx.export(program, (x,), dynamo=True, verbose=False, input_names=['pixels']).save(f'{folder}/graph.onnx')
    return dict(onnx=run_onnx(f'{folder}/graph.onnx'), pt2=run_pt2(f'{folder}/graph.pt2'))


def alternate(sides, repeats):
    "Seconds of each of `sides`, {name: function}, in turn after ten rounds to warm up, every other round backwards"
    seconds = {name: [] for name in sides}
    sides = list(sides.items())
    for i in range(repeats + 10):
        for name, func in sides[:: -1 if i % 2 else 1]:
            start = time.perf_counter()
            func()
            if i >= 10:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main(out=ROOT / 'results/benchmarks/graph.json', seed=0):
    start = time.time()
    torch.set_num_threads(config['threads'])
    det = detector(config, seed)
    graph = Graph(det)
    x = torch.randint(256, (config['batch'], *config['shape']), dtype=torch.uint8)
    load = os.getloadavg()[0]
    runs = {}
    rest = Graph(det)
    rest.net = Stub().requires_grad_(False)
    modules = dict(bare=Bare(graph.net), graph=graph, empty=Bare(rest.net), rest=rest)
    ready = {}
    for name, module in modules.items():
        with TemporaryDirectory() as folder:
            ready[name] = exported(module, x, folder)
    for kind in 'onnx', 'pt2':
        sides = {name: partial(run[kind], x) for name, run in ready.items()}
        runs[kind] = alternate(sides, config['repeats'])
    medians = {kind: {name: float(np.median(o)) for name, o in run.items()} for kind, run in runs.items()}
    res = dict(
        median_seconds=medians,
        cost={kind: float(np.median(np.divide(run['graph'], run['bare'])) - 1) for kind, run in runs.items()},
        direct_cost={kind: (o['rest'] - o['empty']) / o['bare'] for kind, o in medians.items()},
        load=load,
    )
    about = provenance()
    about['versions'] |= dict(onnxruntime=version('onnxruntime'))
    about = dict(experiment='benchmarks', benchmark='graph', config=config, seed=seed, **about)
    seconds = round(time.time() - start, 1)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(about | dict(runs=runs) | res | dict(seconds=seconds), indent=1) + '\n')
    for name, value in res.items():
        print(name, value)


if __name__ == '__main__':
    main(*map(Path, sys.argv[1:2]))
