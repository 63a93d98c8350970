"""OpenOOD on a folder in miniature: their row, derived a second time from the files alone; files are made here."""

import logging
import warnings
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import Learner
from fastcore.test import test_close as close, test_eq as eq, test_fail as fails
from PIL import Image
from torch import nn

import aoe_nb.openood as room
from aoe_nb import cli
from aoe_nb.attack import PGD
from aoe_nb.data import Images, outliers
from aoe_nb.energy import energy
from aoe_nb.evaluation import on_input
from aoe_nb.models import (
    cifar10_stats,
    load_weights,
    mnist_convnet,
    openood_cifar100_stats,
    resnet18_32x32,
    resnet20,
    wrn40_2,
)
from aoe_nb.openood import (
    openood_learner,
    openood_metrics,
    openood_protocol,
    openood_report,
    openood_row,
    openood_sets,
    openood_table,
)

pytestmark = pytest.mark.filterwarnings('ignore:this is not the benchmark')

CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
MODES = 'RGB', 'L', 'RGBA', 'P'  # as files are


def picture(rng, i, size):
    "A picture of that size (width, height) in one of the modes that files have"
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    im = Image.fromarray(pixels)
    if MODES[i % 4] == 'RGBA':
        im.putalpha(Image.fromarray(pixels[..., 0]))
    return im.convert(MODES[i % 4])


def write(root, id, name, rng, n, labels=None, size=(32, 32)):
    "A set in OpenOOD's layout: images_classic/SET/test/CLASS/NUMBER.png and benchmark_imglist/ID/NAME.txt"
    lines = []
    for i in range(n):
        y = -1 if labels is None else int(labels[i])
        folder = CLASSES[y] if y >= 0 else 'any'
        path = f'{name.split("_")[1]}/{name.split("_")[0]}/{folder}/{i:04}.png'
        (root / 'images_classic' / path).parent.mkdir(parents=True, exist_ok=True)
        picture(rng, i, size).save(root / 'images_classic' / path)
        lines.append(f'{path} {y}\n')
    lists = root / 'benchmark_imglist' / id
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f'{name}.txt').write_text(''.join(lines))


SIZES = dict(cifar100=(32, 32), tin=(64, 64), mnist=(28, 28), svhn=(32, 32), texture=(50, 71), places365=(81, 40))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)
    write(root, 'cifar10', 'test_cifar10', rng, 60, rng.permutation(np.arange(60) % 10))
    write(root, 'cifar10', 'train_cifar10', rng, 60, np.arange(60) % 10)
    write(root, 'cifar10', 'train_tin597', rng, 5, size=(64, 64))
    for k, (name, size) in enumerate(SIZES.items()):
        write(root, 'cifar10', f'test_{name}', rng, 30 + 7 * k, size=size)
    return root


# What OpenOOD does, written down again from its definitions


def seen_by_them(path, size=32, short=32):
    "RGB, short side bilinear, centre; from the documentation of torchvision's transforms, with Pillow alone"
    im = Image.open(path).convert('RGB')
    w, h = im.size
    if min(w, h) != short:
        w, h = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
        im = im.resize((w, h), Image.BILINEAR)
    top, left = round((h - size) / 2), round((w - size) / 2)
    return np.asarray(im.crop((left, top, left + size, top + size)))


def counted(s_in, s_out):
    "(inliers flagged, outliers detected) at each threshold, the highest first"
    s_in, s_out = np.asarray(s_in, float), np.asarray(s_out, float)
    thresholds = sorted({*s_in, *s_out}, reverse=True)
    return [(int((s_in >= t).sum()), int((s_out >= t).sum())) for t in thresholds]


def under(points):
    "The area under points (x, y) that straight lines join"
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in zip(points, points[1:]))


def kept(points):
    "What a ROC curve keeps: both ends, and points where the next step is another than the last"

    def step(i):
        return tuple(b - a for a, b in zip(points[i - 1], points[i]))

    inner = [points[i] for i in range(1, len(points) - 1) if step(i) != step(i + 1)]
    return [points[0], *inner, points[-1]] if len(points) > 2 else points


def by_hand(s_in, s_out):
    "Their four metrics, in [0,1]"
    n, m = len(s_in), len(s_out)
    points = counted(s_in, s_out)
    first = next(fp for fp, tp in kept(points) if tp / m >= 0.95)
    wins = sum((b > a) + (b == a) / 2 for a in s_in for b in s_out)
    pr_out = [(0, 1), *((tp / m, tp / (tp + fp)) for fp, tp in points)]
    swapped = counted(-np.asarray(s_out), -np.asarray(s_in))
    pr_in = [(0, 1), *((tp / n, tp / (tp + fp)) for fp, tp in swapped)]
    return {'FPR@95': first / n, 'AUROC': wins / (n * m), 'AUPR_IN': under(pr_in), 'AUPR_OUT': under(pr_out)}


