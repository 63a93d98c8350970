"A detector's graph does elsewhere what the detector does here, and an error leaves nothing behind."

import io
import json
import struct
import subprocess
import sys
import warnings
from collections import namedtuple

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.schedule import fit_one_cycle  # noqa: F401
from fastai.data.transforms import Normalize
from fastai.learner import Learner, load_learner
from fastai.vision.augment import RandomResizedCrop, Resize, aug_transforms
from fastai.vision.core import PILImageBW
from fastai.vision.data import ImageBlock
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import RandomSplitter, get_image_files, parent_label
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn

import aoe_nb.graph as room
from aoe_nb.data import inliers
from aoe_nb.energy import energy
from aoe_nb.graph import Graph, flag_script, open_graph, resized
from aoe_nb.images import Images
from aoe_nb.models import imagenet_stats, small_cnn, with_stats
from aoe_nb.sources import fit

onnx = pytest.importorskip('onnxruntime')
KEYS = 'label', 'probability', 'score', 'p', 'outlier'

BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('fastai', 'fastcore', 'fasttransform', 'aoe_nb'):
            raise ImportError(name + ' is not here')
sys.meta_path.insert(0, Blocker())
import json, runpy
flag = runpy.run_path('flag.py')
"""


def elsewhere(code, folder):
    "Run `code` beside flag.py in a process that can import neither fastai nor this library"
    flag_script(folder / 'flag.py')
    done = subprocess.run([sys.executable, '-c', BLOCK + code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def quiet_fit(learn, epochs=2):
    torch.manual_seed(0)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, 1e-2)
    return learn


@pytest.fixture(scope='module')
def digits():
    torch.manual_seed(0)
    dls = inliers('digits7').dls(32, valid=inliers('digits7', 'test'))
    return quiet_fit(Learner(dls, small_cnn(1, 7)), 12)


def pieces(size, n=200):
    "Pieces of two photos, with the photo as their class"
    rng = np.random.default_rng(0)
    x = []
    for name in 'china.jpg', 'flower.jpg':
        photo = load_sample_image(name).transpose(2, 0, 1)
        for _ in range(n):
            top, left = rng.integers(0, 427 - size), rng.integers(0, 640 - size)
            x.append(photo[:, top : top + size, left : left + size])
    y = torch.arange(2).repeat_interleave(n)
    return Images(torch.from_numpy(np.stack(x)), y, ['china', 'flower'], name='pieces')


def mixtures(n, shape):
    "Random mixtures of noise, digits and pieces of a photo"
    gen = torch.Generator().manual_seed(0)

    def drawn(x):
        x = x.float()[torch.randint(len(x), (n,), generator=gen)]
        return nn.functional.interpolate(x.mean(1, keepdim=True).expand(-1, shape[0], -1, -1), shape[1:])

    noise = torch.randint(256, (n, *shape), generator=gen).float()
    share = torch.rand(n, 3, generator=gen).pow(3)
    pure = min(n // 4, 300)
    share[: 3 * pure] = torch.eye(3).repeat_interleave(pure, 0)
    share = (share / share.sum(1, keepdim=True))[:, :, None, None, None]
    parts = noise, drawn(inliers('digits7', 'test').x), drawn(pieces(shape[1]).x)
    return sum(share[:, i] * part for i, part in enumerate(parts)).byte()


def net_of_timm():
    timm = pytest.importorskip('timm')
    return timm.create_model('resnet10t', num_classes=2)


def compare(det, x, got):
    "What came out elsewhere against the detector here"
    here = det(torch.from_numpy(x))
    off = (got['score'] - here.score) / np.maximum(1, here.score.abs())
    assert np.abs(off).max() < 1e-5
    assert (got['outlier'] == here.outlier).all()
    assert [det.about['classes'][i] for i in got['label']] == list(here['class'])
    assert np.abs(got['probability'] - here.probability).max() < 1e-5
    p, flag = det.judge(torch.from_numpy(got['score']), torch.from_numpy(got['label']))
    assert np.array_equal(got['p'], p.numpy()) and np.array_equal(got['outlier'], flag.numpy())
    # p counts the same inliers, but for those whose score is nearer than rounding
    for i in np.flatnonzero(got['p'] != here.p):
        known = det.rules[int(got['label'][i]) if det.by else None].known.numpy()
        near = np.abs(known - here.score[i]) < 1e-5 * max(1, abs(here.score[i]))
        steps = abs(got['p'][i] - here.p[i]) * (len(known) + 1)
        assert 0.5 < steps < near.sum() + 0.5


@pytest.mark.slow  # the page "Ship it" and the tests below compare fewer
def test_the_same_flags_elsewhere(digits, tmp_path):
    "10,000 images, batches of 1, 7 and 256, in a process without fastai and this library"
    small = pieces(16)
    normalised = small.dls(64, valid=pieces(16).take(slice(1, None, 2)), normalize=([0.4] * 3, [0.2] * 3))
    plain = small.dls(64, valid=pieces(16).take(slice(1, None, 2)))
    bigger = pieces(32).dls(64, valid=pieces(32).take(slice(1, None, 2)))
    torch.manual_seed(0)
    learners = dict(
        normalised=quiet_fit(Learner(normalised, small_cnn(3, 2))),
        stats=quiet_fit(Learner(plain, with_stats(small_cnn(3, 2), imagenet_stats))),
        timm=Learner(bigger, net_of_timm()),
    )
    made = {}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name, learn in learners.items():
            made[name] = learn.ood_detector(mixtures(400, learn.dls.valid_ds.x.shape[1:]), fpr=0.1)
    for score in 'energy', 'msp', 'entropy', 'max_logit':
        made[score] = digits.ood_detector(score=score)
    made['by'] = digits.ood_detector(fpr=0.1, confidence=None, by='class')
    for name, det in made.items():
        n = 10_000 if name == 'energy' else 2_000
        np.save(tmp_path / f'{name}.npy', mixtures(n, det.about['shape']).numpy())
        if name not in ('stats', 'max_logit'):
            det.export(tmp_path / f'{name}.onnx')
        if name not in ('timm', 'msp', 'entropy'):
            det.export(tmp_path / f'{name}.pt2', pixels='float' if name == 'stats' else 'uint8')
    code = """
