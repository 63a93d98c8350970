"""Whatever holds images: it means the same to `expose`, `ood_scores` and `ood_report`, or is refused at once."""

import collections
import io
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders, Datasets, TfmdLists
from fastai.data.load import DataLoader as FastaiLoader
from fastai.vision.all import (
    CategoryBlock,
    ColReader,
    CrossEntropyLossFlat,
    DataBlock,
    Dihedral,
    ImageBlock,
    ImageDataLoaders,
    IntToFloatTensor,
    Learner,
    Normalize,
    PILImage,
    PILImageBW,
    RandomResizedCrop,
    Resize,
    ToTensor,
    aug_transforms,
    load_learner,
)
from fastcore.all import L
from fastcore.test import test_close as close, test_eq as eq, test_fail as fails
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import aoe_nb.evaluation  # noqa: F401
import aoe_nb.exposure  # noqa: F401 (what Learner gains)
from aoe_nb.attack import FGSM, PGD
from aoe_nb.audit import audit
from aoe_nb.data import Images, inliers, outliers
from aoe_nb.evaluation import transfer_matrix
from aoe_nb.generate import Generator, Mixed, PCAGaussian
from aoe_nb.models import small_cnn
from aoe_nb.stream import OutlierStream, pixel_batches

train, test = (inliers('digits7', split) for split in ('train', 'test'))
china = outliers('china')
X = china.x[:24]


@pytest.fixture(scope='module')
def learn():
    torch.manual_seed(0)
    return Learner(train.dls(32, valid=test), small_cnn(1, 7))


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    d = tmp_path_factory.mktemp('grey')
    for i, x in enumerate(X):
        Image.fromarray(x[0].numpy()).save(d / f'{i}.png')
    return [d / f'{i}.png' for i in range(len(X))]


def fit(learn, *args):
    with learn.no_bar(), learn.no_logging():
        learn.fit(*args)
    return learn


# Forms


class Items(Dataset):
    "A data set of PyTorch's"

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class Endless(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Table:
    "What Hugging Face's data sets are like: rows by number, columns by name"

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i):
        return self.columns[i] if isinstance(i, str) else {k: v[i] for k, v in self.columns.items()}


def png(file):
    return file.read_bytes()


FORMS = {
    'Images': lambda f: china.take(slice(24)),
    'uint8': lambda f: X,
    'float': lambda f: X / 255,
    'double': lambda f: X.double() / 255,
    'a rounding error outside': lambda f: X / 255 * (1 + 2e-7) - 3e-8,
    'array': lambda f: X.numpy(),
    'channels last': lambda f: X.permute(0, 2, 3, 1).numpy(),
    'a flipped view': lambda f: X.flip(0).numpy()[::-1],
    'grey without channels': lambda f: X[:, 0],
    'list of tensors': lambda f: list(X),
    'list of grey arrays': lambda f: list(X[:, 0].numpy()),
    'list of floats': lambda f: list(X / 255),
    'tuple of images': lambda f: tuple(X),
    'folder': lambda f: f[0].parent,
    'folder, str': lambda f: str(f[0].parent),
    'files': lambda f: f,
    'files, str': lambda f: [str(o) for o in f],
    'files, L': lambda f: L(f),
    'files, array': lambda f: np.array([str(o) for o in f]),
    'files, glob': lambda f: iter(f),
    'PIL': lambda f: [Image.open(o) for o in f],
    'PIL of fastai': lambda f: L(PILImageBW.create(o) for o in f),
    'a batch in a dict': lambda f: dict(image=X),
    'a column in a dict': lambda f: dict(image=[Image.open(o) for o in f], name=['a'] * 24),
    'dicts': lambda f: [dict(image=x) for x in X],
    'dicts of PIL': lambda f: [dict(img=Image.open(o), id=str(o)) for o in f],
    'dicts of bytes': lambda f: [dict(image=dict(bytes=png(o), path=None)) for o in f],
    'a table': lambda f: Table(image=[Image.open(o) for o in f]),
    'a user dict': lambda f: collections.UserDict(pixel_values=X / 255),
    'data set': lambda f: TensorDataset(X),
    'data set of PIL': lambda f: Items([(Image.open(o), -1) for o in f]),
    'data set of fastai': lambda f: Datasets(f, [[PILImageBW.create, ToTensor()]]),
    'list of fastai': lambda f: TfmdLists(f, [PILImageBW.create, ToTensor()]),
    'data set without length': lambda f: Endless(X),
    'PyTorch loader': lambda f: DataLoader(TensorDataset(X), 7),
    'loader of dicts': lambda f: DataLoader([dict(image=x) for x in X], 7),
    'loader of images': lambda f: DataLoader(X / 255, 7),
    'loader without batches': lambda f: DataLoader(X, batch_size=None),
    'loader, channels last': lambda f: DataLoader(X.permute(0, 2, 3, 1), 7),
    'fastai loader': lambda f: china.take(slice(24)).dl(7, normalize=([0.3], [0.37])),
    'fastai loader of dicts': lambda f: FastaiLoader([dict(image=x) for x in X], bs=7),
    'fastai loader without batches': lambda f: FastaiLoader(X, bs=None),
    'images and labels below zero': lambda f: [X, -torch.ones(24).long()],
    'list of batches': lambda f: list(X.split(7)),
    'generator of batches': lambda f: iter(X.split(7)),
    'generator of images': lambda f: iter(X / 255),
}


@pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
def test_every_form_is_the_same_images(form, learn, files):
    close(torch.cat(list(pixel_batches(form(files), 10))), X / 255, 1e-6)
    close(learn.ood_scores(form(files), attack=FGSM(0.02)), learn.ood_scores(X, attack=FGSM(0.02)), 1e-4)


@pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
def test_every_form_can_be_exposed(form, learn, files):
    learn.expose(form(files), attack=FGSM(0.02))
    x = torch.cat([learn.outlier_exposure.stream.draw(n) for n in (5, 12, 7)])
    known = {tuple((255 * o).round().flatten().int().tolist()) for o in X / 255}
    assert {tuple((255 * o).round().flatten().int().tolist()) for o in x} == known  # each once, in some order
    if hasattr(form(files), '__next__') and not isinstance(next(form(files)), Path):
        fails(lambda: fit(learn, 1), contains='cannot start over')
    else:
        fit(learn, 1)
    learn.unexpose()


def test_a_report_takes_every_form_at_once(learn, files):
    forms = {name: form(files) for name, form in FORMS.items()}
    df = learn.ood_report(forms).loc[list(forms)]
    eq(df.n_out.tolist(), [24] * len(forms))
    close(df.AUROC.astype(float), df.AUROC.iloc[0], 1e-6)


@pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
def test_inliers_come_in_every_form(form, learn, files):
    df = learn.ood_report({'x': test}, inliers=form(files))
    eq(df.n_in['x'], 24)
    eq(df.attrs['id'], None)


def test_a_generator_is_measured_more_than_once(learn):
    def draw():
        return iter(X)

    sets = {'x': draw()}
    want = learn.robustness_curve({'x': X}, [0, 0.02], FGSM)
    eq(learn.robustness_curve(sets, [0, 0.02], FGSM), want)
    eq(learn.masking_check(draw(), steps=2, n_queries=2).value, learn.masking_check(X, steps=2, n_queries=2).value)
    matrix = transfer_matrix({'a': learn}, draw(), FGSM(0.02))
    eq(matrix, transfer_matrix({'a': learn}, X, FGSM(0.02)))


def test_labels_beyond_the_networks_classes_are_refused(learn):
    for y in torch.arange(24), torch.arange(24) % 3 - 1:
        fails(lambda: learn.id_report((X, y)), contains='number them as in training')


def test_data_loaders(learn):
    eq(len(learn.ood_scores(learn.dls)), len(test))  # the validation images


def test_float_files_keep_their_values(learn, tmp_path):
    x = torch.rand(9, 1, 8, 8)
    np.save(tmp_path / 'a.npy', x.numpy())
    torch.save(x, tmp_path / 'a.pt')
    for file in 'a.npy', 'a.pt':
        eq(learn.ood_scores(tmp_path / file), learn.ood_scores(x))
    close(outliers(tmp_path / 'a.npy').x / 255, x, 1 / 500)