@pytest.mark.parametrize('ties', [1, 3, 12, 200], ids='{} values'.format)
@pytest.mark.parametrize('sizes', [(1, 1), (40, 20), (73, 211)], ids=str)
def test_metrics_are_theirs_by_definition(ties, sizes):
    rng = np.random.default_rng(ties)
    for _ in range(5):
        s_in = rng.integers(0, ties, sizes[0]) / 8
        s_out = rng.integers(0, ties, sizes[1]) / 8 + rng.integers(0, 3) / 8
        got = openood_metrics(s_in, s_out)
        for name, want in by_hand(s_in, s_out).items():
            assert got[name] / 100 == pytest.approx(want, abs=1e-12), name


def test_a_point_in_the_middle_of_a_straight_run_is_left_out():
    "So their FPR@95 can be larger than the share of inliers at 95% of outliers detected"
    s_out = np.repeat([5, 4, 3, 2, 1, 0], [90, 2, 2, 2, 2, 2])
    s_in = np.repeat([4, 3, 2, 1, 0], [10, 10, 10, 10, 60])
    got = openood_metrics(s_in, s_out)
    assert by_hand(s_in, s_out)['FPR@95'] == got['FPR@95'] / 100 == 0.4
    assert min(fp for fp, tp in counted(s_in, s_out) if tp >= 95) == 30


@pytest.mark.parametrize('ties', [2, 5, 40], ids='{} values'.format)
def test_metrics_know_infinity(ties):
    "A score may be infinite, and only its place in the order counts"
    rng = np.random.default_rng(ties)
    for _ in range(5):
        s_in, s_out = rng.integers(0, ties, 40) / 8, rng.integers(0, ties, 30) / 8
        far_in, far_out = (np.where(s >= (ties - 1) / 8, np.inf, np.where(s == 0, -np.inf, s)) for s in (s_in, s_out))
        eq(openood_metrics(far_in, far_out), openood_metrics(s_in, s_out))


def test_metrics_take_scores_in_any_precision():
    s_in, s_out = torch.arange(8.0, requires_grad=True), torch.arange(3.0, 9)
    want = openood_metrics(s_in.tolist(), s_out.tolist())
    eq(openood_metrics(s_in.bfloat16(), s_out.half()), want)
    eq(openood_metrics(pd.Series(s_in.tolist(), index=range(8, 0, -1)), s_out.numpy()[::-1]), want)
    for name, pair in dict(scores_in=([0, np.nan], [1.0]), scores_out=([0.0], [np.nan, 1])).items():
        fails(lambda: openood_metrics(*pair), contains=f'{name} holds NaN (1 of 2)')


def test_a_report_takes_near_and_far_sets_alone():
    fails(lambda: openood_report([0, 1], dict(a=('near', [1, 2]), b=('neer', [1, 2])), 0.5), contains='near or far: b')
    fails(lambda: openood_report([0, 1], {}, 0.5), contains='near or far: there is none')


# The row

CENTRES = 25.0 * torch.arange(10)


SEEN = []  # images of each pass; told by a logger, since what a network looks up is part of its name in the cache
LOG = logging.getLogger('one pixel')
LOG.setLevel('INFO')
LOG.propagate = False


class Noted(logging.Handler):
    def emit(self, record):
        SEEN.append(record.msg)


LOG.addHandler(Noted())


class OnePixel(nn.Module):
    "The class is the grey level of one pixel in 25s: whole numbers, so that nothing is rounded and much ties"

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        LOG.info(len(x))
        return -self.scale * ((255 * x[:, 0, 9, 16]).round()[:, None] - CENTRES).abs()


def doubt(logits):
    return (-logits.amax(1) / 2).floor()


@pytest.fixture
def learn():
    blank = Images(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [0, 9], name='blank')
    return Learner(blank.dls(2, valid=blank), OnePixel(), loss_func=nn.CrossEntropyLoss())


def from_files(root, name):
    "Scores, predictions and labels of a list, without anything of this library"
    lines = (root / f'benchmark_imglist/cifar10/{name}.txt').read_text().splitlines()
    paths, labels = zip(*(line.split(' ') for line in lines))
    level = np.array([seen_by_them(root / 'images_classic' / o)[9, 16, 0] for o in paths], float)
    distance = np.abs(level[:, None] - 25 * np.arange(10))
    return np.floor(distance.min(1) / 2), distance.argmin(1), np.array(labels, int)


def test_the_row_is_an_independent_computations(root, learn):
    got = learn.openood(root, score=doubt)
    s_in, predicted, labels = from_files(root, 'test_cifar10')
    assert len(np.unique(s_in)) < 20, 'many ties'
    want = {name: by_hand(s_in, from_files(root, f'test_{name}')[0]) for name in SIZES}
    groups = dict(nearood=['cifar100', 'tin'], farood=['mnist', 'svhn', 'texture', 'places365'])
    for mean, names in groups.items():
        want[mean] = {k: sum(want[o][k] for o in names) / len(names) for k in want['tin']}
    eq(list(got.index), ['cifar100', 'tin', 'nearood', 'mnist', 'svhn', 'texture', 'places365', 'farood'])
    eq(list(got.columns)[:5], ['FPR@95', 'AUROC', 'AUPR_IN', 'AUPR_OUT', 'ACC'])
    for name, row in want.items():
        for metric, value in row.items():
            assert got[metric][name] / 100 == pytest.approx(value, abs=1e-12), (name, metric)
    assert (got.ACC == 100 * np.mean(predicted == labels)).all()
    eq(got.n.dropna().tolist(), [30 + 7 * k for k in range(6)])
    row = openood_row(got, 'one pixel')
    assert row == f'| one pixel | {got.AUROC["nearood"]:.2f} | {got.AUROC["farood"]:.2f} | {got.ACC.iloc[0]:.2f} |'


