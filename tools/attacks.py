"""The published ResNet-20 under every attack, on real sets, and the check for masked gradients.

python tools/attacks.py      # needs CIFAR-10, CIFAR-100 and dtd10 on this disk; about five minutes on 2 cores

It writes results/published/.
"""

import time
import warnings

import torch
from published import learner, record
from tqdm import tqdm

from aoe_nb.data import inliers, unseen
from aoe_nb.energy import energy, max_logit
from aoe_nb.evaluation import log_msp, standard_attacks

n_in = 1000
n_out = 100
eps = 1 / 255
scores = dict(energy=energy, msp=log_msp, max_logit=max_logit)


def some(images, n):
    "`n` of `images`, always the same"
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images.take(order[:n])


def attacked(learn, sets, known):
    "One row for each set, score and attack"
    rows = []
    for score, func in tqdm(scores.items(), unit='score'):
        for name, attack in standard_attacks(eps).items():
            report = learn.ood_report(sets, func, attack, inliers=known).rename_axis('set').reset_index()
            for row in report[['set', 'AUROC', 'FPR95', 'FPR95_ID']].to_dict('records'):
                rows.append(dict(score=score, attack=name, **row))
    return rows


if __name__ == '__main__':
    start = time.time()
    learn = learner()
    known = some(inliers('cifar10', 'test'), n_in)
    sets = {name: some(o, n_out) for name, o in unseen(['cifar100', 'dtd10'], id='cifar10').items()}
    rows = attacked(learn, sets, known)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        check = learn.masking_check(sets['dtd10'], eps=eps, inliers=known)
    config = dict(
        model='resnet20',
        weights='resnet20-12fca82f',
        id='cifar10',
        eps_255=1,
        n_in=n_in,
        n_out=n_out,
        attacked='ood',
    )
    masked = [str(o.message) for o in said if 'masked' in str(o.message)]
    masking = check.reset_index().to_dict('records')
    record('attacks-cifar10', config, start, ood=rows, masking=masking, warnings=masked)