import numpy as np
from pathlib import Path
for file in sorted([*Path().glob('*.onnx'), *Path().glob('*.pt2')]):
    run,about = flag['open_graph'](file)
    x = np.load(file.stem + '.npy')
    if about['pixels'] == 'float': x = x.astype(np.float32)/255
    for size,n in (1,200),(7,700),(256,len(x)):
        parts = [run(x[i:i+size]) for i in range(0, n, size)]
        np.savez(f'{file.name}.{size}.npz', **{k: np.concatenate([o[k] for o in parts]) for k in parts[0]})
    Path(f'{file.name}.json').write_text(json.dumps(about))
"""
    elsewhere(code, tmp_path)
    files = [*tmp_path.glob('*.onnx'), *tmp_path.glob('*.pt2')]
    assert len(files) == 11
    for file in files:
        det = made[file.stem]
        x = np.load(tmp_path / f'{file.stem}.npy')
        for size in 1, 7, 256:
            got = dict(np.load(f'{file}.{size}.npz'))
            dtypes = np.int64, np.float32, np.float32, np.float32, np.bool_
            assert tuple(got) == KEYS and tuple(o.dtype for o in got.values()) == dtypes
            compare(det, x[: len(got['p'])], got)
        about = json.loads(file.with_name(f'{file.name}.json').read_text())
        assert about['shape'] == list(x.shape[1:]) and about['resize'] is None
        assert {k: about[k] for k in ('n', 'fpr', 'classes')} == {k: det.about[k] for k in ('n', 'fpr', 'classes')}
        assert about['threshold'] == (det.threshold.to_dict() if det.by else det.threshold)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder of pieces as files, and one of whole photos, with what is no photo"
    folder = tmp_path_factory.mktemp('photos')
    for i, x in enumerate(pieces(48, 20).x):
        (folder / 'pieces' / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.permute(1, 2, 0).numpy()[:37]).save(folder / 'pieces' / 'ab'[i % 2] / f'{i}.png')
    (folder / 'new').mkdir()
    china = Image.fromarray(load_sample_image('china.jpg'))
    flower = Image.fromarray(load_sample_image('flower.jpg'))
    china.save(folder / 'new/china.png')
    flower.save(folder / 'new/flower.jpg')
    flower.crop((100, 0, 301, 427)).convert('L').save(folder / 'new/grey.png')
    china.convert('RGBA').crop((0, 0, 301, 50)).save(folder / 'new/transparent.png')
    (folder / 'new/notes.txt').write_text('no photo')
    return folder


def of_files(photos, net, item, batch=(), block=ImageBlock):
    data = DataBlock(
        blocks=(block, CategoryBlock),
        get_items=get_image_files,
        get_y=parent_label,
        splitter=RandomSplitter(0.5, seed=0),
        item_tfms=item,
        batch_tfms=list(batch),
    )
    torch.manual_seed(0)
    return Learner(data.dataloaders(photos / 'pieces', bs=16, num_workers=0), net)


@pytest.mark.slow
def test_photos_at_full_size(photos, tmp_path, fastai_exports):
    "Resized by the rule in the file as by the learner's transforms"
    norm = Normalize.from_stats(*imagenet_stats)
    grey = ImageBlock(PILImageBW)
    learners = {
        'crop.onnx': of_files(photos, small_cnn(3, 2), Resize(32)),
        'squish.pt2': of_files(photos, small_cnn(3, 2), Resize((24, 32), 'squish'), [norm]),
        'pad.pt2': of_files(photos, small_cnn(1, 2), Resize(32, 'pad', pad_mode='reflection'), block=grey),
        'zeros.pt2': of_files(photos, small_cnn(3, 2), Resize((31, 20), 'pad', pad_mode='zeros'), [norm]),
        'random.pt2': of_files(photos, small_cnn(3, 2), RandomResizedCrop(32)),
        'twice.onnx': of_files(photos, small_cnn(3, 2), Resize(71), [*aug_transforms(size=(32, 24)), norm]),
    }
    learners['twice.onnx'].ood_detector(fpr=0.1, confidence=None)
    learners['twice.onnx'].export(tmp_path / 'learner.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learners['loaded.pt2'] = load_learner(tmp_path / 'learner.pkl')
    for name, learn in learners.items():
        if name != 'loaded.pt2':
            learn.ood_detector(fpr=0.1, confidence=None)
        learn.detector.export(tmp_path / name)
    code = f"""
