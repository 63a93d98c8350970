"""The published ResNet-20 under every attack, on real sets, and the check for masked gradients: writes results/published/.

    python benchmarks/attacks.py      # needs CIFAR-10, CIFAR-100 and dtd10 on this disk; about five minutes on 2 cores
"""
import time, warnings
from published import learner, record
from aoe_nb.data import inliers, unseen
from aoe_nb.energy import energy, max_logit
from aoe_nb.evaluation import log_msp, standard_attacks
import torch
from tqdm import tqdm

n_in,n_out,eps = 1000,100,1/255
scores = dict(energy=energy, msp=log_msp, max_logit=max_logit)

def some(o, n):
    "`n` images of `o`, always the same"
    return o.take(torch.randperm(len(o), generator=torch.Generator().manual_seed(0))[:n])

if __name__ == '__main__':
    t,learn = time.time(),learner()
    s_in,sets = some(inliers('cifar10', 'test'), n_in),{k: some(o, n_out) for k,o in unseen(['cifar100','dtd10'], id='cifar10').items()}
    rows = []
    for score,f in tqdm(scores.items(), unit='score'):
        for name,attack in standard_attacks(eps).items():
            df = learn.ood_report(sets, f, attack, inliers=s_in)
            rows += [dict(score=score, attack=name, **r) for r in df.rename_axis('set').reset_index()[['set','AUROC','FPR95','FPR95_ID']].to_dict('records')]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        check = learn.masking_check(sets['dtd10'], eps=eps, inliers=s_in)
    record('attacks-cifar10', dict(model='resnet20', weights='resnet20-12fca82f', id='cifar10', eps_255=1, n_in=n_in, n_out=n_out, attacked='ood'), t,
        ood=rows, masking=check.reset_index().to_dict('records'), warnings=[str(o.message) for o in said if 'masked' in str(o.message)])
