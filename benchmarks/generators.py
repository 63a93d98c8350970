"""How good the generators in weights/ are, inside and outside their latent space: writes results/generate/.

    python benchmarks/generators.py [DATA ...]     # needs CIFAR-10 and CIFAR-100 on this disk; about three minutes for each on 2 cores
"""
import sys, time
from pathlib import Path
import numpy as np, torch
from aoe_nb.attack import FGSM, eval_mode
from aoe_nb.data import inliers
from aoe_nb.energy import energy
from aoe_nb.loaders import pixel_batches
from aoe_nb.peers import _features
from aoe_nb.generate import frechet_distance, generator_path, load_generator, nearest
from aoe_nb.models import imagenet_stats, load_weights, resnet20
from aoe_nb.poster import fixed_subset, load_start, starts
from aoe_nb.record import write_whole
from published import record
from torchvision.utils import save_image

out = Path(__file__).resolve().parent.parent/'results/generate'
sigmas,n,n_near = [.5,1,3,7,20,50],5000,500

def seen(net, images):
    "Features and logits of images, on the CPU"
    with eval_mode(net), torch.no_grad(): z = [_features(net, x) for x in pixel_batches(images, 500)]
    return tuple(map(torch.cat, zip(*z)))

def spread(o):
    "Standard deviation of a pixel among images of one class, root mean square over pixels and classes, in grey levels"
    return float(torch.stack([o.x[o.y == k].float().var(0).mean() for k in o.y.unique()]).mean().sqrt())

def quality(data, net):
    "One row for the test images, as what a perfect generator would score, and one a sigma: features of `net`, classes and energies of the first start for `data`"
    train,test = inliers(data, 'train'),fixed_subset(inliers(data, 'test'), n)
    g,ref = load_generator(generator_path('tiny', data, folder=out.parent.parent/'weights')),seen(net, train)[0]
    judge = load_start(data, starts[data][0])
    def row(o, **about):
        f,z = seen(net, o)[0],seen(judge, o)[1]
        right = float((z.argmax(1) == o.y).float().mean())
        d,i = nearest(o.x[:n_near], train.x)
        return about | dict(frechet=frechet_distance(f, ref), class_consistency=right, spread=spread(o), nearest_pixel=float(d.mean()), nearest_pixel_min=float(d.min()), nearest_feature=float(nearest(f[:n_near], ref)[0].mean()),
            energy_percentiles=np.percentile(energy(z), range(0, 101, 5)).round(3).tolist())
    rows = [row(test, source='test images', sigma=None)]
    for s in sigmas:
        o = g.sample(n, s); rows.append(row(o, source='generator', sigma=s)); print(rows[-1], flush=True)
        if s in (1,7):
            k = min(g.n_classes, 10); grid = g.sample(20*g.n_classes, s).x.unflatten(0, (20,-1))[:,:k].flatten(0, 1)
            save_image(grid.float()/255, out/f'{data}-sigma{s}.png', nrow=k)
    rows.append(row(g.sample(n, 1., blend=.5), source='generator, blend 0.5', sigma=1))
    return rows

def step(data, net, eps=8/255, k=6, m=500):
    "Outliers before and after the AOE step on `net`, a few as images and the energies of `m`; the band of the inliers' energies"
    g,e = load_generator(generator_path('tiny', data, folder=out.parent.parent/'weights')),lambda o: energy(seen(net, o)[1])
    arrays,percentiles,energies = {},{},{}
    for s in 1,3,7,20:
        x = g.sample(m, s, seed=1).x.float()/255
        with eval_mode(net): moved = FGSM(eps)(x, lambda x: energy(net(x)))
        a,b = e(x),e(moved)
        percentiles[f'{s:g}'] = {w: np.percentile(o, range(0, 101, 5)).round(3).tolist() for w,o in dict(before=a, after=b).items()}
        energies[f'{s:g}'] = dict(before=a[:k].tolist(), after=b[:k].tolist())
        arrays |= {f'{w}_{s:g}': (255*o[:k]).round().byte().numpy() for w,o in dict(before=x, after=moved).items()}
    write_whole(out/f'step-{data}.npz', lambda f: np.savez_compressed(f, **arrays))
    return dict(percentiles=percentiles, energy=energies, inlier_percentiles=np.percentile(e(fixed_subset(inliers(data, 'test'), 2000)), range(0, 101, 5)).round(3).tolist())

if __name__ == '__main__':
    out.mkdir(parents=True, exist_ok=True); net = load_weights(resnet20(stats=imagenet_stats), 'resnet20')
    for data in sys.argv[1:] or ['cifar10','cifar100']:
        t = time.time()
        record(f'quality-{data}', dict(data=data, generator=f'gan-tiny-{data}-s0', features='resnet20-12fca82f', classifier=starts[data][0], n=n, n_nearest=n_near), t, 'generate', rows=quality(data, net))
        t,start = time.time(),starts[data][0]
        record(f'step-{data}', dict(data=data, classifier=start, generator=f'gan-tiny-{data}-s0', eps_255=8, n=500), t, 'generate', **step(data, load_start(data, start)))