def test_means_over_runs_have_the_populations_sd(root, learn):
    runs = [learn.openood(root, score=doubt) for _ in range(3)]
    for run, auroc in zip(runs, (80.0, 81.0, 85.0)):
        run['AUROC'] = auroc
    table = openood_table(runs)
    assert table.AUROC['nearood'] == f'82.00 ± {(14 / 3) ** 0.5:.2f}'
    assert openood_row(runs).startswith('| ours | 82.00 ± 2.16 | 82.00 ± 2.16 |')


def test_runs_come_in_any_collection_and_are_of_one_kind(root, learn):
    run = learn.openood(root, score=doubt)
    want = openood_row([run, run])
    eq([openood_row((run, run)), openood_row(run for _ in range(2))], [want, want])
    for other in run.drop(index='tin'), run[['AUROC', 'n']], pd.DataFrame():
        for table in openood_table, openood_row:
            fails(lambda: table([run, other]), contains='of one benchmark, score and attack')
    fails(lambda: openood_report([0, 1], dict(a=('near', [1, 2])), 90.0), contains='between 0 and 1, not 90')


@pytest.mark.parametrize('size,short', [(32, 32), (224, 256)])
@pytest.mark.parametrize('shape', [(32, 32), (33, 32), (28, 28), (50, 71), (301, 211), (640, 33)], ids=str)
def test_images_are_seen_as_openood_sees_them(shape, size, short, tmp_path):
    rng = np.random.default_rng(1)
    files = []
    for i in range(4):
        files.append(tmp_path / f'{i}.png')
        picture(rng, i, shape).save(files[-1])
    got = room.Listed('a', 'near', 4, files, [-1] * 4, size, short).images()
    for x, file in zip(got.x, files):
        eq(x.permute(1, 2, 0).numpy(), seen_by_them(file, size, short))
    assert got.y is None


def test_constants_are_theirs():
    eq(cifar10_stats, ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    eq(openood_cifar100_stats, ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)))


def test_the_protocol():
    n = openood_protocol('cifar10').n
    eq(n[['test', 'val', 'val_tin', 'cifar100', 'tin']].tolist(), [9000, 1000, 1000, 9000, 7793])
    eq(n[['mnist', 'svhn', 'texture', 'places365']].tolist(), [70000, 26032, 5640, 35195])
    n = openood_protocol('cifar100').n
    eq(n[['test', 'val_tin', 'cifar10', 'tin', 'places365']].tolist(), [9000, 972, 10000, 6526, 33773])
    table = openood_protocol('imagenet')
    eq(list(table.index), 'test ssb_hard ninco inaturalist textures openimage_o'.split())
    eq(table.n.tolist(), [45000, 49000, 5879, 10000, 5160, 15869])


@pytest.mark.parametrize('id', ['imagenet', 'imagenet200'])
def test_imagenet_is_read_at_its_own_size(id, tmp_path):
    rng = np.random.default_rng(3)
    write(tmp_path, id, f'test_{id}', rng, 3, [0, 1, 2], size=(300, 280))
    for name in 'ssb_hard', 'ninco', 'inaturalist', 'textures', 'openimage_o':
        write(tmp_path, id, f'test_{name}', rng, 2, size=(400, 300))
    (tmp_path / 'images_classic').rename(tmp_path / 'images_largescale')
    sets = openood_sets(tmp_path, id)
    eq([o.group for o in sets.values()], ['split', 'near', 'near', 'far', 'far', 'far'])
    for o in sets.values():
        eq(o.images().x[1].permute(1, 2, 0).numpy(), seen_by_them(o.files[1], 224, 256))


# A user's folder


def copied(root, place):
    "The folder by links, to change its lists"
    (place / 'images_classic').symlink_to(root / 'images_classic')
    (place / 'benchmark_imglist/cifar10').mkdir(parents=True)
    for path in (root / 'benchmark_imglist/cifar10').iterdir():
        (place / 'benchmark_imglist/cifar10' / path.name).write_text(path.read_text())
    return place / 'benchmark_imglist/cifar10'


def test_all_that_is_missing_is_named_before_any_work(root, learn, tmp_path):
    lists = copied(root, tmp_path)
    (lists / 'test_svhn.txt').unlink()
    (lists / 'test_tin.txt').write_text('tin/test/any/0000.png -1\ntin/test/any/none.png -1\n')
    learn.model.register_forward_hook(lambda *_: pytest.fail('the network was asked'))
    with pytest.raises(FileNotFoundError) as e:
        learn.openood(tmp_path)
    said = str(e.value)
    assert 'svhn: there is no list' in said and 'tin: 1 of 2 images of test_tin.txt are missing' in said
    assert 'none.png: fetch tin with' in said
    assert f'download.py --contents datasets --datasets cifar-10 --save_dir {tmp_path}' in said
    fails(lambda: learn.openood(root, id='cifar100'), contains='--datasets cifar-100')