def test_an_archive_has_one_array_of_images(learn, tmp_path):
    x = X.numpy()
    beside = dict(label=np.arange(len(x)), features=np.ones((len(x), 7)), images=x)
    np.savez(tmp_path / 'one.npz', **beside)
    np.savez(tmp_path / 'x.npz', **beside, x=x[:3])
    np.savez(tmp_path / 'two.npz', **beside, masks=x[:, 0])
    eq([len(outliers(tmp_path / name)) for name in ('one.npz', 'x.npz')], [len(x), 3])
    for read in outliers, learn.ood_scores:
        fails(lambda: read(tmp_path / 'two.npz'), contains='images, masks may all be its images')


REFUSED = {
    'one image': (X[0], 'shape (N,C,H,W)'),
    'a number': (3, 'drawn from a int'),
    'nothing': (None, 'drawn from a NoneType'),
    'numbers': ([1, 2], 'int is no image'),
    'no image column': ([dict(a=X[0])], 'no image among a'),
    'a class': (PCAGaussian, 'drawn from a type'),
    'a network': (torch.nn.Linear(2, 2), 'drawn from a Linear'),
    'a wrong name': ('chnia', 'one of the known outliers: china'),
    'a wrong file': (['a.png'], 'there is no file a.png'),
    'beyond 1 by 1%': (X / X.max() * 1.01, 'not [0,1]'),
    'not a number': (X / 255 * float('nan'), 'not [0,1]'),
    'integers': (X.long(), 'have dtype'),
    'sizes of many kinds': ([X[0], X[0, :, :4]], 'bring them to one size'),
    'another size': (Images(X.repeat(1, 1, 2, 2)), 'size'),
    'colour': (X.repeat(1, 3, 1, 1), 'channels'),
    'lists of lists': ([[[1, 2], [3, 4]]], 'is no image'),
}


@pytest.mark.parametrize('source,why', REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_is_refused_everywhere(source, why, learn):
    learn.unexpose()
    for f in learn.ood_scores, learn.expose, lambda o: learn.ood_report({'x': o}):
        with pytest.raises((TypeError, ValueError)) as e:
            f(source)
        assert why in str(e.value), str(e.value)
    assert not hasattr(learn, 'outlier_exposure')


def test_a_tensor_of_another_size_is_scored_with_a_warning_and_never_exposed(learn):
    larger = X.repeat(1, 1, 2, 2)
    with pytest.warns(UserWarning, match='trained on'):
        assert len(learn.ood_scores(larger)) == len(larger)
    with pytest.raises(ValueError, match='size'):
        learn.expose(larger)


def test_a_data_frame_is_refused(learn):
    for f in learn.ood_scores, learn.expose:
        fails(lambda: f(pd.DataFrame(dict(file=['a.png']))), contains='taken from a DataFrame', exc=TypeError)


def test_a_learner_is_no_source(learn):
    fails(lambda: learn.expose(learn), contains='drawn from a Learner')


# Labels


@pytest.mark.parametrize(
    'source',
    [
        TensorDataset(X, torch.arange(24)),
        [dict(image=x, label=3) for x in X],
        (X, torch.arange(24)),
        dict(x=X, y=[3] * 24),
        Table(image=list(X), label=[3] * 24),
        [(x, 3) for x in X],
        DataLoader([dict(image=x, label=3) for x in X], 7),
        lambda n: (X[:n], torch.ones(n).long()),
        lambda n: Images(X[:n], torch.ones(n)),
    ],
    ids=range(9),
)
def test_labels_that_look_like_inliers_are_refused(source, learn):
    fails(lambda: learn.expose(source), contains='look like inlier labels')


def test_labels_below_zero_are_none(learn):
    learn.expose([dict(image=x, label=-1) for x in X]).unexpose()


def class_folder(path, *places, size=8):
    for i, place in enumerate(places):
        (path / place).mkdir(parents=True)
        for j in range(4):
            rng = np.random.default_rng(10 * i + j)
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path / place / f'{j}.png')
    return path


