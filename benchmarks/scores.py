"""Time of a report's metrics on a million scores beside pytorch-ood's, and of PGD-20 beside torchattacks', into results/benchmarks/scores.json.

Both sides alternate, on the same numbers, model, batch and machine; the file holds every repetition, and the ratio is the median over pairs of neighbours."""
import json, sys, time
from importlib.metadata import version
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from aoe_nb.attack import pgd
from aoe_nb.metrics import ood_metrics
from aoe_nb.models import small_cnn
from aoe_nb.record import provenance
import torchattacks
from pytorch_ood.metrics import AUPR, AUROC, FPRAtTPR, MetricCollection

ROOT = Path(__file__).resolve().parent.parent
config = dict(scores=1_000_000, batch=128, shape=[3,32,32], model='small_cnn(3, 10)', eps_255=8, alpha_255=2, steps=20, repeats=15)

def alternate(sides, repeats, wait=lambda: None):
    "Seconds of each of `sides`, {name: function}, taken in turn after one round to warm up"
    res = {k: [] for k in sides}
    for i in range(repeats+1):
        for k,f in sides.items():
            wait(); t = time.perf_counter(); f(); wait()
            if i: res[k].append(time.perf_counter()-t)
    return res

def metric_sides(n, seed):
    "Metrics from two vectors, as a report needs them; the peer gets one vector and labels, ready made"
    rng = np.random.default_rng(seed)
    s_in,s_out = torch.tensor(rng.normal(0, 1, n//2), dtype=torch.float32),torch.tensor(rng.normal(1, 1, n//2), dtype=torch.float32)
    s,y = torch.cat([s_in, s_out]),torch.cat([torch.zeros(n//2), -torch.ones(n//2)]).long()
    def peer(): m = MetricCollection([AUROC(), AUPR('id'), AUPR('ood'), FPRAtTPR(.95)]); m.update(scores=s, labels=y); return m.compute()
    return {'aoe_nb': lambda: ood_metrics(s_in, s_out), 'pytorch-ood': peer}

def attack_sides(c, device, seed):
    torch.manual_seed(seed)
    net = small_cnn(3, 10).to(device).eval()
    x,y = torch.rand(c['batch'], *c['shape'], device=device),torch.randint(10, (c['batch'],), device=device)
    peer = torchattacks.PGD(net, eps=c['eps_255']/255, alpha=c['alpha_255']/255, steps=c['steps'], random_start=True)
    def ours(): return pgd(x, lambda x: -F.cross_entropy(net(x), y, reduction='none'), c['eps_255']/255, c['steps'], alpha=c['alpha_255']/255)
    return {'aoe_nb': ours, 'torchattacks': lambda: peer(x, y)}

def main(out=ROOT/'results/benchmarks/scores.json', seed=0):
    start,device = time.time(),'cuda' if torch.cuda.is_available() else 'cpu'
    metrics = alternate(metric_sides(config['scores'], seed), config['repeats'])
    attacks = alternate(attack_sides(config, device, seed), config['repeats'], torch.cuda.synchronize if device == 'cuda' else lambda: None)
    med = {k: {n: float(np.median(v)) for n,v in o.items()} for k,o in dict(metrics=metrics, pgd20=attacks).items()}
    res = dict(experiment='benchmarks', benchmark='scores', config=config, seed=seed, **(p := provenance()) | dict(versions=p['versions'] | {o: version(o) for o in ('pytorch-ood','torchattacks')}),
        runs=dict(metrics=metrics, pgd20=attacks), median_seconds=med,
        pgd20_images_per_second={k: config['batch']/v for k,v in med['pgd20'].items()},
        ratios={k: float(np.median(np.divide(*reversed(list(o.values()))))) for k,o in dict(metrics=metrics, pgd20=attacks).items()}, # peer : aoe_nb
        seconds=round(time.time()-start, 1))
    Path(out).parent.mkdir(parents=True, exist_ok=True); Path(out).write_text(json.dumps(res, indent=1)+'\n')
    for k in 'median_seconds','pgd20_images_per_second','ratios': print(k, res[k])

if __name__ == '__main__': main(*map(Path, sys.argv[1:2]))