def test_a_miniature_is_told_and_a_whole_one_is_not(root, learn, tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match='not the benchmark.*test 60 of 9,000, cifar100 30 of 9,000'):
        assert not learn.openood(root, score=doubt).attrs['whole']
    table = openood_protocol('cifar10')
    found = openood_sets(root)
    for name, o in found.items():
        table.loc[name, 'n'] = len(o)
    monkeypatch.setattr(room, 'openood_protocol', lambda id: table)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert learn.openood(root, score=doubt).attrs['whole']
    table.loc['svhn', 'n'] -= 1
    with pytest.warns(UserWarning, match=f'svhn {len(found["svhn"])} of {len(found["svhn"]) - 1}'):
        openood_sets(root)


@pytest.mark.parametrize(
    'text,why',
    [
        ('', 'lists no image'),
        ('cifar10/0.png\n', 'a line without a label'),
        ('a b 3\n', "line without a label: 'a b 3'"),
    ],
)
def test_lists_that_are_none(text, why, root, tmp_path):
    lists = copied(root, tmp_path)
    (lists / 'test_tin.txt').write_text(text)
    fails(lambda: openood_sets(tmp_path), contains=why)


def test_lists_as_other_systems_write_them(root, tmp_path):
    "With CRLF, blank lines, spaces at the ends, and a mark in front"
    lists = copied(root, tmp_path)
    want = openood_sets(root)['tin']
    lines = (lists / 'test_tin.txt').read_text().splitlines()
    (lists / 'test_tin.txt').write_bytes(('\ufeff' + '  \r\n\r\n'.join(lines)).encode())
    got = openood_sets(tmp_path)['tin']
    eq((got.labels, [o.name for o in got.files]), (want.labels, [o.name for o in want.files]))
    (lists / 'test_tin.txt').write_text(f'tin/test/any/my photo.png -1\n{lines[0]}')
    fails(lambda: openood_sets(tmp_path), contains='one is a path without spaces, a space, and a whole number')
    (lists / 'test_tin.txt').write_text(''.join(line.replace('/', '\\') + '\n' for line in lines))
    with pytest.raises(FileNotFoundError) as e:
        openood_sets(tmp_path)
    assert f'and {len(lines) - 5} more with scripts' in str(e.value) and len(str(e.value)) < 1000


def test_a_lost_image_is_missed_where_the_others_are(root, tmp_path):
    lists = copied(root, tmp_path)
    (tmp_path / 'images_largescale').symlink_to(root / 'images_classic')
    (tmp_path / 'images_classic').unlink()
    text = (lists / 'test_tin.txt').read_text()
    (lists / 'test_tin.txt').write_text('tin/test/any/none.png -1\n' + text)
    fails(lambda: openood_sets(tmp_path), contains=f'1 of {len(text.splitlines()) + 1} images of test_tin.txt')
    fails(lambda: openood_sets(tmp_path), contains=str(tmp_path / 'images_largescale/tin/test/any/none.png'))


def test_a_folder_may_be_below_home(root, monkeypatch):
    monkeypatch.setenv('HOME', str(root.parent))
    eq(list(openood_sets(f'~/{root.name}', which='test')), ['test'])


def test_sets_are_chosen_by_names_that_there_are(root):
    eq(list(openood_sets(root, which='near')), ['cifar100', 'tin'])
    eq(list(openood_sets(root, which=['tin', 'test'])), ['test', 'tin'])
    fails(lambda: openood_sets(root, which=['test', 'nearby']), contains="has no set 'nearby': choose from split, val")


class Odd(nn.Module):
    "Gives `value` for bright images"

    def __init__(self, value):
        super().__init__()
        self.net = OnePixel()
        self.value = value

    def forward(self, x):
        return torch.where((x[:, :1, 9, 16] > 0.5), self.value, self.net(x))


def test_a_network_that_is_nan_is_found_at_once_and_infinity_is_ranked(root, learn, monkeypatch):
    learn.model = Odd(torch.inf)
    assert learn.openood(root, score='max_logit').AUROC.between(0, 100).all()
    learn.model = Odd(torch.nan)
    monkeypatch.setattr(room, '_in_pieces', _in_tens)
    n = len(SEEN)
    with pytest.raises(ValueError, match=r'^test holds NaN \(\d+ of 10 scores, the first of .*/test/\w+/\d+.png'):
        learn.openood(root)
    eq(SEEN[n:], [1, 10])


def test_a_network_of_more_classes_is_doubted(root, learn):
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 100))
    with pytest.warns(UserWarning, match='the network gives 100 classes, the benchmark has 10'):
        learn.openood(root)
    learn.model = nn.Conv2d(1, 10, 3)
    fails(lambda: learn.openood(root), contains='the network does not take images of 3x32x32')


