"""Fine-tune a trained classifier beside outliers, on folders in ImageNet's layout, on one GPU or many.

torchrun --nproc_per_node 8 examples/imagenet.py /data/imagenet /data/outliers runs/first
python examples/imagenet.py /data/imagenet /data/outliers runs/first    # one GPU, or a CPU

The first folder has train/CLASS/*.JPEG and val/CLASS/*.JPEG; the second has images of none of these classes, at any
depth. After a kill the same command goes on with the epoch that was not finished. In the end the third folder holds
weights.pth, detector.safetensors and a checkpoint of each epoch. Several GPUs need accelerate beside the library.
"""

import argparse
import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torchvision
from fastai.callback.fp16 import AMPMode
from fastai.callback.tracker import SaveModelCallback
from fastai.torch_core import rank_distrib, set_seed
from fastai.vision.all import (
    SGD,
    FlipItem,
    ImageDataLoaders,
    Learner,
    Normalize,
    RandomResizedCrop,
    accuracy,
    imagenet_stats,
)

import aoe_nb.detector  # noqa: F401 gives a learner `ood_detector`
import aoe_nb.exposure  # noqa: F401 gives it `expose` and `resume`
from aoe_nb.attack import FGSM
from aoe_nb.device import DeviceMixedPrecision
from aoe_nb.record import check_writable

RANKS = max(1, int(os.environ.get('WORLD_SIZE', 1)))


def refuse(cause, remedy):
    raise SystemExit(f'imagenet.py: {cause}: {remedy}')


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('data', type=Path, help='train/CLASS/*.JPEG and val/CLASS/*.JPEG')
    parser.add_argument('outliers', type=Path, help='images of none of these classes')
    parser.add_argument('out', type=Path, help='for checkpoints, weights and detector')
    parser.add_argument('--arch', default='resnet50', help='a classifier of torchvision')
    parser.add_argument('--weights', default='DEFAULT', help="torchvision's name, a file, or none to try the command")
    parser.add_argument('--epochs', type=int, default=1)
    parser.add_argument('--bs', type=int, default=256, help='inliers of a step, of all processes together')
    parser.add_argument('--lr', type=float, default=0.01)
    parser.add_argument('--eps', type=float, default=8, help='step of the attack, in grey levels of 255; 0: none')
    parser.add_argument('--lam', type=float, default=0.5, help='weight of the outliers in the loss')
    parser.add_argument('--size', type=int, default=224, help='side of an image')
    parser.add_argument('--workers', type=int, default=4, help='of a process for inliers, as many again for outliers')
    return parser.parse_args(argv)


def classes_in(folder):
    return sorted(o.name for o in folder.iterdir() if o.is_dir())


def check(args):
    "Refuse in one line what would fail later"
    for folder in args.data / 'train', args.data / 'val', args.outliers:
        if not folder.is_dir():
            refuse(
                f'there is no folder {folder}', 'give DATA with train/CLASS/*.JPEG and val/CLASS/*.JPEG, OUTLIERS, OUT'
            )
    names = classes_in(args.data / 'train')
    if not names or names != classes_in(args.data / 'val'):
        refuse('train and val have not the same classes', 'sort the images of both into one folder a class')
    if args.bs % RANKS or args.bs < RANKS:
        near = RANKS * max(1, round(args.bs / RANKS))
        refuse(f'--bs {args.bs} cannot be shared by {RANKS} processes', f'take --bs {near}')
    if RANKS > 1 and not find_spec('accelerate'):
        refuse('several processes need accelerate', 'pip install accelerate')
    check_writable(args.out)
    return names


def network(arch, weights, n_out):
    "A classifier of torchvision with `n_out` classes and these weights"
    if arch not in torchvision.models.list_models(module=torchvision.models):
        refuse(f'torchvision has no classifier {arch}', 'take one such as resnet50 or convnext_tiny')
    model = torchvision.models.get_model(arch, num_classes=n_out)
    if weights == 'none':
        return model
    known = torchvision.models.get_model_weights(arch)
    if Path(weights).is_file():
        state = torch.load(weights, map_location='cpu', weights_only=True)
    elif weights in known.__members__:
        state = known[weights].get_state_dict(progress=False)
    else:
        refuse(f'{weights} is no file', f'give one, or none, or for {arch} one of {", ".join(known.__members__)}')
    try:
        model.load_state_dict(state)
    except RuntimeError:
        refuse(f'{weights} is not of {arch} with {n_out} classes', 'give weights that were trained on these classes')
    return model


def learner(args, names):
    "A learner of these folders, beside the outliers"
    model = network(args.arch, args.weights, len(names)).to(memory_format=torch.channels_last)
    dls = ImageDataLoaders.from_folder(
        args.data,
        train='train',
        valid='val',
        bs=args.bs // RANKS,
        item_tfms=[RandomResizedCrop(args.size), FlipItem()],  # in validation the crop is the centre
        batch_tfms=Normalize.from_stats(*imagenet_stats),
        num_workers=args.workers,
    )
    cbs = [SaveModelCallback(every_epoch=True, with_opt=True, fname='epoch')]
    if torch.cuda.is_available():
        cbs.append(DeviceMixedPrecision(amp_mode=AMPMode.BF16))
    opt_func = partial(SGD, mom=0.9)
    learn = Learner(dls, model, opt_func=opt_func, metrics=accuracy, cbs=cbs, path=args.out, wd=1e-4)
    attack = FGSM(args.eps / 255) if args.eps else None
    return learn.expose(args.outliers, lam=args.lam, attack=attack, bn='frozen')


def main(argv=None):
    args = arguments(argv)
    names = check(args)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
    set_seed(rank_distrib())
    learn = learner(args, names)
    with learn.ranks_ctx(sync_bn=False, timeout=600):  # frozen statistics need no other process
        done = learn.resume('epoch')
        if done < args.epochs:
            learn.fit_one_cycle(args.epochs, args.lr, start_epoch=done)
    if rank_distrib():
        return None
    learn.remove_cb(SaveModelCallback)  # it kept every epoch, and chose none by the validation images
    detector = learn.ood_detector(bs=args.bs // RANKS)
    known = learn.id_report(bs=args.bs // RANKS)
    torch.save(learn.model.state_dict(), args.out / 'weights.pth')
    detector.save(args.out / 'detector.safetensors')
    print(f'accuracy {known["accuracy"]:.4f} on {known["n"]:,} images of val, epochs trained: {max(done, args.epochs)}')
    print(detector)
    return learn


if __name__ == '__main__':
    main()
