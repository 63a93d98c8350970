"""Folders, classes and fastai's own tools on them."""

import contextlib
import io

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.torch_core import TensorImage, set_seed
from fastcore.all import L
from fastcore.test import test_close as close, test_eq as eq, test_fail as fails
from PIL import Image

import aoe_nb.evaluation  # noqa: F401 (what Learner gains)
import fastai.vision.all  # noqa: F401 (the same)
from aoe_nb.data import Images, inliers, outliers
from aoe_nb.loaders import RandomCropFlip
from aoe_nb.models import small_cnn

NOISE = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
train, test = (inliers('digits7', split) for split in ('train', 'test'))


def folder(path, files, colour=True):
    "Image files at these places below `path`"
    for i, file in enumerate(files):
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(NOISE[i % 40] if colour else NOISE[i % 40, ..., 0]).save(path / file)
    return path


def split(*classes, part='', n=2, split='train'):
    return [f'{split}/{c}/{part}{i}.png' for c in classes for i in range(n)]


@contextlib.contextmanager
def silent(learn):
    with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(io.StringIO()):
        yield


# One number for a class


@pytest.mark.parametrize('part', ['', 'images/', 'left/far/'])
def test_the_training_split_numbers_the_classes(part, tmp_path):
    d = folder(tmp_path, split('ant', 'bee', 'cat', part=part) + split('cat', 'bee', part=part, split='test'))
    a, b = inliers(d), inliers(d, 'test')
    eq((a.classes, b.classes), (['ant', 'bee', 'cat'],) * 2)
    eq((a.y.tolist(), b.y.tolist()), ([0, 1, 2] * 2, [1, 2] * 2))
    eq(list(a.dls(2, valid=b).vocab), a.classes)


@pytest.mark.parametrize(
    'files,why',
    [
        (split('a', 'b') + split('b', 'c', split='test'), 'train/ lacks: c'),
        (split('a', 'b') + ['test/0.png'], 'lies in no class folder'),
        (split('a', 'b') + split('a', split='test') + ['test/0.png'], 'lies in no class folder'),
        (split('all/a', 'all/b') + split('all/a', split='test'), 'has one class, all'),
        (split('a', 'b'), 'has no folder test'),
    ],
    ids=range(5),
)
def test_what_cannot_be_numbered_is_refused(files, why, tmp_path):
    fails(lambda: [inliers(folder(tmp_path, files), s) for s in ('train', 'test')], contains=why)


@pytest.mark.parametrize(
    'valid,why',
    [
        (lambda: test.select('7654210'), 'their order'),
        (lambda: test.select('0124'), '(5, 6, 7)'),
        (lambda: inliers('digits', 'test'), '(3, 8, 9)'),
        (lambda: Images(test.x), 'no labels to validate with'),
        (lambda: Images(test.x.repeat(1, 3, 1, 1), test.y, test.classes), 'bring them to its channels'),
        (lambda: Images(test.x.repeat(1, 1, 2, 2), test.y, test.classes), 'bring them to its size'),
    ],
    ids=range(6),
)
def test_validation_images_of_another_kind_are_refused(valid, why):
    fails(lambda: train.dls(8, valid=valid()), contains=why)


def test_a_grey_validation_set_joins_a_coloured_training_set(tmp_path):
    folder(tmp_path, split('a', 'b'))
    folder(tmp_path, split('a', 'b', split='test'), colour=False)
    dls = inliers(tmp_path).dls(2, valid=inliers(tmp_path, 'test'))
    x = dls.valid.one_batch()[0]
    eq(x.shape[1:], (3, 8, 8))
    eq(x[:, 0], x[:, 2])


def test_a_label_needs_a_name():
    fails(lambda: Images(train.x[:2], [0, 2], ['a', 'b']), contains='only 2 class names')
    Images(train.x[:2], [-1, -1], ['a', 'b'])


@pytest.mark.parametrize('odd', [0.9, float('nan'), float('inf')])
def test_a_label_is_a_whole_number(odd):
    fails(lambda: Images(train.x[:2], [0, odd]), contains=f'there is a label {odd:g}')
    eq(Images(train.x[:2], np.array([0.0, 2.0])).y.tolist(), [0, 2])


def test_a_label_below_zero_is_no_class():
    some = Images(train.x[:4], [0, -1, 2, -7], list('abc'))
    eq(some.select('ca').y.tolist(), [1, 0])
    eq([some.decode(some[i])[1] for i in range(3)], ['a', 'no class', 'c'])


@pytest.mark.parametrize('twice', [['b', 'b'], ['b', 1]])
def test_a_class_is_selected_once(twice):
    fails(lambda: Images(train.x[:3], [0, 1, 2], list('abc')).select(twice), contains='named twice')


def test_an_image_is_shifted_by_less_than_its_side():
    x = TensorImage(torch.arange(20).view(1, 1, 4, 5).repeat(200, 1, 1, 1))
    rows = RandomCropFlip(3)(x, split_idx=0)[:, 0, :, 0] // 5
    eq({tuple(o) for o in (rows[:, 1:] - rows[:, :-1]).abs().tolist()}, {(1, 1, 1)})  # mirrored, never wrapped round
    for pad in 4, 99:
        fails(lambda: RandomCropFlip(pad)(x, split_idx=0), contains='give a pad of at most 3')


# Outliers in any form


def test_outliers_keep_the_classes_of_their_folders(tmp_path):
    o = outliers(folder(tmp_path, ['elk/0.png', 'elk/deep/1.png', 'yak/2.png']))
    eq((o.classes, o.y.tolist()), (['elk', 'yak'], [0, 0, 1]))
    o = outliers(folder(tmp_path / 'flat', ['0.png']))
    eq((o.classes, o.y), (None, None))