def test_a_network_of_another_benchmark_is_refused_on_one_image(root, learn):
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))
    fails(lambda: learn.openood(root), contains='gives 4 classes, the inliers have labels up to 9')
    fails(lambda: learn.openood(root, attacked='out'), contains='one of ood, id, both')
    fails(lambda: learn.openood(root, 'cifar'), contains='choose from cifar10, cifar100')


def test_classes_go_by_the_names_of_the_folders_where_the_learner_has_them(root):
    order = np.random.default_rng(2).permutation(10)
    blank = Images(torch.zeros(10, 3, 32, 32, dtype=torch.uint8), range(10), [CLASSES[i] for i in order], 'blank')
    net = nn.Sequential(OnePixel(), Chosen(order))
    learn = Learner(blank.dls(2, valid=blank), net, loss_func=nn.CrossEntropyLoss())
    _, predicted, labels = from_files(root, 'test_cifar10')
    assert learn.openood(root, score=doubt).ACC.iloc[0] == 100 * np.mean(predicted == labels)


class Chosen(nn.Module):
    "The logits in another order"

    def __init__(self, order):
        super().__init__()
        self.order = torch.as_tensor(order)

    def forward(self, x):
        return x[:, self.order]


# Cache and attack


def test_a_run_that_was_stopped_goes_on(root, learn, tmp_path, monkeypatch):
    seen = SEEN
    del seen[:]
    want = learn.openood(root, score='msp')
    once = sum(seen)
    real = room.read_images
    monkeypatch.setattr(room, '_in_pieces', _in_tens)
    reads = []

    def stops(*args):
        reads.append(1)
        if len(reads) == 12:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(room, 'read_images', stops)
    with pytest.raises(KeyboardInterrupt):
        learn.openood(root, score='msp', cache=tmp_path / 'kept')
    monkeypatch.setattr(room, 'read_images', real)
    del seen[:]
    got = learn.openood(root, score='msp', cache=tmp_path / 'kept')
    assert sum(seen) == once - 100  # ten whole pieces of ten; the first read was the look at one image
    pd.testing.assert_frame_equal(got, want)
    del seen[:]
    learn.openood(root, score='msp', cache=tmp_path / 'kept')
    assert sum(seen) == 1


in_pieces = room._in_pieces


def _in_tens(listed, bar, f):
    return in_pieces(listed, bar, f, 10)


def test_attacks_meet_the_side_that_they_are_asked_for(root):
    torch.manual_seed(0)
    learn = openood_learner(resnet20(stats=None).state_dict(), arch=resnet20)
    sets = openood_sets(root, which=['test', 'tin'])
    attack = PGD(8 / 255, 2)
    clean = learn.openood(root)
    both = learn.openood(root, attack=attack, attacked='both')
    s_in = learn.ood_scores(sets['test'].images(), attack=attack, sign=-1)
    s_out = learn.ood_scores(sets['tin'].images(), attack=attack)
    assert both.AUROC['tin'] == pytest.approx(openood_metrics(s_in, s_out)['AUROC'], abs=1e-12)
    assert both.AUROC['tin'] < learn.openood(root, attack=attack).AUROC['tin'] < clean.AUROC['tin']
    eq(both.ACC.tolist(), clean.ACC.tolist())
    eq(both.attrs['attacked'], 'both')


# Checkpoints


def theirs(n=10):
    "A state dict as OpenOOD saves it, of its ResNet18_32x32"
    torch.manual_seed(1)
    state = {}

    def conv(name, i, o, k):
        state[f'{name}.weight'] = torch.randn(o, i, k, k) / (i * k * k) ** 0.5

    def norm(name, c):
        state[f'{name}.weight'] = torch.rand(c) + 0.5
        state[f'{name}.bias'] = torch.randn(c) / 10
        state[f'{name}.running_mean'] = torch.randn(c) / 10
        state[f'{name}.running_var'] = torch.rand(c) + 0.5
        state[f'{name}.num_batches_tracked'] = torch.tensor(7)

    conv('conv1', 3, 64, 3)
    norm('bn1', 64)
    c_in = 64
    for stage, c in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            name = f'layer{stage}.{block}'
            conv(f'{name}.conv1', c_in, c, 3)
            norm(f'{name}.bn1', c)
            conv(f'{name}.conv2', c, c, 3)
            norm(f'{name}.bn2', c)
            if c_in != c:
                conv(f'{name}.shortcut.0', c_in, c, 1)
                norm(f'{name}.shortcut.1', c)
            c_in = c
    state['fc.weight'] = torch.randn(n, 512) / 20
    state['fc.bias'] = torch.randn(n) / 20
    return state