@pytest.mark.parametrize('place', ['', 'train', 'train/cat', 'train/cat/left'])
def test_a_folder_of_the_classifiers_own_classes_is_refused(place, tmp_path):
    class_folder(tmp_path, 'train/cat/left', 'train/dog/left', 'test/cat', 'test/dog', 'other/elk')
    learn = Learner(inliers(tmp_path).dls(4, valid=inliers(tmp_path, 'test')), small_cnn(3, 2))
    here = tmp_path / place
    if 'left' not in place:
        for source in here, str(here), outliers(here) if place == 'train' else here:
            fails(lambda: learn.expose(source), contains='cat')
    fails(lambda: learn.expose(sorted((tmp_path / 'test/cat').iterdir())), contains='cat')
    learn.expose(tmp_path / 'other')
    eq(learn.outlier_exposure.stream.own, ['elk'])


# Generators


def sources():
    torch.manual_seed(0)
    g = Generator(7, widths=[8], n_z=8, c_out=1).eval()
    return dict(
        pca=PCAGaussian(train),
        mixed=Mixed(train),
        gan=g,
        images=lambda n: g.sample(n, 7.0, seed=random.randrange(99)),
        channels_last=lambda n: np.random.rand(n, 8, 8, 1),
        listed=lambda n: list(torch.rand(n, 1, 8, 8)),
    )


@pytest.mark.parametrize('name', sources())
def test_a_generator_gives_new_images_at_every_draw(name, learn):
    a, b = (OutlierStream(sources()[name], seed=3) for _ in range(2))
    first, second = a.draw(6), a.draw(6)
    eq(first.shape, (6, 1, 8, 8))
    assert not torch.equal(first, second)
    eq((b.draw(6), b.draw(6)), (first, second))
    assert not torch.equal(OutlierStream(sources()[name], seed=4).draw(6), first)
    fit(learn.expose(sources()[name]), 1)
    learn.unexpose()
    fails(lambda: learn.ood_scores(sources()[name]), contains='without an end', exc=TypeError)


def test_random_items_change_with_each_reading(learn):
    class Noise(Items):
        def __getitem__(self, i):
            return torch.rand(1, 8, 8)

    state = torch.get_rng_state()
    stream = OutlierStream(Noise([0] * 5), seed=1)
    a, b = stream.draw(5), stream.draw(5)
    assert not torch.equal(a.sum((1, 2, 3)).sort()[0], b.sum((1, 2, 3)).sort()[0])
    stream.rewind()
    eq(stream.draw(5), a)
    eq(torch.get_rng_state(), state)


def test_a_look_uses_nothing_up(learn):
    for source in china, DataLoader(china.x, 7, shuffle=True), iter(china.x.split(7)), lambda n: torch.rand(n, 1, 8, 8):
        again = iter(china.x.split(7)) if hasattr(source, '__next__') else source
        stream = learn.expose(source).outlier_exposure.stream
        eq(stream.draw(9), OutlierStream(again).draw(9))
    learn.unexpose()


# A learner's own transforms


BIG = 20


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    return class_folder(
        tmp_path_factory.mktemp('photos'), 'train/a', 'train/b', 'valid/a', 'valid/b', 'other/x', size=BIG
    )


def pipeline(photos, **kw):
    kw = dict(item_tfms=Resize(8), batch_tfms=Normalize.from_stats([0.4] * 3, [0.3] * 3)) | kw
    dls = ImageDataLoaders.from_folder(photos, train='train', valid='valid', bs=4, **dict(num_workers=0) | kw)
    torch.manual_seed(0)
    return Learner(dls, small_cnn(3, 2), loss_func=CrossEntropyLossFlat())


def by_hand(learn, files):
    "Scores of what fastai makes of the files"
    xb = torch.cat([b[0] for b in learn.dls.test_dl(files)])
    with torch.no_grad():
        return -learn.model.eval()(xb).logsumexp(1).as_subclass(torch.Tensor)


PIPELINES = {
    'Resize': {},
    'RandomResizedCrop': dict(item_tfms=RandomResizedCrop(8)),
    'augmented': dict(
        batch_tfms=[*aug_transforms(size=8), Normalize.from_stats([0.4] * 3, [0.3] * 3)], item_tfms=Resize(12)
    ),
    'not normalised': dict(batch_tfms=None),
}


