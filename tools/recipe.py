"""Is exposure safe on few images? Seven ways to train on five small tasks, in equal numbers of steps.

python tools/recipe.py      # needs CIFAR-10, tinyimagenet and dtd10 on this disk

It writes results/recipe/, one JSON a run, and skips what is there. One thread, about 40 minutes on an idle core.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np
import timm
import torch
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.all import CrossEntropyLossFlat, Learner, create_head, imagenet_stats, vision_learner
from PIL import Image, ImageDraw
from torch import nn

from aoe_nb import evaluation  # noqa: F401 it gives a Learner `ood_report`
from aoe_nb.attack import FGSM
from aoe_nb.data import Images, inliers, outliers, unseen
from aoe_nb.exposure import OutlierExposure  # noqa: F401 it gives a Learner `expose`
from aoe_nb.models import cifar100_stats, load_weights, resnet20, small_cnn, weights_file
from aoe_nb.record import provenance, write_whole

# what trains from scratch or a start, and what trains without outliers first; the last third has a tenth of the rate
ways = {
    'plain': dict(first=None, then=None),
    'oe': dict(first='oe', then=None),
    'aoe': dict(first='aoe', then=None),
    'plain-plain': dict(first=None, then='plain'),
    'plain-oe': dict(first=None, then='oe'),
    'plain-aoe': dict(first=None, then='aoe'),
    'plain-aoe-inliers': dict(first=None, then='aoe', bn='inliers'),
}
heads = {'resnet10t_nodropout': nn.Dropout, 'resnet10t_nobatchnorm': nn.BatchNorm1d}  # what vision_learner's head lacks
heads['resnet10t_neither'] = nn.Dropout, nn.BatchNorm1d
shapes = dict(epochs=6, bs=16, lr=3e-3, eps_255=8)
tasks = {
    'digits7': dict(network='small_cnn', epochs=30, bs=32, lr=5e-3, eps_255=16),
    'digits7-many': dict(network='small_cnn', epochs=10, bs=32, lr=5e-3, eps_255=16),
    'shapes': dict(network='resnet10t') | shapes,
    'shapes-linear': dict(network='resnet10t_linear') | shapes,
    'cifar4': dict(network='resnet20_cifar100', epochs=6, bs=16, lr=3e-3, eps_255=2),
}
# which part of the head is to blame is asked in two ways
causes = {name.replace('resnet10t_', 'shapes-'): dict(network=name) | shapes for name in heads}
causes['cifar4-head'] = dict(network='resnet20_cifar100_head') | {
    k: v for k, v in tasks['cifar4'].items() if k != 'network'
}


def drawn(kinds, n, seed, side=32):
    "`n` images of each of the shapes `kinds` in any size, place and colours, with noise"
    rng = np.random.RandomState(seed)
    images = []
    for kind in kinds:
        for _ in range(n):
            image = Image.new('RGB', (side, side), tuple(rng.randint(0, 120, 3)))
            ink = tuple(rng.randint(130, 256, 3))
            r = rng.randint(7, 12)
            x, y = rng.randint(r, side - r, 2)
            draw_shape(ImageDraw.Draw(image), kind, x, y, r, ink)
            noisy = np.array(image) + 15 * rng.randn(side, side, 3)
            images.append(torch.tensor(noisy.clip(0, 255).astype('uint8')).permute(2, 0, 1))
    labels = torch.arange(len(kinds)).repeat_interleave(n)
    return Images(torch.stack(images), labels, list(kinds))


def draw_shape(draw, kind, x, y, r, ink):
    "One shape of radius `r` around (x, y)"
    box = (x - r, y - r, x + r, y + r)
    if kind == 'circle':
        draw.ellipse(box, fill=ink)
    elif kind == 'square':
        draw.rectangle(box, fill=ink)
    elif kind == 'triangle':
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=ink)
    elif kind == 'cross':
        draw.rectangle((x - r, y - 2, x + r, y + 2), fill=ink)
        draw.rectangle((x - 2, y - r, x + 2, y + r), fill=ink)
    elif kind == 'ring':
        draw.ellipse(box, outline=ink, width=3)
    elif kind == 'lines':
        for i in range(0, 32, 6):
            draw.line((i, 0, 32 - i, 32), fill=ink, width=2)
    elif kind == 'frame':
        draw.rectangle(box, outline=ink, width=3)
    elif kind == 'moon':
        draw.pieslice(box, 20, 200, fill=ink)
    else:
        raise ValueError(f'unknown shape {kind!r}')


def some(images, n, seed):
    "`n` of `images` at random"
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.take(order[:n])


def classes_of(images, classes, n, seed):
    "`n` images of each of the `classes`, numbered anew"
    parts = [some(images.take((images.y == c).nonzero()[:, 0]), n, seed) for c in classes]
    labels = torch.cat([torch.full((len(o),), i) for i, o in enumerate(parts)])
    return Images(torch.cat([o.x for o in parts]), labels, [images.classes[c] for c in classes])


def population(task, seed):
    "Images to train on, to test on, to expose, and the near and far sets that training never sees"
    if task.startswith('digits7'):
        sets = unseen(['digits389', 'flower'], id='digits7')
        known = inliers('digits7'), inliers('digits7', 'test')
        if task == 'digits7-many':  # 800 images of what is else the test
            order = torch.randperm(len(known[1]), generator=torch.Generator().manual_seed(seed))
            known = known[1].take(order[:800]), known[1].take(order[800:])
        return *known, outliers('china'), sets['digits389'], sets['flower']
    if task.startswith('shapes'):
        kinds = 'circle', 'square', 'triangle', 'cross'
        known = drawn(kinds, 60, seed), drawn(kinds, 75, 1000)
        exposed = drawn(['ring', 'lines'], 75, 100 + seed)
        return *known, exposed, drawn(['frame', 'moon'], 150, 1001), unseen(['dtd10'], id='cifar10')['dtd10']
    if task.startswith('cifar4'):
        four, others = [0, 1, 6, 7], [2, 3, 4, 5, 8, 9]
        train, test = inliers('cifar10'), inliers('cifar10', 'test')
        sets = unseen(['tinyimagenet', 'dtd10'], id='cifar10')
        known = classes_of(train, four, 20, seed), classes_of(test, four, 75, 0)
        return *known, some(sets['tinyimagenet'], 150, seed), classes_of(test, others, 50, 0), sets['dtd10']
    raise ValueError(f'unknown task {task!r}')


def learner(config, train, test):
    "The learner of `config`, as it starts"
    stats = None if train.x.shape[1] == 1 or config['network'].startswith('resnet20') else imagenet_stats
    dls = train.dls(config['bs'], valid=test, seed=config['seed'], normalize=stats)
    set_seed(config['seed'])
    loss = CrossEntropyLossFlat()
    if config['network'] == 'resnet10t' or config['network'] in heads:
        learn = vision_learner(dls, 'resnet10t', pretrained=False, normalize=False, loss_func=loss, metrics=accuracy)
        without = heads.get(config['network'], ())
        for i, layer in enumerate(learn.model[1]):
            if isinstance(layer, without):
                learn.model[1][i] = nn.Identity()
        return learn
    if config['network'] == 'resnet10t_linear':
        model = timm.create_model('resnet10t', num_classes=dls.c)
    elif config['network'] == 'small_cnn':
        model = small_cnn(train.x.shape[1], dls.c)
    else:
        model = resnet20(100, cifar100_stats)
        load_weights(model, weights_file('start-resnet20-cifar100-s1.pt'))
        model[1].linear = nn.Linear(64, dls.c)
        if config['network'].endswith('_head'):  # as `vision_learner` puts it onto a body
            net = model[1]
            body = model[0], net.conv1, net.bn1, nn.ReLU(), net.layer1, net.layer2, net.layer3
            model = nn.Sequential(nn.Sequential(*body), create_head(64, dls.c))
    return Learner(dls, model, loss_func=loss, metrics=accuracy)


def stage(learn, config, way, exposed, epochs, lr, bn):
    "Train for `epochs`, with outliers if `way` says so"
    if way in ('oe', 'aoe'):
        attack = FGSM(config['eps_255'] / 255) if way == 'aoe' else None
        learn.expose(exposed, lam=config['lam'], attack=attack, bn=bn, seed=config['seed'])
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, lr)
    learn.unexpose()


def measured(learn, config, test, near, far):
    "Accuracy and detection on sets that training did not see, clean and after one step"
    sets = dict(near=some(near, 200, 0), far=some(far, 200, 0))
    for group, images in sets.items():
        images.group = group
    rows = []
    for name, attack in (('none', None), ('fgsm', FGSM(config['eps_255'] / 255))):
        report = learn.ood_report(sets, attack=attack, inliers=test)
        for row in report.loc[list(sets)].rename_axis('set').reset_index().to_dict('records'):
            rows.append(row | dict(attack=name, eps_255=config['eps_255'] if attack else 0))
    return dict(id_acc=report.attrs['id']['accuracy'], id_report=report.attrs['id'], ood=rows)


def run(config):
    "Train and measure what `config` describes"
    train, test, exposed, near, far = population(config['task'], config['seed'])
    learn = learner(config, train, test)
    way = ways[config['way']]
    total = config['epochs']
    first = total - total // 3 if way['then'] else total
    stage(learn, config, way['first'], exposed, first, config['lr'], 'inliers')
    if way['then']:
        stage(learn, config, way['then'], exposed, total - first, config['lr'] / 10, way.get('bn', 'frozen'))
    found = measured(learn, config, test, near, far)
    about = dict(n_train=len(train), n_exposed=len(exposed), n_classes=learn.dls.c)
    return about | dict(steps=total * len(learn.dls.train)) | found


def main(names, seeds, out):
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    for seed in range(seeds):
        for task in names:
            for way in ('plain', 'aoe') if task in causes else ways:
                config = dict(task=task, way=way, seed=seed, lam=0.5) | (tasks | causes)[task]
                path = Path(out) / f'{task}-{config["network"]}-{way}-s{seed}.json'
                if path.exists():
                    continue
                start = time.time()
                about = dict(experiment='recipe', method=way, id=task, start=config['network'], seed=seed)
                result = about | dict(config=config, **provenance(), **run(config))
                result['seconds'] = round(time.time() - start, 1)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, json.dumps(result, indent=1, default=float))
                auroc = [f'{o["AUROC"]:.3f}' for o in result['ood']]
                print(path.name, f'{result["id_acc"]:.3f}', auroc, f'{result["seconds"]} s', flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('tasks', nargs='*', default=[*tasks, *causes], help='which of them; default: all')
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--out', default='results/recipe')
    args = parser.parse_args()
    main(args.tasks, args.seeds, args.out)