def run_by_hand(w, x):
    "ResNet18_32x32 from its weights alone"

    def conv(name, x, stride=1):
        k = w[f'{name}.weight']
        return nn.functional.conv2d(x, k, stride=stride, padding=k.shape[-1] // 2)

    def norm(name, x):
        return nn.functional.batch_norm(
            x, *(w[f'{name}.{o}'] for o in ('running_mean', 'running_var', 'weight', 'bias'))
        )

    x = norm('bn1', conv('conv1', x)).relu()
    for stage in range(1, 5):
        for block in range(2):
            name = f'layer{stage}.{block}'
            stride = 2 if stage > 1 and not block else 1
            y = norm(f'{name}.bn1', conv(f'{name}.conv1', x, stride)).relu()
            y = norm(f'{name}.bn2', conv(f'{name}.conv2', y))
            if f'{name}.shortcut.0.weight' in w:
                x = norm(f'{name}.shortcut.1', conv(f'{name}.shortcut.0', x, stride))
            x = (x + y).relu()
    return x.mean((2, 3)) @ w['fc.weight'].T + w['fc.bias']


@pytest.mark.parametrize('prefix', ['', 'module.', 'backbone.', 'module.backbone.'])
@pytest.mark.parametrize('n,stats', [(10, cifar10_stats), (100, openood_cifar100_stats)])
def test_released_checkpoints_load(prefix, n, stats, tmp_path):
    state = theirs(n)
    torch.save({prefix + k: v for k, v in state.items()}, tmp_path / 'best.ckpt')
    learn = openood_learner(tmp_path / 'best.ckpt', f'cifar{n}')
    x = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(o).view(1, 3, 1, 1) for o in stats)
    want = energy(run_by_hand(state, (x / 255 - mean) / std))
    close(learn.ood_scores(x), want, 1e-4)
    fails(lambda: openood_learner(state, 'cifar10' if n == 100 else 'cifar100'), contains='another number of classes')


def same(model, state):
    own = {name.removeprefix('1.'): o for name, o in model.state_dict().items()}
    return all(torch.equal(own[name], o) for name, o in state.items() if 'tracked' not in name)


@pytest.mark.parametrize('place', ['', 'backbone.', '_orig_mod.', 'module._orig_mod.', 'model.net.'])
def test_checkpoints_go_by_name_whatever_comes_first_in_them(place):
    "In another order, the scale of a normalisation must not become its shift"
    state = theirs()
    shuffled = {place + name: state[name] for name in sorted(state, reverse=True)}
    assert same(load_weights(resnet18_32x32(), shuffled), state)