@pytest.mark.parametrize('kw', PIPELINES.values(), ids=PIPELINES)
def test_files_go_through_the_learners_transforms(kw, photos, tmp_path, fastai_exports):
    learn = pipeline(photos, **kw)
    other = photos / 'other/x'
    files = sorted(other.iterdir())
    want = by_hand(learn, files)
    for source in (
        other,
        photos / 'other',
        files,
        L(files),
        [str(f) for f in files],
        [Image.open(f) for f in files],
        iter(files),
    ):
        close(learn.ood_scores(source), want, 1e-4)
    eq(learn.ood_scores(files[0]).shape, (1,))
    df = learn.ood_report({'x': other})
    eq(df.n_out['x'], 4)
    hit = learn.ood_report({'x': other}, attack=PGD(0.1, 3))
    assert hit.AUROC['x'] <= df.AUROC['x']
    before, after = fit(learn.expose(other, attack=FGSM(0.02)), 1).exposed(6)
    eq(before.shape, (6, 3, 8, 8))
    assert 0 < (after - before).abs().max() <= 0.02 + 1e-6
    learn.export(tmp_path / 'l.pkl')
    again = load_learner(tmp_path / 'l.pkl')
    close(again.ood_scores(other), by_hand(learn, files), 1e-4)
    close(again.ood_scores([Image.open(f) for f in files]), by_hand(learn, files), 1e-4)
    eq(again.ood_report({'x': other}, inliers=photos / 'valid').n_in['x'], 8)
    fails(lambda: again.ood_report({'x': other}), contains='inliers=')


def test_rows_of_images_go_through_the_learners_transforms(photos):
    learn = pipeline(photos)
    files = sorted((photos / 'other').rglob('*.png'))
    Image.open(files[0]).resize((20, 31)).save(photos.parent / 'small.png')
    files = [*files, photos.parent / 'small.png']
    want = by_hand(learn, files)
    rows = {
        'dicts': [dict(image=Image.open(o)) for o in files],
        'packed': [dict(image=dict(bytes=png(o), path=None)) for o in files],
        'paths': [dict(image=str(o)) for o in files],
        'pairs': [(Image.open(o), -1) for o in files],
        'bytes': [png(o) for o in files],
    }
    for source in rows.values():
        close(learn.ood_scores(source), want, 1e-4)
        fit(learn.expose(source), 1)
        learn = pipeline(photos)
    fails(lambda: fit(learn.expose([(Image.open(o), 1) for o in files]), 1), contains='look like inlier labels')


def test_class_folders_are_labels_of_a_learners_pipeline(photos):
    learn = pipeline(photos)
    with learn.no_bar():
        want = learn.validate()[0]
    files = sorted((photos / 'valid').rglob('*.png'))
    rows = [dict(image=Image.open(o), label='ab'.index(o.parent.name)) for o in files]
    for source in photos / 'valid', rows:
        close(learn.id_report(source)['NLL'], want, 1e-4)
    fails(lambda: learn.id_report(photos / 'other'), contains='have none')


def test_images_of_a_wrong_size_are_refused_where_no_transform_helps(photos):
    learn = pipeline(photos)
    whole = outliers(photos / 'other')
    for f in learn.ood_scores, learn.expose, lambda o: learn.ood_report({'x': o}):
        fails(lambda: f(whole), contains='size')
    plain = Learner(
        Images(whole.x[:, :, :8, :8].repeat(4, 1, 1, 1), torch.arange(16) % 2, ['a', 'b']).dls(2), small_cnn(3, 2)
    )
    for f in plain.ood_scores, plain.expose, lambda o: plain.ood_report({'x': o}):
        fails(lambda: f(photos / 'other'), contains='size')


def test_training_transforms_are_those_of_training(photos):
    learn = pipeline(photos, item_tfms=RandomResizedCrop(8, min_scale=0.2), batch_tfms=[Dihedral()])
    stream = learn.expose(photos / 'other').outlier_exposure.stream
    x = stream.draw(60)
    assert len({tuple(o.flatten().tolist()) for o in x}) > 20  # four images, cropped anew each time
    stream.rewind()
    eq(stream.draw(60), x)