from contextlib import redirect_stdout
for name in {list(learners)}:
    with open(name + '.csv', 'w') as f, redirect_stdout(f): flag['flag_folder'](name, {str(photos / 'new')!r})
"""
    errors = elsewhere(code, tmp_path).stderr
    assert errors.count('cannot identify image file') == len(errors.splitlines()) == len(learners)
    for name, learn in learners.items():
        got = pd.read_csv(tmp_path / f'{name}.csv')
        assert len(got) == 4
        here = learn.detector(list(got.file))
        assert np.allclose(got.score, here.score, 1e-5, 1e-5), name
        assert list(got.outlier) == list(here.outlier) and list(got['class']) == list(here['class'])
        assert np.allclose(got.p, here.p)


def test_a_learner_in_memory_takes_files_of_its_size(digits, tmp_path, capsys):
    det = digits.ood_detector()
    file = det.export(tmp_path / 'd.pt2')
    Image.fromarray(inliers('digits7', 'test').x[0, 0].numpy()).save(tmp_path / 'right.png')
    Image.new('L', (9, 8)).save(tmp_path / 'wrong.png')
    Image.new('RGB', (8, 8)).save(tmp_path / 'wrong2.png')
    room.flag_folder(file, tmp_path)
    out, err = capsys.readouterr()
    got = pd.read_csv(io.StringIO(out))
    assert len(got) == 1 and np.isclose(got.score, det(tmp_path / 'right.png').score, 1e-5)
    assert 'wrong.png' in err and 'wrong2.png' in err and 'd.pt2' in err


def test_the_program_goes_on_after_any_damage_and_says_what_it_needs(digits, tmp_path, capsys):
    file = digits.ood_detector().export(tmp_path / 'd.pt2')
    (tmp_path / 'new').mkdir()
    Image.fromarray(inliers('digits7', 'test').x[0, 0].numpy()).save(tmp_path / 'new' / 'right.png')
    bomb = io.BytesIO()
    Image.new('L', (8, 8)).save(bomb, 'BMP')
    bomb = bytearray(bomb.getvalue())
    bomb[18:26] = struct.pack('<ii', 60_000, 60_000)  # says that it is larger than Pillow opens
    (tmp_path / 'new' / 'bomb.bmp').write_bytes(bomb)
    room.flag_folder(file, tmp_path / 'new')
    out, err = capsys.readouterr()
    assert 'right.png' in out and 'bomb.bmp' in err
    script = flag_script(tmp_path / 'flag.py')
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith('give a detector and a folder')


def test_the_learner_is_left_alone(digits, tmp_path, capfd):
    "Modes, weights, device, printing and logging"
    digits.model.eval()
    det = digits.ood_detector()
    digits.model.train()
    digits.model[1].eval()
    modes = [m.training for m in digits.model.modules()]
    before = {k: v.clone() for k, v in digits.model.state_dict().items()}
    needs = [p.requires_grad for p in digits.model.parameters()]
    for name in 'd.onnx', 'd.pt2':
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            file = det.export(tmp_path / name)
        assert file == tmp_path / name
    assert capfd.readouterr() == ('', '')
    assert [m.training for m in digits.model.modules()] == modes
    assert [p.requires_grad for p in digits.model.parameters()] == needs
    assert all(torch.equal(before[k], v) for k, v in digits.model.state_dict().items())
    assert sorted(o.name for o in tmp_path.iterdir()) == ['d.onnx', 'd.pt2']


Parts = namedtuple('Parts', 'features logits')


class Several(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return Parts(x, self.net(x))


wrappers = dict(
    parallel=nn.DataParallel,
    compiled=lambda net: torch.compile(net, backend='eager'),
    within=lambda net: nn.Sequential(nn.DataParallel(torch.compile(net, backend='eager')), nn.Identity()),
    several=Several,
    half=lambda net: net.half(),
    bfloat=lambda net: net.bfloat16(),
)


@pytest.mark.parametrize('name', wrappers)
def test_networks_in_wrappers(digits, name, tmp_path):
    learn = Learner(digits.dls, wrappers[name](room._copied(digits.model)), loss_func=digits.loss_func)
    det = learn.ood_detector()
    x = inliers('digits7', 'test').x[:50]
    here = det(x)
    run, _ = open_graph(det.export(tmp_path / ('d.onnx' if name == 'half' else 'd.pt2')))
    rough = 0.02 if name in ('half', 'bfloat') else 1e-5
    assert np.allclose(run(x.numpy())['score'], here.score, rough, rough)


def test_scores_of_inputs(digits, tmp_path):
    peers = pytest.importorskip('aoe_nb.peers')
    pytest.importorskip('pytorch_ood')
    fitted = peers.pytorch_ood_score('Mahalanobis', digits)
    det = digits.ood_detector(score=fitted)
    x = mixtures(1000, (1, 8, 8)).numpy()
    run, _ = open_graph(det.export(tmp_path / 'd.onnx'))
    compare(det, x, run(x))


def test_what_counts(digits):
    "NaN and infinite scores, with and without a rule for each class"
    for by in None, 'class':
        det = digits.ood_detector(fpr=0.1, confidence=None, by=by)
        graph = Graph(det)
        known = torch.cat([o.known for o in det.rules.values()])
        scores = torch.cat([torch.tensor([torch.nan, -torch.inf, torch.inf]), known, known + 1e-6])
        for label in range(7):
            labels = torch.full((len(scores),), label)
            p, flag = det.judge(scores, labels)
            ours = graph.judge(scores, labels)
            assert torch.equal(ours[0], p) and torch.equal(ours[1], flag)


def test_floats_outside_are_flagged(digits):
    det = digits.ood_detector()
    graph = Graph(det, 'float')
    x = torch.rand(4, 1, 8, 8)
    for i, bad in enumerate((255.0, -1.0, torch.nan)):
        x[i, 0, 3, 3] = bad
    out = graph(x)
    assert out['outlier'][:3].all() and out['score'].isnan().tolist() == [True, True, True, False]


def unfollowed(logits):
    return torch.tensor([max(o) for o in logits.tolist()])


def no_counterpart(logits):
    return torch.special.bessel_j0(logits).sum(1)


frozen = []


def frozen_constant(logits):
    "Counts its calls in Python, which a graph cannot"
    frozen.append(0)
    return logits.sum(1) + 10 * len(frozen)


class OneSize(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x if len(x) > 1 else 2 * x)


refused = dict(
    suffix=('d.pkl', {}, 'must end with .pt2'),
    none=('d', {}, 'must end with .pt2'),
    pixels=('d.pt2', dict(pixels='int8'), "'uint8' or 'float'"),
    size=('d.pt2', dict(size=9), 'leave size= out'),
    resize=('d.pt2', dict(resize=dict(side=8)), 'resize has no side'),
    method=('d.pt2', dict(resize=dict(method='zoom')), 'crop, squish or pad'),
    score=('d.pt2', dict(score=unfollowed), 'the score unfollowed cannot be followed'),
    operator=('d.onnx', dict(score=no_counterpart), 'no counterpart of .*bessel_j0: write a .pt2'),
    frozen=('d.pt2', dict(score=frozen_constant), 'does not do what the detector does'),
)


@pytest.mark.parametrize('case', refused)
def test_an_error_leaves_nothing(digits, case, tmp_path):
    name, settings, words = refused[case]
    settings = dict(settings)
    det = digits.ood_detector(score=settings.pop('score', energy))
    with pytest.raises(ValueError, match=words):
        det.export(tmp_path / name, **settings)
    assert not list(tmp_path.iterdir())


def test_a_network_that_depends_on_the_batch(digits, tmp_path):
    learn = Learner(digits.dls, OneSize(room._copied(digits.model)), loss_func=digits.loss_func)
    with pytest.raises(ValueError, match='the network cannot be followed|does not do what'):
        learn.ood_detector().export(tmp_path / 'd.pt2')
    assert not list(tmp_path.iterdir())


def test_what_is_missing(digits, tmp_path, monkeypatch):
    det = digits.ood_detector()
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='choose another output folder'):
        det.export(tmp_path / 'file' / 'd.pt2')
    monkeypatch.setattr(room, 'find_spec', lambda name: None if name == 'onnxscript' else True)
    with pytest.raises(ImportError, match=r'needs onnxscript: pip install .aoe_nb\[onnx\]'):
        det.export(tmp_path / 'd.onnx')
    det.about = det.about | dict(shape=[1, None, None])
    with pytest.raises(ValueError, match=r'give size=\(height, width\)'):
        det.export(tmp_path / 'd.pt2')
    det.about = det.about | dict(shape=None)
    with pytest.raises(ValueError, match=r'give size=\(channels, height, width\)'):
        det.export(tmp_path / 'd.pt2')
    assert room._shape(det, (1, 8, 8)) == [1, 8, 8]
    assert [o.name for o in tmp_path.iterdir()] == ['file']


def test_a_stale_detector(digits, tmp_path):
    learn = Learner(digits.dls, room._copied(digits.model), loss_func=digits.loss_func)
    det = learn.ood_detector()
    learn.model[0].weight.add_(1)
    with pytest.raises(ValueError, match='has changed since'):
        det.export(tmp_path / 'd.pt2')
    assert not list(tmp_path.iterdir())


def test_transforms_that_cannot_travel(photos, tmp_path):
    def gamma(x: Image.Image):
        return x.point(lambda o: o // 2)

    from fasttransform import Transform

    learn = of_files(photos, small_cnn(3, 2), [Resize(32), Transform(gamma)])
    det = learn.ood_detector(fpr=0.1, confidence=None)
    with pytest.raises(ValueError, match='gamma changes images in validation'):
        det.export(tmp_path / 'd.pt2')
    assert not list(tmp_path.iterdir())
    det.export(tmp_path / 'd.pt2', resize=dict(method='squish'))
    assert open_graph(tmp_path / 'd.pt2')[1]['resize']['method'] == 'squish'


@pytest.mark.parametrize('rule', [None, dict(method='squish', mode='RGB', size=[4, 4], resample='bilinear')])
def test_deep_files_become_what_8_bits_are(rule, tmp_path):
    grey = np.arange(40, dtype=np.uint8).reshape(8, 5) * 6
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(grey).save(tmp_path / '8.png', exif=turned)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / '16.png', exif=turned)
    want, got = (resized(Image.open(tmp_path / name), rule) for name in ('8.png', '16.png'))
    assert np.array_equal(got, want) and (rule or np.array_equal(got, fit(Image.open(tmp_path / '16.png'))))
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / 'float.tif')
    with pytest.raises(ValueError, match='save them in'):
        resized(Image.open(tmp_path / 'float.tif'), rule)


@pytest.mark.parametrize('method', ['crop', 'squish', 'pad'])
@pytest.mark.parametrize('pad_mode', ['zeros', 'border', 'reflection'])
def test_resized_as_fastai_does(method, pad_mode):
    rng = np.random.default_rng(0)
    for _ in range(10):
        w, h = rng.integers(9, 90, 2)
        size = tuple(int(o) for o in rng.integers(5, 60, 2))
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        step = Resize(size, method, pad_mode=pad_mode)
        for mode in 'RGB', 'L':
            want = np.atleast_3d(np.asarray(step(image.convert(mode), split_idx=1))).transpose(2, 0, 1)
            assert np.array_equal(resized(image, room._words(step, mode)), want)
