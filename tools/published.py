"""The published ResNet-20 on the real sets, and the audit of these sets.

python tools/published.py      # needs CIFAR-10, CIFAR-100 and the sets below on this disk; about two minutes on 2 cores

It writes results/published/.
"""

import json
import time
from pathlib import Path

import fastai.callback.all  # noqa: F401  `learn.no_bar` and its like
from fastai.learner import Learner
from fastai.metrics import accuracy

import aoe_nb.evaluation  # noqa: F401  `learn.ood_report`
from aoe_nb.audit import audit
from aoe_nb.data import inliers, outliers, unseen
from aoe_nb.models import imagenet_stats, load_weights, resnet20
from aoe_nb.record import provenance

ROOT = Path(__file__).resolve().parent.parent
sets = ('cifar100', 'tinyimagenet', 'dtd10', 'notmnist')


def learner():
    "CIFAR-10 and the published ResNet-20, which was trained with ImageNet's mean and std"
    test = inliers('cifar10', 'test')
    model = load_weights(resnet20(stats=imagenet_stats), 'resnet20')
    return Learner(test.dls(256, valid=test), model, metrics=accuracy)


def record(name, config, start, folder='published', **res):
    "Write a result with what it takes to repeat it; the work began at `start`"
    out = ROOT / 'results' / folder / f'{name}.json'
    out.parent.mkdir(parents=True, exist_ok=True)
    about = dict(config=config, seed=0, **provenance(), seconds=round(time.time() - start, 1))
    out.write_text(json.dumps(about | res, indent=1))


def report_of_published():
    "Accuracy and the report of the published network"
    start = time.time()
    learn = learner()
    with learn.no_bar():
        acc = float(learn.validate()[1])
    report = learn.ood_report(unseen(sets))
    rows = json.loads(report.rename_axis('set').reset_index().to_json(orient='records'))
    config = dict(model='resnet20', weights='resnet20-12fca82f', id='cifar10', score='energy', sets=sets)
    record('resnet20-cifar10', config, start, id_acc=acc, ood=rows)


def audit_of_sets():
    "What the inliers, the outliers of training and the unseen sets have in common"
    start = time.time()
    known = {split: inliers('cifar10', split) for split in ('train', 'test')}
    for split, images in known.items():
        images.name = f'cifar10 {split}'
    table = audit(known, outliers('tinyimagenet_aux'), unseen(sets))
    config = dict(id='cifar10', exposed='tinyimagenet_aux', sets=sets)
    record('audit-cifar10', config, start, table=table.to_dict('records'))


if __name__ == '__main__':
    report_of_published()
    audit_of_sets()
