"""What AOE on ImageNet-1k should cost on eight GPUs: counted and measured on a CPU, and computed from there.

python benchmarks/imagenet.py             # a ResNet-50 at 224 pixels, 8 + 8 images a step; some minutes on one core
python benchmarks/imagenet.py --repeats 2 --n 4 --out imagenet.json

No part of it ran on a GPU. The prediction takes the published images a second of plain training, and divides them by
what a step of AOE costs in steps of plain training: once as PyTorch counts its operations, and once as it was timed
here. The memory is what autograd keeps for the backward pass, with parameters, gradients and momentum beside it.
results/benchmarks/imagenet.json holds all of it.
"""

import argparse
import io
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from aoe_nb.attack import FGSM, eval_mode, fgsm
from aoe_nb.device import keep_memory
from aoe_nb.energy import energy, uniform_ce
from aoe_nb.record import provenance, write_whole
from fastai.vision.all import FlipItem, Pipeline, PILImage, RandomResizedCrop, ToTensor
from PIL import Image
from sklearn.datasets import load_sample_image
from step_cost import EPS, ByCallback

OUT = Path(__file__).resolve().parent.parent / 'results/benchmarks/imagenet.json'
SIDE, CLASSES = 224, 1000
INLIERS = 1_281_167  # of ImageNet-1k's training set; an epoch has as many outliers
GPUS = 8
WAYS = dict(plain={}, OE=dict(bn='frozen'), AOE=dict(bn='frozen', attack=FGSM(EPS)))
PUBLISHED = dict(
    images_per_second={'1': 2470, '8': 16621},
    hours_for_90_epochs=3,  # on eight, as that page rounds them
    of='training of a ResNet-50 v1.5 in mixed precision',
    on='A100 80GB, by the number of GPUs',
    source='NVIDIA DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5/README.md',
    source_commit='291f0d02e815b148fa5c2b81bf07aa3552142895',
)


# What is computed


def prediction(plain, ratio, inliers=INLIERS):
    "Speed and hours of an epoch where plain training has `plain` images a second and a step costs `ratio` of its steps"
    per_second = plain / ratio
    return dict(inliers_per_second=round(per_second, 1), hours=round(inliers / per_second / 3600, 3))


def gigabytes(memory, inliers, outliers):
    "What a GPU holds at least at the end of a forward pass: weights, gradients, momentum and what backward needs"
    network = memory['weights'] + memory['gradients'] + memory['momentum']
    training = memory['training_a_network'] + memory['training_an_image'] * (inliers + outliers)
    attack = memory['attack_a_network'] + memory['attack_an_image'] * outliers
    return round((network + max(training, attack)) / 1e9, 2)  # the attack is over before training begins


# What is measured


def resnet50(n_out):
    return torchvision.models.resnet50(num_classes=n_out)


def steps(n, repeats):
    "Operations of a step of each way for an inlier, its seconds, and its ratios, turn by turn"
    runs = {way: ByCallback(resnet50, n, SIDE, CLASSES, **settings) for way, settings in WAYS.items()}
    gflop = {way: run.flops() / 1e9 for way, run in runs.items()}  # warms up as well
    turns = {way: [] for way in runs}
    for _ in range(repeats):
        for way, run in runs.items():
            turns[way].append(float(np.median(run.turn())))
        print({way: round(o[-1], 2) for way, o in turns.items()}, flush=True)
    rows = {}
    for way, seconds in turns.items():
        rows[way] = dict(gflop=round(gflop[way], 2), gflop_an_inlier=round(gflop[way] / n, 3))
        rows[way] |= dict(seconds=round(float(np.median(seconds)), 4))
    pairs = {'OE/plain': ('OE', 'plain'), 'AOE/OE': ('AOE', 'OE'), 'AOE/plain': ('AOE', 'plain')}
    ratios = {name: ratio(gflop, turns, *pair) for name, pair in pairs.items()}
    return rows, ratios


def ratio(gflop, turns, one, other):
    low, mid, high = np.percentile(np.divide(turns[one], turns[other]), [25, 50, 75]).round(3).tolist()
    return dict(counted=round(gflop[one] / gflop[other], 4), measured=mid, quartiles=[low, high])


def from_the_law(rows):
    "Seconds of a step, in those that the law of small networks says for its operations"
    law = json.loads(OUT.with_name('scale.json').read_text())['law']
    said = {way: o['seconds_at_one'] * rows[way]['gflop'] ** o['power'] for way, o in law.items()}
    return {way: dict(law=round(o, 3), measured_over_law=round(rows[way]['seconds'] / o, 3)) for way, o in said.items()}


