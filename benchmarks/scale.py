"""How the cost of a step grows with the network, the image and the classes, and what that says of ImageNet.

python benchmarks/scale.py                  # small networks; on a GPU a ResNet-50 on images of 224 pixels as well
python benchmarks/scale.py --repeats 2 --n 16 --out scale.json

Every case is trained for a few steps of OE and of AOE, in turn, with BatchNorm frozen. The law is fitted to the
small cases alone, by least squares on logarithms: seconds of a step as a power of its floating-point operations,
counted by PyTorch. results/benchmarks/scale.json holds the cases, the law, and how far each case lies from it.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from aoe_nb.attack import FGSM
from aoe_nb.device import keep_memory
from aoe_nb.models import resnet20, resnet32, resnet44, resnet56, wrn40_2
from aoe_nb.record import provenance, write_whole
from step_cost import EPS, ByCallback, added_by, peak

OUT = Path(__file__).resolve().parent.parent / 'results/benchmarks/scale.json'
ON_GPU = torch.cuda.is_available()


def resnet50(n_out):
    import torchvision

    return torchvision.models.resnet50(num_classes=n_out)


# network, side of an image, classes; the last one is predicted, not fitted
CASES = {
    'ResNet-20': (resnet20, 32, 10),
    'ResNet-32': (resnet32, 32, 10),
    'ResNet-44': (resnet44, 32, 10),
    'ResNet-56': (resnet56, 32, 10),
    'WRN-40-2': (wrn40_2, 32, 10),
    'ResNet-20, 100 classes': (resnet20, 32, 100),
    'ResNet-20, 64 pixels': (resnet20, 64, 10),
    'ResNet-50, 224 pixels': (resnet50, 224, 1000),
}
PREDICTED = 'ResNet-50, 224 pixels'
WAYS = dict(OE=None, AOE=FGSM(EPS))


def measured(name, n, repeats):
    "Seconds of a step of each way, in turn, its operations, and on a GPU the memory that it adds"
    make, side, classes = CASES[name]
    runs = {way: ByCallback(make, n, side, classes, bn='frozen', attack=attack) for way, attack in WAYS.items()}
    gflop = {way: run.flops() / 1e9 for way, run in runs.items()}  # warms up as well
    turns = {way: [] for way in runs}
    for _ in range(repeats):
        for way, run in runs.items():
            turns[way].append(float(np.median(run.turn())))
    ratio = np.percentile(np.divide(turns['AOE'], turns['OE']), [25, 50, 75]).round(3).tolist()
    seconds = {way: float(np.median(o)) for way, o in turns.items()}
    row = dict(side=side, classes=classes, images=2 * n, ratio=ratio[1], quartiles=[ratio[0], ratio[2]])
    for way, run in runs.items():
        row[way] = dict(seconds=round(seconds[way], 5), gflop=round(gflop[way], 3))
        row[way] |= dict(images_per_second=round(2 * n / seconds[way], 1))
        if ON_GPU:  # elsewhere memory that is kept for the next step hides what a step takes; see step_cost.py
            row[way] |= dict(megabytes=round(added_by(run), 1))
    return row


def law_of(rows, way):
    "seconds = seconds_at_one * GFLOP**power, over the small cases, and the largest ratio of a case to it"
    small = [row[way] for name, row in rows.items() if name != PREDICTED]
    gflop, seconds = (np.log([o[key] for o in small]) for key in ('gflop', 'seconds'))
    power, at_one = np.polyfit(gflop, seconds, 1)
    off = np.exp(np.abs(seconds - at_one - power * gflop).max())
    return dict(power=round(float(power), 4), seconds_at_one=float(np.exp(at_one)), off_by_at_most=round(float(off), 3))


def main(n, repeats, cases, out):
    started = time.time()
    keep_memory()
    rows = {}
    for name in cases:
        rows[name] = measured(name, n, repeats)
        print(f'{name:24}{rows[name]["OE"]["seconds"]:9.4f}{rows[name]["AOE"]["seconds"]:9.4f} s', flush=True)
    config = dict(inliers=n, outliers=n, repeats=repeats, eps=EPS, bn='frozen', precision='float32')
    res = dict(experiment='benchmarks', benchmark='scale', config=config, seed=0, **provenance(), cases=rows)
    res |= dict(law={way: law_of(rows, way) for way in WAYS}, peak_gflop_per_second=round(peak() / 1e9, 1))
    res |= dict(seconds=round(time.time() - started, 1))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(res, indent=1) + '\n')
    print(json.dumps(res['law'], indent=1))


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--n', type=int, default=64, help='inliers in a batch, and outliers')
    parser.add_argument('--repeats', type=int, default=8)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--cases', nargs='+', choices=list(CASES))
    parser.add_argument('--out', default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    small = [name for name in CASES if ON_GPU or name != PREDICTED]
    main(args.n, args.repeats, args.cases or small, args.out)