def as_given(dls, files):
    return [str(f) for f in files] if isinstance(dls.train.items, pd.DataFrame) else files


def test_pipelines_of_other_make(photos):
    files = sorted((photos / 'train').rglob('*.png'))
    df = pd.DataFrame(dict(f=[str(o) for o in files], y=[o.parent.name for o in files]))
    blocks = dict(blocks=(ImageBlock, CategoryBlock), get_x=ColReader('f'), get_y=ColReader('y'), item_tfms=Resize(8))
    read = DataBlock(**blocks).dataloaders(df, bs=4, num_workers=0)
    grey = DataBlock(**blocks | dict(blocks=(ImageBlock(PILImageBW), CategoryBlock))).dataloaders(
        df, bs=4, num_workers=0
    )
    halves = [range(0, 8, 2), range(1, 8, 2)]
    tfms = [[PILImage.create], [lambda o: int(o.parent.name == 'a')]]
    steps = dict(after_item=[Resize(8), ToTensor()], after_batch=[IntToFloatTensor()])
    mid = Datasets(files, tfms, splits=halves).dataloaders(bs=4, num_workers=0, **steps)
    other = photos / 'other/x'
    for dls, c in (read, 3), (grey, 1), (mid, 3):
        learn = Learner(dls, small_cnn(c, 2), loss_func=CrossEntropyLossFlat())
        close(learn.ood_scores(other), by_hand(learn, as_given(dls, sorted(other.iterdir()))), 1e-4)
        close(learn.ood_scores([Image.open(o) for o in sorted(other.iterdir())]), learn.ood_scores(other), 1e-4)
        eq(learn.expose(other).exposed(3)[0].shape, (3, c, 8, 8))


DEEP = {
    '16.png': lambda grey: grey.astype(np.uint16) * 257,
    '16.tif': lambda grey: grey.astype(np.uint16) * 257,
    '16.pgm': lambda grey: grey.astype(np.uint16) * 257,
    'float.tif': lambda grey: grey.astype(np.float32) / 255,
}


@pytest.mark.parametrize('name', DEEP)
def test_deep_files_are_scaled_in_a_learners_pipeline_too(name, photos, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (BIG, BIG), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / '8.png')
    Image.fromarray(DEEP[name](grey)).save(tmp_path / name)
    learn = pipeline(photos)
    want = learn.ood_scores(tmp_path / '8.png')
    for source in tmp_path / name, Image.open(tmp_path / name), [png(tmp_path / name)], [(str(tmp_path / name), -1)]:
        eq(learn.ood_scores(source), want)
    eq(next(pixel_batches(tmp_path / name, 1, learn)), next(pixel_batches(tmp_path / '8.png', 1, learn)))


def test_deep_files_without_a_range_are_refused_in_a_learners_pipeline_too(photos, tmp_path):
    Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)).save(tmp_path / '32.tif')
    Image.fromarray(np.arange(64, dtype=np.float32).reshape(8, 8)).save(tmp_path / 'float.tif')
    for name, why in ('32.tif', 'of the kind I: save it'), ('float.tif', 'save them in [0,1]'):
        fails(lambda: pipeline(photos).ood_scores(tmp_path / name), contains=why)


def test_an_opener_of_ones_own_sees_deep_files_as_they_are(photos, tmp_path):
    def dark(file: Path) -> PILImage:
        return PILImage.create(np.zeros((8, 8, 3), np.uint8))

    steps = dict(after_item=[ToTensor()], after_batch=[IntToFloatTensor()])
    files = sorted((photos / 'train').rglob('*.png'))
    sets = Datasets(files, [[dark], [lambda o: 0]], splits=[range(4), range(4, 8)])
    learn = Learner(sets.dataloaders(bs=4, num_workers=0, **steps), small_cnn(3, 2), loss_func=CrossEntropyLossFlat())
    Image.fromarray(np.full((8, 8), 60_000, np.uint16)).save(tmp_path / '16.png')
    eq(next(pixel_batches(tmp_path / '16.png', 1, learn)).max(), 0)