def kept(model, run):
    "Bytes that autograd keeps while `run()` goes forward: each storage once, and none of the network's own"
    own = {o.untyped_storage().data_ptr() for o in [*model.parameters(), *model.buffers()]}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(seen.values())


def kept_by(model, part, n):
    "The same of a pass of training on `n` images, or of an attack on as many, in bfloat16"
    x = torch.rand(n, 3, SIDE, SIDE).to(memory_format=torch.channels_last)

    def logits(x):
        with torch.autocast('cpu', torch.bfloat16):
            return model(x)

    def training():
        out = logits(x).float()
        half = n // 2
        return F.cross_entropy(out[:half], torch.zeros(half, dtype=torch.long)) + uniform_ce(out[half:]).mean()

    def attack():
        return fgsm(x, lambda x: energy(logits(x).float()), EPS)

    with eval_mode(model):  # BatchNorm is frozen in training, too
        return kept(model, dict(training=training, attack=attack)[part])


def memory(n=2):
    "Bytes that depend on the images of a step, and those that do not"
    model = resnet50(CLASSES).to(memory_format=torch.channels_last)
    weights = sum(o.numel() * o.element_size() for o in model.parameters())
    res = dict(
        parameters=sum(o.numel() for o in model.parameters()), weights=weights, gradients=weights, momentum=weights
    )
    for part in 'training', 'attack':
        few, many = (kept_by(model, part, k) for k in (n, 2 * n))
        res[f'{part}_an_image'] = (many - few) // n
        res[f'{part}_a_network'] = 2 * few - many
    return res


def reading(n=100):
    "JPEGs of 500 x 375 pixels that one core opens and crops in a second, as examples/imagenet.py does"
    photo = Image.fromarray(load_sample_image('china.jpg')).resize((500, 375))
    file = io.BytesIO()
    photo.save(file, 'JPEG', quality=90)
    steps = Pipeline([PILImage.create, RandomResizedCrop(SIDE), FlipItem(), ToTensor()], split_idx=0)
    steps(file.getvalue())
    started = time.process_time()
    for _ in range(n):
        steps(file.getvalue())
    return dict(images_per_second_a_core=round(n / (time.process_time() - started), 1), jpeg_bytes=file.tell(), n=n)


def add_reading(out):
    "Measure this alone, and put it and what is published into a file that holds the rest"
    res = json.loads(Path(out).read_text()) | dict(published=PUBLISHED)
    res['reading'] = reading() | provenance()
    write_whole(out, json.dumps(res, indent=1) + '\n')
    print(res['reading'])


def main(n, repeats, out):
    started = time.time()
    keep_memory()
    bytes_ = memory()
    print(bytes_, flush=True)
    rows, ratios = steps(n, repeats)
    config = dict(model='torchvision resnet50', side=SIDE, classes=CLASSES, inliers=n, outliers=n, repeats=repeats)
    config |= dict(eps=EPS, bn='frozen, in plain training that of the batch', precision='float32; memory: bfloat16')
    config |= dict(epoch=dict(inliers=INLIERS, outliers=INLIERS), gpus=GPUS)
    res = dict(experiment='benchmarks', benchmark='imagenet', config=config, seed=0, **provenance())
    res |= dict(steps=rows, ratios=ratios, law=from_the_law(rows), bytes=bytes_, published=PUBLISHED)
    plain = PUBLISHED['images_per_second'][str(GPUS)]
    res['predicted'] = {
        name: {kind: prediction(plain, ratios[f'{way}/plain'][kind]) for kind in ('counted', 'measured')}
        for name, way in (('OE', 'OE'), ('AOE', 'AOE'))
    }
    res['predicted']['plain'] = prediction(plain, 1)
    sizes = {f'{k} + {k} in all': k // GPUS for k in (256, GPUS * 256)}
    res['gigabytes_a_gpu'] = {name: gigabytes(bytes_, k, k) for name, k in sizes.items()}
    res |= dict(reading=reading())
    res |= dict(on_gpus='not measured', seconds=round(time.time() - started, 1))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(res, indent=1) + '\n')
    print(json.dumps({k: res[k] for k in ('ratios', 'law', 'predicted', 'gigabytes_a_gpu')}, indent=1))


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--n', type=int, default=8, help='inliers in a batch, and outliers')
    parser.add_argument('--repeats', type=int, default=4)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--reading', action='store_true', help='measure only how fast files are read, and add it')
    parser.add_argument('--out', default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.reading:
        add_reading(args.out)
    else:
        main(args.n, args.repeats, args.out)
