"""How good the generators in weights/ are, inside and outside their latent space.

python tools/generators.py [DATA ...]

It needs CIFAR-10 and CIFAR-100 on this disk and takes about three minutes for each on 2 cores.
It writes results/generate/.
"""

import sys
import time

import numpy as np
import torch
from published import ROOT, record
from torchvision.utils import save_image

from aoe_nb.attack import FGSM, eval_mode
from aoe_nb.data import inliers
from aoe_nb.energy import energy
from aoe_nb.generate import frechet_distance, generator_path, load_generator, nearest
from aoe_nb.stream import pixel_batches
from aoe_nb.models import imagenet_stats, load_weights, resnet20
from aoe_nb.peers import _features
from aoe_nb.record import write_whole
from aoe_nb.stream import pixel_batches
from aoe_nb.study.protocol import starts
from aoe_nb.study.train import fixed_subset, load_start

out = ROOT / 'results/generate'
sigmas = [0.5, 1, 3, 7, 20, 50]
n = 5000
n_near = 500


def seen(net, images):
    "Features and logits of images, on the CPU"
    with eval_mode(net), torch.no_grad():
        batches = [_features(net, x) for x in pixel_batches(images, 500)]
    return tuple(map(torch.cat, zip(*batches)))


def energies(net, images):
    return energy(seen(net, images)[1])


def percentiles(values):
    return np.percentile(values, range(0, 101, 5)).round(3).tolist()


def generator_of(data):
    return load_generator(generator_path('tiny', data, folder=ROOT / 'weights'))


def spread(images):
    "Standard deviation of a pixel among images of one class, root mean square over pixels and classes, in grey levels"
    variances = [images.x[images.y == k].float().var(0).mean() for k in images.y.unique()]
    return float(torch.stack(variances).mean().sqrt())


def quality_row(images, train, known, net, judge):
    "How near `images` are to `train`, whose features are `known`, and what the classifier `judge` says of them"
    features = seen(net, images)[0]
    logits = seen(judge, images)[1]
    pixel, _ = nearest(images.x[:n_near], train.x)
    feature, _ = nearest(features[:n_near], known)
    return dict(
        frechet=frechet_distance(features, known),
        class_consistency=float((logits.argmax(1) == images.y).float().mean()),
        spread=spread(images),
        nearest_pixel=float(pixel.mean()),
        nearest_pixel_min=float(pixel.min()),
        nearest_feature=float(feature.mean()),
        energy_percentiles=percentiles(energy(logits)),
    )


def save_grid(generator, sigma, file):
    "Twenty images of each of the first ten classes"
    images = generator.sample(20 * generator.n_classes, sigma).x
    k = min(generator.n_classes, 10)
    grid = images.unflatten(0, (20, -1))[:, :k].flatten(0, 1)
    save_image(grid.float() / 255, file, nrow=k)


def quality(data, net):
    "A row for the test images, which a perfect generator would equal, one for each sigma, one for blended classes"
    train = inliers(data, 'train')
    test = fixed_subset(inliers(data, 'test'), n)
    generator = generator_of(data)
    judge = load_start(data, starts[data][0])
    known = seen(net, train)[0]

    def row(images, source, sigma):
        return dict(source=source, sigma=sigma) | quality_row(images, train, known, net, judge)

    rows = [row(test, 'test images', None)]
    for sigma in sigmas:
        rows.append(row(generator.sample(n, sigma), 'generator', sigma))
        print(rows[-1], flush=True)
        if sigma in (1, 7):
            save_grid(generator, sigma, out / f'{data}-sigma{sigma}.png')
    rows.append(row(generator.sample(n, 1.0, blend=0.5), 'generator, blend 0.5', 1))
    return rows


def step(data, net, eps=8 / 255, n_shown=6, n_measured=500):
    "Outliers before and after the AOE step on `net`, some as images and all as energies, beside the inliers' energies"
    generator = generator_of(data)
    arrays, bands, shown = {}, {}, {}
    for sigma in 1, 3, 7, 20:
        before = generator.sample(n_measured, sigma, seed=1).x.float() / 255
        with eval_mode(net):
            after = FGSM(eps)(before, lambda x: energy(net(x)))
        bands[f'{sigma:g}'], shown[f'{sigma:g}'] = {}, {}
        for when, images in dict(before=before, after=after).items():
            e = energies(net, images)
            bands[f'{sigma:g}'][when] = percentiles(e)
            shown[f'{sigma:g}'][when] = e[:n_shown].tolist()
            arrays[f'{when}_{sigma:g}'] = (255 * images[:n_shown]).round().byte().numpy()
    write_whole(out / f'step-{data}.npz', lambda f: np.savez_compressed(f, **arrays))
    known = fixed_subset(inliers(data, 'test'), 2000)
    return dict(percentiles=bands, energy=shown, inlier_percentiles=percentiles(energies(net, known)))


if __name__ == '__main__':
    out.mkdir(parents=True, exist_ok=True)
    net = load_weights(resnet20(stats=imagenet_stats), 'resnet20')
    for data in sys.argv[1:] or ['cifar10', 'cifar100']:
        first = starts[data][0]
        about = dict(data=data, generator=f'gan-tiny-{data}-s0', classifier=first)
        began = time.time()
        config = about | dict(features='resnet20-12fca82f', n=n, n_nearest=n_near)
        record(f'quality-{data}', config, began, 'generate', rows=quality(data, net))
        began = time.time()
        config = about | dict(eps_255=8, n=500)
        record(f'step-{data}', config, began, 'generate', **step(data, load_start(data, first)))