def test_outliers_from_other_things(tmp_path):
    x = train.x[:4]
    files = [tmp_path / f'{i}.png' for i in range(4)]
    for file, o in zip(files, x):
        Image.fromarray(o[0].numpy()).save(file)
    ds = torch.utils.data.TensorDataset(x)
    for source in (
        files,
        L(files),
        x / 255,
        x.permute(0, 2, 3, 1),
        list(x),
        ds,
        torch.utils.data.DataLoader(ds, 3),
        iter(files),
    ):
        eq(outliers(source).x, x)
    eq(outliers(files[2]).x, x[2:3])
    eq(outliers(x).name, 'outliers')
    fails(lambda: outliers([]), contains='no images')
    fails(lambda: outliers([tmp_path / 'none.png']), contains='no file')


# fastai's own tools


@pytest.fixture(scope='module')
def learn():
    set_seed(0)
    learn = Learner(train.dls(32, valid=test, normalize=([0.3], [0.37])), small_cnn(1, 7))
    with silent(learn):
        learn.fit(3, 5e-3)
    return learn


@pytest.fixture(scope='module')
def probs(learn):
    with silent(learn):
        return learn.get_preds()[0]


def test_interpretation(learn, probs):
    with silent(learn):
        interp = ClassificationInterpretation.from_learner(learn)
        confusion = interp.confusion_matrix()
        want = torch.bincount(7 * test.y + probs.argmax(1), minlength=49).view(7, 7)
        eq(confusion, want.numpy())
        actual, predicted, n = interp.most_confused()[0]
        eq(n, want[test.classes.index(actual), test.classes.index(predicted)].item())
        interp.print_classification_report()
        interp.plot_confusion_matrix()
        interp.plot_top_losses(4)
        losses, idx = interp.top_losses(4)
    want = torch.nn.functional.nll_loss(probs.log(), test.y, reduction='none')
    close(losses, want.topk(4)[0], 1e-4)
    eq(interp[idx][2].tolist(), test.y[idx].tolist())


def test_show_results_predict_and_tta(learn, probs, tmp_path):
    file = tmp_path / '0.png'
    Image.fromarray(test.x[0, 0].numpy()).save(file)
    with silent(learn):
        learn.show_results(max_n=4)
        close(learn.tta(n=2)[0], probs, 1e-4)
        for item in test[0][0], test.x[0], test.x[0] / 255, file, str(file), Image.open(file), test.x[0, 0].numpy():
            name, number, p = learn.predict(item)
            close(p, probs[0], 1e-5)
            eq(name, test.classes[int(number)])
        close(learn.get_preds(dl=learn.dls.test_dl([file, file]))[0], probs[[0, 0]], 1e-5)
        close(learn.get_preds(dl=learn.dls.test_dl(test))[0], probs, 1e-5)
        fails(lambda: learn.predict(NOISE[0]), contains='bring them to its channels')
        fails(lambda: learn.predict(test.x[0].repeat(1, 2, 2)), contains='bring them to its size')


def test_a_grey_file_in_a_coloured_learner(tmp_path):
    x = torch.from_numpy(NOISE).permute(0, 3, 1, 2)
    learn = Learner(Images(x, torch.arange(40) % 2, ['a', 'b']).dls(8), small_cnn(3, 2))
    folder(tmp_path, ['grey.png'], colour=False)
    Image.open(tmp_path / 'grey.png').convert('RGB').save(tmp_path / 'rgb.png')
    with silent(learn):
        a, b = (learn.predict(tmp_path / f)[2] for f in ('grey.png', 'rgb.png'))
    eq(a, b)


def test_an_exported_learner_measures_what_it_is_given(learn, tmp_path):
    learn.export(tmp_path / 'l.pkl')
    again = load_learner(tmp_path / 'l.pkl')
    files = [tmp_path / f'ims/{i}.png' for i in range(5)]
    files[0].parent.mkdir()
    for file, x in zip(files, test.x):
        Image.fromarray(x[0].numpy()).save(file)
    want = learn.ood_scores(test)
    for source in files[0].parent, files, L(files), [Image.open(o) for o in files], test.x[:5]:
        close(again.ood_scores(source), want[:5], 1e-5)
    fails(lambda: again.ood_report({'x': files}), contains='inliers=')
    fails(lambda: again.calibration(), contains='inliers=')
    fails(lambda: again.robustness_curve({'x': files}), contains='inliers=')
    df = again.ood_report({'x': files}, inliers=test)
    close(df.attrs['id']['NLL'], learn.id_report()['NLL'], 1e-6)
    fails(lambda: again.ood_scores(NOISE), contains='bring them to its channels')


def test_inliers_with_numbers_of_their_own(learn):
    "The same classes in another order are known by their names"
    eq(learn.id_report(test.select('7654210'))['accuracy'], learn.id_report(test)['accuracy'])
    fails(lambda: learn.id_report(inliers('digits', 'test')), contains='does not know: 3, 8, 9')


def test_a_learner_over_loaders_of_pytorch():
    ds = torch.utils.data.TensorDataset(train.x / 255, train.y)
    dls = DataLoaders(*[torch.utils.data.DataLoader(ds, 16)] * 2)
    learn = Learner(dls, small_cnn(1, 7), loss_func=torch.nn.CrossEntropyLoss())
    eq(learn.ood_scores(list(train.x[:5])).shape, (5,))
    with pytest.warns(UserWarning, match='trained on'):  # a network that takes any size gives a score
        eq(learn.ood_scores(train.x[:9].repeat(1, 1, 2, 2)).shape, (9,))
