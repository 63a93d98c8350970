"What a classifier says of photographs that are none of its business: results/published/example.json."

import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from aoe_nb.attack import eval_mode
from aoe_nb.data import inliers
from aoe_nb.energy import energy
from aoe_nb.record import provenance, write_whole
from aoe_nb.sources import fit
from aoe_nb.study.claims import runs_of
from aoe_nb.study.train import load_start, tune

PHOTOGRAPHS = {'flower': 'a flower', 'china': 'a temple'}  # both come with scikit-learn, CC BY


def logits(net, x):
    "Logits of uint8 images (N,3,32,32)"
    with eval_mode(net), torch.no_grad():
        return torch.cat([net(part.float() / 255) for part in x.split(500)])


def crops(name, n=200):
    "`n` square pieces of a photograph, at random places and of four sizes, resized to 32x32"
    photograph = Image.fromarray(load_sample_image(f'{name}.jpg'))
    rng = random.Random(0)
    boxes, pieces = [], []
    for _ in range(n):
        side = rng.choice([64, 128, 256, 400])
        left = rng.randrange(photograph.size[0] - side)
        top = rng.randrange(photograph.size[1] - side)
        boxes.append((left, top, left + side, top + side))
        pieces.append(torch.from_numpy(fit(photograph.crop(boxes[-1]), 32).copy()))
    return boxes, torch.stack(pieces)


def shown(name, what, nets, thresholds, classes):
    "How many crops each network rejects, and the crop that `plain` is surest of among those that only AOE rejects"
    boxes, x = crops(name)
    z = {k: logits(net, x) for k, net in nets.items()}
    rejected = {k: energy(o) > thresholds[k] for k, o in z.items()}
    probability, number = z['plain'].softmax(1).max(1)
    i = int((probability * (rejected['aoe'] & ~rejected['plain'])).argmax())
    said = {
        k: {
            'class': classes[int(o[i].argmax())],
            'probability': round(float(o[i].softmax(0).max()), 4),
            'energy': round(float(energy(o[i : i + 1])), 3),
            'rejected': bool(rejected[k][i]),
        }
        for k, o in z.items()
    }
    share = {k: float(o.float().mean()) for k, o in rejected.items()}
    about = {'name': name, 'what': what, 'box': boxes[i], 'n': len(x), 'rejected': share}
    return about | {'pixels': x[i].permute(1, 2, 0).tolist()} | said


def exposed(config, path=Path('samples/example.pt')):
    "The network that `config` describes, trained once"
    if path.exists():
        net = load_start(config['id'], config['start'])
        net.load_state_dict(torch.load(path, weights_only=True))
        return net
    net = tune(config).model
    path.parent.mkdir(exist_ok=True)
    torch.save(net.state_dict(), path)
    return net


def main():
    start = time.time()
    cell = next(r for r in runs_of('cifar10') if r['method'] == 'aoe' and r['start'] == 'published' and r['seed'] == 0)
    nets = {'plain': load_start('cifar10', 'published'), 'aoe': exposed(cell['config'])}
    known = inliers('cifar10', 'test').take(slice(0, 2000))
    thresholds = {k: float(np.quantile(energy(logits(net, known.x)), 0.95)) for k, net in nets.items()}
    pictures = [shown(name, what, nets, thresholds, known.classes) for name, what in PHOTOGRAPHS.items()]
    about = {'config': cell['config'], 'seed': 0, 'thresholds': thresholds, 'accepts': 0.95, 'n_thresholds': len(known)}
    result = about | {'pictures': pictures} | provenance() | {'seconds': round(time.time() - start, 1)}
    write_whole(Path('results/published/example.json'), json.dumps(result))
    for o in pictures:
        print(o['name'], o['rejected'], o['plain'], o['aoe'])


if __name__ == '__main__':
    main()
