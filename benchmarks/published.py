"""The published ResNet-20 on the real sets, and the audit of these sets: writes results/published/.

    python benchmarks/published.py      # needs CIFAR-10, CIFAR-100 and the sets below on this disk; about two minutes on 2 cores
"""
import json, time
from pathlib import Path
from aoe_nb.audit import audit
from aoe_nb.data import inliers, outliers, unseen
import aoe_nb.evaluation
from aoe_nb.models import imagenet_stats, load_weights, resnet20
from aoe_nb.record import provenance
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.callback.all import *

sets = 'cifar100','tinyimagenet','dtd10','notmnist'

def learner():
    "CIFAR-10 and the published ResNet-20, which was trained with ImageNet's mean and std"
    test = inliers('cifar10', 'test')
    return Learner(test.dls(256, valid=test), load_weights(resnet20(stats=imagenet_stats), 'resnet20'), metrics=accuracy)

def record(name, config, t, folder='published', **res):
    "Write a result with what it takes to repeat it"
    out = Path(__file__).resolve().parent.parent/'results'/folder/f'{name}.json'; out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(dict(config=config, seed=0, **provenance(), seconds=round(time.time()-t, 1), **res), indent=1))

if __name__ == '__main__':
    t,learn = time.time(),learner()
    with learn.no_bar(): acc = float(learn.validate()[1])
    report = learn.ood_report(unseen(sets))
    record('resnet20-cifar10', dict(model='resnet20', weights='resnet20-12fca82f', id='cifar10', score='energy', sets=sets), t, id_acc=acc, ood=json.loads(report.rename_axis('set').reset_index().to_json(orient='records')))
    t,known = time.time(),{s: inliers('cifar10', s) for s in ('train','test')}
    for s,o in known.items(): o.name = f'cifar10 {s}'
    table = audit(known, outliers('tinyimagenet_aux'), unseen(sets))
    record('audit-cifar10', dict(id='cifar10', exposed='tinyimagenet_aux', sets=sets), t, table=table.to_dict('records'))
