"""How good the generators in weights/ are, inside and outside their latent space: writes results/generate/.

    python benchmarks/generators.py [DATA ...]     # needs CIFAR-10 and CIFAR-100 on this disk; about three minutes for each on 2 cores
"""
import hashlib, json, sys, time
from pathlib import Path
import numpy as np, torch
from aoe_nb.attack import FGSM, eval_mode
from aoe_nb.data import inliers
from aoe_nb.energy import energy
from aoe_nb.evaluation import _features, pixel_batches
from aoe_nb.generate import frechet_distance, generator_path, load_generator, nearest
from aoe_nb.models import imagenet_stats, load_weights, resnet20
from aoe_nb.poster import fixed_subset
from aoe_nb.sources import provenance, write_whole
from torchvision.utils import save_image

out = Path(__file__).resolve().parent.parent/'results/generate'
sigmas,n,n_near = [.5,1,3,7,20,50],5000,500

def seen(net, images):
    "Features and logits of images, on the CPU"
    with eval_mode(net), torch.no_grad(): z = [_features(net, x) for x in pixel_batches(images, 500)]
    return tuple(map(torch.cat, zip(*z)))

def quality(data, net):
    "One row for the test images, as what a perfect generator would score, and one a sigma"
    train,test = inliers(data, 'train'),fixed_subset(inliers(data, 'test'), n)
    g,ref = load_generator(generator_path('tiny', data, folder=out.parent.parent/'weights')),seen(net, train)[0]
    near_feats = ref
    def row(o, **about):
        f,z = seen(net, o)
        right = float((z.argmax(1) == o.y).float().mean()) if data == 'cifar10' else None # the classifier knows these classes only
        d,i = nearest(o.x[:n_near], train.x)
        return about | dict(frechet=frechet_distance(f, ref), class_consistency=right, nearest_pixel=float(d.mean()), nearest_pixel_min=float(d.min()), nearest_feature=float(nearest(f[:n_near], near_feats)[0].mean()),
            energy_percentiles=np.percentile(energy(z), range(0, 101, 5)).round(3).tolist())
    rows = [row(test, source='test images', sigma=None)]
    for s in sigmas:
        o = g.sample(n, s); rows.append(row(o, source='generator', sigma=s)); print(rows[-1], flush=True)
        if s in (1,7):
            k = min(g.n_classes, 10); grid = g.sample(20*g.n_classes, s).x.unflatten(0, (20,-1))[:,:k].flatten(0, 1)
            save_image(grid.float()/255, out/f'{data}-sigma{s}.png', nrow=k)
    rows.append(row(g.sample(n, 1., blend=.5), source='generator, blend 0.5', sigma=1))
    return rows

if __name__ == '__main__':
    out.mkdir(parents=True, exist_ok=True); net = load_weights(resnet20(stats=imagenet_stats), 'resnet20')
    for data in sys.argv[1:] or ['cifar10','cifar100']:
        t = time.time()
        write_whole(out/f'quality-{data}.json', json.dumps(dict(config=dict(data=data, generator=f'gan-tiny-{data}-s0', features='resnet20-12fca82f', n=n, n_nearest=n_near), seed=0, **(rows := dict(rows=quality(data, net))), **provenance(), seconds=round(time.time()-t, 1)), indent=1))