@pytest.mark.parametrize(
    'keys', ['state_dict', 'model', 'net', 'model_state_dict', 'ema', 'model state_dict', 'ema net']
)
def test_checkpoints_of_a_training_are_unwrapped(keys):
    state = theirs()
    held = state
    for key in reversed(keys.split()):
        held = {key: held, 'epoch': 100, 'optimizer': {'state': {}, 'param_groups': []}, 'loss': torch.tensor(0.1)}
    assert same(load_weights(resnet18_32x32(), held), state)


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path):
    path = tmp_path / 'best.ckpt'
    torch.save(theirs(), path)
    whole = path.read_bytes()
    for content in whole[: len(whole) // 2], b'', b'hello', b'\x80\x02garbage':
        path.write_bytes(content)
        fails(lambda: load_weights(resnet18_32x32(), path), contains=f'{path} cannot be read as a checkpoint')
    for o in nn.Linear(2, 2), dict(epoch=np.float64(3)):
        torch.save(o, path)
        fails(lambda: load_weights(resnet18_32x32(), path), contains='it holds more than tensors, or is damaged')
    for o in [1], torch.zeros(3), dict(state_dict=3), {}, None, dict(model={'a': 1}):
        torch.save(o, path)
        fails(lambda: load_weights(resnet18_32x32(), path), contains=f'{path} has no weights in a {type(o).__name__}')
    fails(lambda: load_weights(resnet18_32x32(), resnet18_32x32()), contains='no weights in a Sequential: give what')
    with pytest.raises(FileNotFoundError, match='no checkpoint'):
        load_weights(resnet18_32x32(), tmp_path)


def test_published_weights_that_cannot_be_had_are_friendly_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise URLError('no net')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    fails(lambda: load_weights(resnet20(), 'resnet20'), contains='resnet20 could not be fetched (URLError')
    place = tmp_path / 'checkpoints/resnet20-12fca82f.th'
    for content in b'', b'hello':
        place.write_bytes(content)
        fails(lambda: load_weights(resnet20(), 'resnet20'), contains=f'{place} is damaged')
    state = resnet20(stats=None).state_dict()
    torch.save({'state_dict': {f'module.{name}': o for name, o in state.items()}}, place)
    assert same(load_weights(resnet20(), 'resnet20'), state)


def test_networks_of_the_zoo_that_cannot_be_had_are_friendly_errors(tmp_path, monkeypatch):
    registry = pytest.importorskip('pytorch_ood.model', reason='pytorch-ood is not installed: no zoo').registry
    from aoe_nb.peers import zoo_model

    name = 'wrn-40-2/cifar10/oe/s0'
    place = tmp_path / 'checkpoints' / registry.get_model_info(name).file_name
    place.parent.mkdir()
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    for content in b'', b'hello':
        place.write_bytes(content)
        fails(lambda: zoo_model(name), contains=f'{place} is damaged')
    state = wrn40_2(stats=None).state_dict()
    torch.save(state, place)
    assert same(zoo_model(name), state)


def test_the_command(root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in range(2):
        torch.manual_seed(k)
        Path(f'runs/s{k}').mkdir(parents=True)
        torch.save(resnet20(stats=None).state_dict(), f'runs/s{k}/best.ckpt')
    cli.aoe_bench('runs', root, arch='resnet20', score='energy')
    said = capsys.readouterr().out
    learners = [openood_learner(f'runs/s{k}/best.ckpt', arch=resnet20) for k in range(2)]
    row = openood_row([learn.openood(root) for learn in learners], 'cifar10-energy')
    assert row in said and '| OE with real outliers (published) | 94.8 | 96.0 | |' in said
    table = pd.read_csv('openood/cifar10-energy.csv', index_col='set')
    assert table.AUROC['nearood'] in row
    cli.aoe_bench('runs/s0/best.ckpt', root, arch='resnet20', eps=8, steps=1, attacked='both')
    assert Path('openood/cifar10-msp-pgd1-8-both.csv').exists()
    with pytest.raises(SystemExit, match='no whole folder of OpenOOD'):
        lists = copied(root, tmp_path)
        (lists / 'test_mnist.txt').unlink()
        cli.aoe_bench('runs', tmp_path, arch='resnet20')


def test_the_command_fits_detectors_and_takes_exports(root, tmp_path, capsys):
    pytest.importorskip('pytorch_ood', reason='pytorch-ood is not installed: nothing to fit')
    torch.manual_seed(0)
    learn = openood_learner(resnet20(stats=None).state_dict(), arch=resnet20)
    learn.export(tmp_path / 'export.pkl')
    torch.save(learn.model.state_dict(), tmp_path / 'own.pt')
    for name in 'export.pkl', 'own.pt':
        cli.aoe_bench(str(tmp_path / name), root, arch='resnet20', score='KNN', out=str(tmp_path / name[:3]))
    with pytest.raises(SystemExit, match="has no detector 'Magic': choose from"):
        cli.aoe_bench(str(tmp_path / 'own.pt'), root, arch='resnet20', score='Magic', out=str(tmp_path / 'own'))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| cifar10-KNN')]
    assert len(rows) == 2 and rows[0] == rows[1]


def test_detectors_of_several_networks_make_one_row(root):
    "A fitted detector has the same name for each network that it is fitted to, and another with other settings"
    pytest.importorskip('pytorch_ood', reason='pytorch-ood is not installed: nothing to fit')
    from aoe_nb.peers import pytorch_ood_score

    train = openood_sets(root, which='train')['train'].images()

    def report(seed, **settings):
        torch.manual_seed(seed)
        learn = openood_learner(resnet20(stats=None).state_dict(), arch=resnet20)
        return learn.openood(root, score=pytorch_ood_score('KNN', learn, train, **settings))

    one, two = report(0), report(1)
    eq((one.attrs['score'], report(0, k=3).attrs['score']), ('KNN', 'KNN(k=3)'))
    mean = (one.AUROC['nearood'] + two.AUROC['nearood']) / 2
    assert openood_row([one, two]).startswith(f'| ours | {mean:.2f} ±')
    fails(lambda: openood_row([one, report(1, k=3)]), contains='of one benchmark, score and attack')


@pytest.mark.parametrize('name', ['ASH', 'DICE', 'WeightedEBO'])
def test_a_detector_that_asks_for_more_says_so(name, root):
    pytest.importorskip('pytorch_ood', reason='pytorch-ood is not installed: nothing to fit')
    from aoe_nb.peers import pytorch_ood_score

    learn = openood_learner(resnet20(stats=None).state_dict(), arch=resnet20)
    train = openood_sets(root, which='train')['train'].images(slice(0, 20))
    fails(lambda: pytorch_ood_score(name, learn, train), contains=f'{name} does not work with the ')


def test_a_function_is_called_the_same_in_each_run(root, learn):
    runs = [learn.openood(root, score=on_input(lambda model, x: x.mean((1, 2, 3)))) for _ in range(2)]
    assert '± 0.00' in openood_row(runs) and ' at 0x' not in runs[0].attrs['score']


def test_the_command_takes_one_checkpoint_of_each_run(tmp_path):
    for name in 's0/best.ckpt', 's0/best_epoch99_acc0.95.ckpt', 's1/best_epoch98_acc0.94.ckpt', 's1/last.ckpt':
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    eq([o.name for o in cli._checkpoints(str(tmp_path))], ['best.ckpt', 'best_epoch98_acc0.94.ckpt'])
    eq(cli._checkpoints(str(tmp_path / 's0')), [tmp_path / 's0/best.ckpt'])
    (tmp_path / 's1/best_epoch99_acc0.95.ckpt').touch()
    fails(lambda: cli._checkpoints(str(tmp_path)), contains='s1 has 2 best checkpoints')


def test_the_command_says_what_is_wrong_with_a_file(root, tmp_path):
    for name in 'bad.ckpt', 'bad.pkl':
        (tmp_path / name).write_bytes(b'hello')
        with pytest.raises(SystemExit, match=f'^aoe_bench: .*{name} cannot be'):
            cli.aoe_bench(str(tmp_path / name), root, out=str(tmp_path / 'out'))


def test_a_score_of_inputs_is_taken(root, learn):
    grey = on_input(lambda model, x: x.mean((1, 2, 3)), identity='grey')
    assert learn.openood(root, score=grey).AUROC.between(0, 100).all()


# Outliers


def test_their_outliers_are_outliers_here(root):
    path = root / 'benchmark_imglist/cifar10/train_tin597.txt'
    got = outliers(path)
    eq((len(got), got.y, got.name), (5, None, 'train_tin597'))
    eq(got.x[3].permute(1, 2, 0).numpy(), seen_by_them(root / 'images_classic/tin597/train/any/0003.png'))
    eq(outliers(str(path)).x, got.x)
    fails(lambda: outliers(path.with_name('train_tin.txt')), contains='there is no list')


def test_painted_outliers_are_the_generators():
    from aoe_nb.generate import load_generator
    from aoe_nb.models import weights_file
    from aoe_nb.painted import painted

    for name in 'cifar10', 'cifar100':
        g = load_generator(weights_file(f'gan-tiny-{name}-s0.pt'))
        for seed, sigma in (0, 7.0), (3, 2.0):
            eq(painted(f'gan-{name}', 600, sigma, seed).x, g.sample(600, sigma, seed).x)


def test_a_missing_painter_is_a_friendly_error(monkeypatch, tmp_path):
    import aoe_nb.painted

    monkeypatch.setattr(aoe_nb.painted, 'weights_file', lambda name: tmp_path / name)
    fails(lambda: aoe_nb.painted.painted('gan-cifar10'), contains='did not come with this package')


def test_painted_outliers_are_kept_for_the_weights_that_made_them(monkeypatch, tmp_path):
    import aoe_nb.data
    from aoe_nb.data import outliers

    def tiny(name):
        made.append(name)
        return painted_by(name, 8)

    made, painted_by = [], aoe_nb.data.painted
    monkeypatch.setattr(aoe_nb.data, 'painted', tiny)
    monkeypatch.setattr(aoe_nb.data.sources, 'data_home', lambda: tmp_path)
    for sha, n in ('11111111', 1), ('11111111', 1), ('22222222', 2):
        monkeypatch.setattr(aoe_nb.data, 'painter_sha', lambda name, sha=sha: sha)
        eq(len(outliers('gan-cifar10')), 8)
        eq(len(made), n)
    fails(lambda: outliers('gan-cifar10', size=16), contains='size= is for image files')
    eq(len(outliers('gan-cifar10', size=32)), 8)


# The networks of the outlier-exposure repository, where they and MNIST are on this disk

# their published error on the 10,000 test images, in percent, and what we count on the first 500 of each class
PUBLISHED = dict(
    baseline_epoch_9=(0.94, 68),
    oe_tune_epoch_4=(0.92, 70),
    oe_scratch_epoch_9=(1.03, 74),
    calib_baseline_epoch_9=(0.96, None),
    calib_oe_tune_epoch_4=(0.94, None),
    calib_oe_scratch_epoch_9=(1.17, None),
)


@pytest.fixture(scope='module')
def digits():
    "The test set of MNIST, or the first 500 images of each class, padded to 32 pixels"
    from aoe_nb.sources import data_home, load, on_disk, read_folder

    half = data_home() / 'ood/mnist5k/test'
    if on_disk('mnist'):
        return Images(*load('mnist', download=False))
    if half.is_dir():
        x, y, classes = read_folder(half)
        return Images(x[:, :1, 2:-2, 2:-2].copy(), y, classes)
    pytest.skip('mnist is not on this disk (aoe_fetch mnist)')


def published_learner(name, digits):
    path = Path(torch.hub.get_dir()) / f'checkpoints/{name}.pt'
    if not path.exists():
        pytest.skip(f'{name}.pt, of MNIST/snapshots in hendrycks/outlier-exposure, is not in {path.parent}')
    return Learner(digits.dls(256, valid=digits), load_weights(mnist_convnet(), path))


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_mnist_networks_have_their_error(name, digits):
    percent, of_half = PUBLISHED[name]
    wrong = (1 - published_learner(name, digits).id_report()['accuracy']) * len(digits)
    if len(digits) == 10_000:
        assert round(wrong) == round(100 * percent)
    elif of_half:
        assert round(wrong) == of_half


def test_published_mnist_networks_have_their_order(digits):
    "Plain below both kinds of exposure, on three of the sets that they were published on"
    g = torch.Generator().manual_seed(0)
    noise = (0.5 + 0.5 * torch.randn(2000, 1, 28, 28, generator=g)).clamp(0, 1)
    coins = (torch.rand(2000, 1, 28, 28, generator=g) > 0.5).float()
    sets = dict(gaussian=noise, bernoulli=coins, negative=255 - digits.x)
    reports = {}
    for name in list(PUBLISHED)[:3]:
        reports[name] = published_learner(name, digits).ood_report(sets, score='msp').AUROC
    plain, tuned, scratch = reports.values()
    assert (plain < tuned).all() and (plain < scratch).all()