def test_a_damaged_file_is_named_in_a_learners_pipeline_too(photos, tmp_path):
    whole = (photos / 'other/x/0.png').read_bytes()
    (tmp_path / 'half.png').write_bytes(whole[: len(whole) // 2])
    for f in pipeline(photos).ood_scores, pipeline(photos).expose:
        fails(lambda: f(tmp_path), contains='half.png')


# Grey in colour


@pytest.mark.parametrize(
    'attack',
    [None, FGSM(4 / 255), PGD(4 / 255, 5, random_start=False), PGD(1, 3, norm='l2', random_start=False)],
    ids=str,
)
@pytest.mark.parametrize('data', ['Images', 'PyTorch', 'exported'])
def test_grey_images_are_attacked_in_three_channels(data, attack, tmp_path):
    torch.manual_seed(0)
    ins = Images(torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8), torch.arange(20) % 2, ['a', 'b'])
    dls = ins.dls(8)
    if data == 'PyTorch':
        dls = DataLoaders(*[DataLoader(TensorDataset(ins.x / 255, ins.y), 8)] * 2)
    learn = Learner(dls, small_cnn(3, 2), loss_func=CrossEntropyLossFlat())
    if data == 'exported':
        learn.export(tmp_path / 'l.pkl')
        learn = load_learner(tmp_path / 'l.pkl')
    for grey in X, X / 255, list(X), DataLoader(X, 7), Images(X):
        eq(
            learn.ood_scores(grey, attack=attack),
            learn.ood_scores(X.repeat(1, 3, 1, 1), attack=attack, bs=7 if isinstance(grey, DataLoader) else 256),
        )
    if attack:
        eq(learn.attacked_images(X, attack).shape, (24, 3, 8, 8))


def test_bytes_of_a_file(learn, files):
    eq(learn.ood_scores([dict(image=io.BytesIO(png(files[0])).getvalue())]).shape, (1,))


def test_a_function_that_repeats_itself_is_noticed(learn):
    with pytest.warns(UserWarning, match='the same outliers at every draw'):
        learn.expose(lambda n: X[:n])
    learn.unexpose()


def test_the_audit_takes_every_form(files):
    known = dict(train=train, test=list(test.x[:50]))
    table = audit(known, exposed=files, sets=dict(leak=train.x[:3] / 255, folder=files[0].parent), near=False)
    faults = table[(table.check == 'duplicates') & (table.verdict == 'fault')]
    assert set(faults.of) == {'leak', 'exposed'}  # training images, and the folder's in the files


NAMES = {
    'ids': (['n01443537', 'n01629819'], ['n02085620', 'n02086240'], None),
    'numbered': (['class 1', 'class2'], ['class 3', 'class4'], None),
    'marks': (['काम', 'कम'], ['किम', 'काल'], None),
    'accents': (['pe\u0301che', 'loup'], ['P\u00caCHE', 'chat'], None),
    'cyrillic': (['кошка', 'дом'], ['Кошка', 'лес'], 'кошка'),
    'digits': (['0', '1'], ['1', '2'], '1'),
    'composed': (['pe\u0302che', 'loup'], ['P\u00caCHE', 'chat'], 'pêche'),
    'counted': (['056.dog', '057.duck'], ['dog', 'cat'], 'dog'),
    'synonyms': (['Cat, tabby', 'dog'], ['0 - tabby', '1 - ox'], 'tabby'),
}


@pytest.mark.parametrize('kind', NAMES)
def test_class_names_on_both_sides(kind):
    a, b, shared = NAMES[kind]
    known, new = (Images(train.x[:2], [0, 1], names) for names in (a, b))
    table = audit(dict(train=known), sets=dict(new=new), near=False)
    found = table[(table.check == 'class names') & (table.verdict == 'fault')].found
    eq(list(found), [f'1: {shared}'] if shared else [])


def test_an_audit_of_no_images_is_refused():
    fails(lambda: audit(dict(train=train), exposed=X[:0]), contains='no images in exposed')


def test_files_come_from_several_processes(photos):
    learn = pipeline(photos, item_tfms=RandomResizedCrop(8), num_workers=2)
    stream = learn.expose(photos / 'other').outlier_exposure.stream
    x = stream.draw(30)
    stream.rewind()
    eq(stream.draw(30), x)
