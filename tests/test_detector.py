"The way from a learner to a flag: which images may calibrate, what travels, and what is refused."

import copy
import pickle
import shutil
import warnings

import fastai.callback.all  # noqa: F401 (brings `no_bar`)
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.data.transforms import Normalize
from fastai.learner import Learner, load_learner
from fastai.data.block import DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import get_image_files
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.augment import Resize
from fastai.vision.data import ImageBlock, ImageDataLoaders
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from aoe_nb.attack import FGSM
from aoe_nb.data import inliers, unseen
from aoe_nb.detector import _sum_of_bits, load_detector
from aoe_nb.evaluation import on_input
from aoe_nb.models import small_cnn, with_stats
from aoe_nb.peers import pytorch_ood_score


def trained(dls, c_in=1, epochs=20):
    torch.manual_seed(0)
    learn = Learner(dls, small_cnn(c_in, dls.c))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, 5e-3)
    return learn


@pytest.fixture(scope='module')
def learn():
    return trained(inliers('digits7').dls(32, valid=inliers('digits7', 'test'), normalize=([0.3], [0.37])))


@pytest.fixture
def det(learn):
    return learn.ood_detector()


@pytest.fixture(scope='module')
def strange():
    return {name: o.take(slice(0, 60)) for name, o in unseen(['digits389', 'flower'], id='digits7').items()}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Digits as files of 20x16 pixels, which a learner resizes"
    path = tmp_path_factory.mktemp('digits')
    for split, n in ('train', 126), ('valid', 400):
        digits = inliers('digits7', 'train' if split == 'train' else 'test').take(slice(0, n))
        for i, (x, y) in enumerate(zip(digits.x, digits.y)):
            file = path / split / digits.classes[y] / f'{i}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x[0].numpy()).resize((20, 16)).save(file)
    return path


@pytest.fixture(scope='module')
def of_files(folder):
    tfms = [Normalize.from_stats([0.3] * 3, [0.37] * 3, cuda=False)]
    kw = dict(item_tfms=Resize(8), batch_tfms=tfms, bs=32, num_workers=0, device=torch.device('cpu'), seed=0)
    return trained(ImageDataLoaders.from_folder(folder, valid='valid', **kw), 3)


# Which images may calibrate


def test_the_split_is_recorded_and_repeats(learn):
    one, same, other = (learn.ood_detector(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.scores, same.scores) and one.about['seed'] == 0
    assert not torch.equal(one.scores, other.scores)
    every = learn.ood_scores(learn.dls.valid)
    assert sorted([*one.scores.tolist(), *every[one.rest].tolist()]) == sorted(every.tolist())


def test_training_images_are_known_as_pixels_floats_and_loaders(learn):
    train = inliers('digits7')
    for source in train, train.x, train.x.float() / 255, learn.dls.train, list(train.x), [*train.x[:100], *train.x[:1]]:
        if isinstance(source, list):
            source = torch.stack(source)
        with pytest.raises(ValueError, match='trained the network'):
            learn.ood_detector(source)


def test_training_files_are_known_by_their_path(of_files, folder, tmp_path):
    for source in folder / 'train', str(folder / 'train'), sorted((folder / 'train').rglob('*.png')):
        with pytest.raises(ValueError, match='trained the network'):
            of_files.ood_detector(source)
    (tmp_path / 'test').symlink_to(folder / 'valid')
    with pytest.raises(ValueError, match='test images'):
        of_files.ood_detector(tmp_path / 'test')
    assert of_files.ood_detector(folder / 'valid').about['n'] == 400


def test_images_that_chose_an_epoch_are_refused(learn):
    other = inliers('digits7', 'test').x[:200] // 2  # darker, so not those of the validation set
    learn.add_cb(EarlyStoppingCallback())
    try:
        for source in None, learn.dls.valid, inliers('digits7', 'test').x:
            with pytest.raises(ValueError, match='early_stopping chose by these|test images'):
                learn.ood_detector(source)
        assert learn.ood_detector(other).about['n'] == 200
    finally:
        learn.remove_cb(EarlyStoppingCallback)


def test_what_cannot_be_seen_is_warned_of(learn):
    with pytest.warns(UserWarning, match='cannot be seen whether'):
        learn.ood_detector(((x, 0) for x in inliers('digits7', 'test').x.split(100)))


@pytest.mark.parametrize(
    ('settings', 'says'),
    [
        (dict(by='colour'), "None or 'class'"),
        (dict(fpr=0), 'between 0 and 1'),
        (dict(score='nll'), 'unknown score'),
        (dict(inliers=torch.zeros(30, 1, 8, 8)), 'takes 59 held-out inliers, there are 30'),
        (dict(inliers=torch.zeros(90, 3, 8, 8)), 'channels'),
        (dict(inliers=torch.zeros(90, 1, 9, 9)), 'size'),
    ],
)
def test_bad_input_leaves_no_detector(learn, settings, says):
    before = vars(learn).get('detector')
    with pytest.raises(ValueError, match=says):
        learn.ood_detector(**settings)
    assert vars(learn).get('detector') is before


def untrained(dls, n_out=None):
    torch.manual_seed(0)
    return Learner(dls, small_cnn(3, n_out or dls.c))


plain = dict(item_tfms=Resize(8), bs=32, num_workers=0, device=torch.device('cpu'), seed=0)


@pytest.mark.parametrize('kind', ['df', 'lists', 'get_x'])
def test_files_are_known_however_a_loader_names_them(folder, kind):
    files = get_image_files(folder)
    labels = [o.parent.name for o in files]
    if kind == 'df':
        df = pd.DataFrame(dict(name=[str(o.relative_to(folder)) for o in files], label=labels))
        dls = ImageDataLoaders.from_df(df, folder, fn_col='name', label_col='label', **plain)
    elif kind == 'lists':
        dls = ImageDataLoaders.from_lists(folder, files, labels, **plain)
    else:
        block = DataBlock(
            (ImageBlock, RegressionBlock(2)),
            get_items=lambda o: range(len(files)),
            get_x=lambda i: files[i],
            get_y=lambda i: [0.0, 1.0],
            item_tfms=Resize(8),
        )
        dls = block.dataloaders(folder, num_workers=0, device='cpu')
    learn = untrained(dls, 7)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        det = learn.ood_detector(fpr=0.1)
    assert len(det.seen) == len(det.scores)
    for source in files, [(o, 0) for o in files], folder:
        with pytest.raises(ValueError, match='trained the network'):
            learn.ood_detector(source)


def test_copies_of_training_files_are_known(of_files, folder, tmp_path):
    shutil.copytree(folder / 'train', tmp_path / 'copies')
    for source in tmp_path / 'copies', get_image_files(tmp_path / 'copies'):
        with pytest.raises(ValueError, match='126 of 126 inliers are copies of files that trained'):
            of_files.ood_detector(source)
    shutil.copytree(folder / 'valid', tmp_path / 'others')
    assert of_files.ood_detector(tmp_path / 'others').about['n'] == 400


def test_a_folder_of_test_images_has_folders(of_files, folder, tmp_path):
    (tmp_path / 'test').symlink_to(folder / 'valid')
    for source in tmp_path / 'test' / '4', get_image_files(tmp_path / 'test'):
        with pytest.raises(ValueError, match='test images'):
            of_files.ood_detector(source)


@pytest.mark.parametrize('shuffle', [True, False])
def test_half_of_a_shuffled_validation_set_cannot_be_kept_apart(learn, shuffle):
    def loader(images, shuffle):
        rows = torch.utils.data.TensorDataset(images.x.float() / 255, images.y)
        return torch.utils.data.DataLoader(rows, 64, shuffle=shuffle)

    dls = DataLoaders(loader(inliers('digits7'), True), loader(inliers('digits7', 'test'), shuffle))
    other = Learner(dls, small_cnn(1, 7), CrossEntropyLossFlat())
    if shuffle:
        with pytest.raises(ValueError, match='comes in another order each time'):
            other.ood_detector()
    else:
        with pytest.warns(UserWarning, match='cannot be seen whether'):
            assert len(other.ood_detector().rest) == 567


def test_every_class_of_the_network_has_a_name(folder):
    learn = untrained(ImageDataLoaders.from_folder(folder, valid='valid', **plain), 9)
    det = learn.ood_detector()
    assert det.about['classes'][-2:] == ['7', '8']
    with torch.no_grad():
        det.learn.model[-1].bias[8] = 99
    with pytest.raises(ValueError, match='too few held-out inliers are predicted as'):
        learn.ood_detector(by='class')
    assert (learn.ood_detector()(folder / 'valid')['class'] == '8').all()


def test_what_is_no_classifier(folder):
    block = DataBlock(
        (ImageBlock, RegressionBlock()), get_items=get_image_files, get_y=lambda o: 1.0, item_tfms=Resize(8)
    )
    learn = untrained(block.dataloaders(folder, num_workers=0, device='cpu'), 1)
    with pytest.raises(ValueError, match='names no class'):
        learn.ood_detector(fpr=0.1)
    assert learn.ood_detector(fpr=0.1, score=lambda logits: logits[:, 0].abs()).about['classes'] == ['0']
    block = DataBlock(
        (ImageBlock, MultiCategoryBlock),
        get_items=get_image_files,
        get_y=lambda o: [o.parent.name],
        item_tfms=Resize(8),
    )
    learn = untrained(block.dataloaders(folder, num_workers=0, device='cpu'), 7)
    with pytest.warns(UserWarning, match='several classes at once'):
        learn.ood_detector(fpr=0.1)


# A verdict on images in any form


def test_all_forms_of_an_image_are_judged_alike(of_files, folder):
    det = of_files.ood_detector()
    files = sorted((folder / 'valid' / '4').iterdir())[:3]
    table = det(files)
    assert table.file.tolist() == [str(o) for o in files]
    alone = [det(files[0]), det(str(files[0])), det(Image.open(files[0]))]
    for one in alone:
        assert np.allclose(one.score, table.score[:1], atol=1e-5) and one.outlier[0] == table.outlier[0]
    assert len(det(folder / 'valid')) == 400
    assert (table['class'] == '4').all()


def test_what_is_shown_is_what_was_judged(of_files, folder):
    det = of_files.ood_detector()
    axs = det.show(folder / 'valid', n=3)
    assert [ax.images[0].get_array().shape for ax in axs.flat] == [(8, 8, 3)] * 3
    first = det(folder / 'valid').sort_values('score', ascending=False).iloc[0]
    assert f'{first.score:.2f}' in axs.flat[0].get_title()


@pytest.mark.parametrize('source', ['shuffled', 'generator', 'one'])
def test_each_picture_has_its_own_score(det, source):
    test = inliers('digits7', 'test')
    images = dict(shuffled=test.dl(64, shuffle=True), generator=(o for o in test.x.split(100)), one=test.x[0])
    for ax in det.show(images[source], n=4).flat:
        pixels = torch.tensor(np.array(ax.images[0].get_array()))[:, :, :1].permute(2, 0, 1)
        assert f'{det(pixels).score[0]:.2f}' in ax.get_title()


def test_no_pictures(det):
    with pytest.raises(ValueError, match='at least 1, not 0'):
        det.show(inliers('digits7', 'test'), n=0)


def test_rows_are_called_by_their_file_or_number(of_files, folder):
    det = of_files.ood_detector()
    files = get_image_files(folder / 'valid')[:3]
    assert det(of_files.dls.test_dl(files)).file.tolist() == [str(o) for o in files]
    assert det(of_files.dls.valid).file.tolist() == [str(o) for o in of_files.dls.valid.items]
    assert det([Image.open(o) for o in files]).file.tolist() == ['0', '1', '2']
    assert det(of_files.dls.train).file.tolist()[:2] == ['0', '1']


def test_files_of_another_size_are_refused_where_nothing_resizes(folder, tmp_path):
    dls = ImageDataLoaders.from_folder(folder, valid='valid', bs=32, num_workers=0, device=torch.device('cpu'))
    det = untrained(dls).ood_detector()
    Image.new('RGB', (21, 16)).save(tmp_path / 'other.png')
    with pytest.raises(ValueError, match=r'made with images of \[3, 16, 20\], there is one of \[3, 16, 21\]'):
        det(tmp_path / 'other.png')
    files = [*get_image_files(folder / 'valid')[:100], tmp_path / 'other.png']
    loader = DataBlock((ImageBlock, MultiCategoryBlock), get_y=lambda o: ['4'], splitter=lambda o: ([0], range(101)))
    det = untrained(loader.dataloaders(files, bs=1, num_workers=0, device='cpu'), 7).ood_detector(files[1:])
    assert det.about['shape'] == [3, None, None] and len(det(tmp_path / 'other.png')) == 1


def test_a_network_that_breaks_down_is_strange(learn, det):
    def broken(logits):
        return torch.where(logits[:, 0] > 0, torch.nan, -logits.logsumexp(1))

    det.score = broken
    table = det(inliers('digits7', 'test'))
    assert table.score.isna().any()
    assert (table.outlier[table.score.isna()]).all() and (table.p[table.score.isna()] == 1 / (det.about['n'] + 1)).all()


def test_training_mode_and_gradients_stay(learn, det, strange):
    learn.model.train()
    before = det(strange['flower'])
    assert learn.model.training and all(p.requires_grad for p in learn.model.parameters())
    learn.model.eval()
    assert before.equals(det(strange['flower']))
    assert not learn.model.training


def test_a_network_that_went_on_training_is_refused(learn, det, strange):
    kept = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with torch.no_grad():
        learn.model[0].weight[0, 0, 0, 0] += 1e-3
    try:
        for use in det, lambda o: det.report(strange), lambda o: det.plot(strange), det.show:
            with pytest.raises(ValueError, match='has changed since'):
                use(strange['flower'])
        with pytest.warns(UserWarning, match='lacks what the detector flags'):
            assert 'found' not in learn.ood_report(strange)
    finally:
        learn.model.load_state_dict(kept)
    assert 'found' in learn.ood_report(strange)


def flipped(m):
    m[-1].weight.copy_(m[-1].weight.flip(0)), m[-1].bias.copy_(m[-1].bias.flip(0))


def exchanged(m):
    m[1].weight, m[1].bias = m[1].bias, m[1].weight


def with_eps(m):
    m[1].eps = 1.0


CHANGES = {
    'rows': flipped,
    'signs': lambda m: m[0].weight.neg_(),
    'names': exchanged,
    'activation': lambda m: m.__setitem__(2, torch.nn.GELU()),
    'eps': with_eps,
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_any_change_of_the_network_is_seen(learn, strange, change):
    mine = Learner(learn.dls, copy.deepcopy(learn.model), loss_func=learn.loss_func)
    det = mine.ood_detector()
    with torch.no_grad():
        change(mine.model)
    with pytest.raises(ValueError, match='has changed since'):
        det(strange['flower'])


def test_a_buffer_that_no_file_keeps_is_seen(learn, strange, tmp_path):
    mine, other, same = (
        Learner(learn.dls, with_stats(small_cnn(1, 7), ((mean,), (0.25,))), loss_func=learn.loss_func)
        for mean in (0.5, 0.2, 0.5)
    )
    file = mine.ood_detector().save(tmp_path / 'detector.safetensors')
    before = other.model[1][0].weight.clone()
    with pytest.raises(ValueError, match='detector.safetensors is of another network, which has these tensors'):
        load_detector(file, other)
    assert torch.equal(other.model[1][0].weight, before) and not hasattr(other, 'detector')
    assert load_detector(file, same)(strange['flower']).equals(mine.detector(strange['flower']))
    mine.model[0].mean += 0.3
    with pytest.raises(ValueError, match='has changed since'):
        mine.detector(strange['flower'])


def test_wrappers_and_rounding_change_nothing(learn, strange):
    mine = Learner(learn.dls, copy.deepcopy(learn.model), loss_func=learn.loss_func)
    det = mine.ood_detector()
    mine.model = torch.nn.DataParallel(torch.compile(mine.model, backend='eager'))
    det.answer = det.answer * (1 + 2e-3)  # as much as a GPU rounds
    assert len(det(strange['flower'])) == 60


class Noisy(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x + torch.rand_like(x))


def test_a_random_network_has_no_answer_to_compare(learn, strange):
    mine = Learner(learn.dls, Noisy(copy.deepcopy(learn.model)), loss_func=learn.loss_func)
    det = mine.ood_detector()
    assert det.answer is None and len(det(strange['flower'])) == 60


def test_detectors_of_an_earlier_version(learn, det, strange, tmp_path):
    file = det.save(tmp_path / 'detector.safetensors')
    with safe_open(file, 'pt') as f:
        tensors, about = {k: f.get_tensor(k) for k in f.keys() if k not in ('probe', 'answer')}, f.metadata()
    save_file(tensors, file, about)
    again = load_detector(file, Learner(learn.dls, small_cnn(1, 7)))
    assert again(strange['flower']).equals(det(strange['flower'])) and again.answer is None
    for name in 'probe', 'answer':
        vars(again).pop(name)
    again.weights = _sum_of_bits(again.learn.model)
    again = pickle.loads(pickle.dumps(again))
    assert again(strange['flower']).equals(det(strange['flower']))
    with torch.no_grad():
        again.learn.model[0].weight += 1
    with pytest.raises(ValueError, match='has changed since'):
        again(strange['flower'])


def test_other_images_and_another_split_are_refused(folder, strange, tmp_path):
    dls = ImageDataLoaders.from_folder(folder, valid_pct=0.6, **plain)
    learn = untrained(dls)
    det = learn.ood_detector()
    file = det.save(tmp_path / 'detector.safetensors')
    sets = dict(mine=folder / 'train' / '4')
    report = det.report(sets)
    norm = Normalize.from_stats([0.5] * 3, [0.1] * 3, cuda=False)
    cases = {
        'takes images of': dict(item_tfms=Resize(16)),
        'normalises with': dict(batch_tfms=norm),
        'not the one that this detector': dict(seed=1),
        'so which of its images are left': dict(valid_pct=0.5),
    }
    for says, settings in cases.items():
        other = ImageDataLoaders.from_folder(folder, **dict(valid_pct=0.6) | plain | settings)
        learn.dls = other
        with pytest.raises(ValueError, match=says):
            det.report(sets)
        with pytest.raises(ValueError, match=says):
            load_detector(file, untrained(other)).report(sets)
    learn.dls = dls
    assert det.report(sets).equals(report)
    assert load_detector(file, untrained(dls)).report(sets).equals(report)


# What it costs


def test_rates_by_hand(learn, det, strange):
    report = det.report(strange)
    rest = learn.ood_scores(learn.dls.valid)[det.rest]
    assert np.allclose(report.flagged, (rest > det.threshold).float().mean())
    for name, images in strange.items():
        found = (learn.ood_scores(images) > det.threshold).float().mean()
        assert np.isclose(report.found[name], found)
        assert report.found_lo[name] <= found <= report.found_hi[name]
    beside = learn.ood_report(strange)
    assert np.allclose(beside.found[list(strange)], report.found) and np.allclose(
        beside.flagged, report.flagged.iloc[0]
    )
    assert np.isclose(beside.found['mean natural'], report.found.mean())
    assert 'found' not in learn.ood_report(strange, score='msp')


def test_an_attack_hides_outliers_and_makes_inliers_strange(det, strange):
    clean, ood, both = det.report(strange), det.report(strange, FGSM(0.1)), det.report(strange, FGSM(0.1), 'both')
    assert (ood.found <= clean.found).all() and np.allclose(ood.flagged, clean.flagged)
    assert (both.flagged > clean.flagged).all()


def test_a_report_on_the_images_that_made_it_is_refused(learn, strange):
    test = inliers('digits7', 'test')
    det = learn.ood_detector(test.x[:500])
    with pytest.raises(ValueError, match='500 of the 500 inliers made this detector'):
        det.report(strange, inliers=test.take(slice(0, 500)))
    assert det.report(strange, inliers=test.take(slice(500, None))).n_in.iloc[0] == len(test) - 500


def test_each_class_keeps_its_promise(learn, strange):
    det = learn.ood_detector(fpr=0.1, confidence=None, by='class')
    with pytest.raises(ValueError, match='too few held-out inliers are predicted as'):
        learn.ood_detector(fpr=0.01, by='class')
    table = det(learn.dls.valid)
    for name, threshold in det.threshold.items():
        mine = table[table['class'] == name]
        assert (mine.outlier == (mine.score > threshold)).all()
    columns = learn.ood_report(strange)
    assert np.allclose(columns.found[list(strange)], det.report(strange).found)
    assert 'threshold for each predicted class' in repr(det)


# It travels


@pytest.mark.parametrize('score', ['energy', 'msp', 'peer', 'lambda'])
def test_export_takes_it_along(learn, strange, score, tmp_path):
    own = dict(peer=lambda: pytorch_ood_score('KNN', learn, k=5), **{'lambda': lambda: lambda o: -o.amax(1)})
    det = learn.ood_detector(score=own[score]() if score in own else score)
    learn.path = tmp_path
    learn.export('model.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path / 'model.pkl')
    assert loaded.detector(strange['flower']).equals(det(strange['flower']))
    assert loaded.detector.learn is loaded
    with pytest.warns(UserWarning, match='cannot be seen whether'):
        loaded.ood_detector(inliers('digits7', 'test').x[:100])


@pytest.mark.parametrize('by', [None, 'class'])
def test_safetensors_hold_it_all(learn, strange, by, tmp_path):
    det = learn.ood_detector(fpr=0.1, confidence=None, by=by)
    file = det.save(tmp_path / 'detector.safetensors')
    other = Learner(learn.dls, small_cnn(1, learn.dls.c))
    again = load_detector(file, other)
    assert again(strange['flower']).equals(det(strange['flower']))
    assert again.report(strange).equals(det.report(strange)) and again.about == det.about


def test_loading_checks_before_it_changes(learn, det, of_files, tmp_path):
    file = det.save(tmp_path / 'detector.safetensors')
    before = of_files.model[0].weight.clone()
    with pytest.raises(ValueError, match='another network'):
        load_detector(file, of_files)
    plain = Learner(inliers('digits7').dls(64), small_cnn(1, learn.dls.c))
    with pytest.raises(ValueError, match='normalises with'):
        load_detector(file, plain)
    (tmp_path / 'noise').write_bytes(b'no tensors')
    with pytest.raises(ValueError, match='is no saved detector'):
        load_detector(tmp_path / 'noise', learn)
    assert torch.equal(before, of_files.model[0].weight)


def less(key, n):
    return lambda tensors, about: (tensors | {key: tensors[key][:n]}, about)


DAMAGED = {
    'no metadata': lambda tensors, about: (tensors, '{}'),
    'a list': lambda tensors, about: (tensors, '[]'),
    'no JSON': lambda tensors, about: (tensors, about[:-1]),
    'another score': lambda tensors, about: (tensors, about.replace('"energy"', '"mine"')),
    'a rate in words': lambda tensors, about: (tensors, about.replace('"fpr": 0.05', '"fpr": "few"')),
    'no scores': lambda tensors, about: ({k: v for k, v in tensors.items() if k != 'scores'}, about),
    'five scores': less('scores', 5),
    'a few scores lost': less('scores', 560),
}


@pytest.mark.parametrize('damage', DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_and_leaves_the_learner_alone(learn, det, damage, tmp_path):
    file = det.save(tmp_path / 'detector.safetensors')
    with safe_open(file, 'pt') as f:
        tensors, about = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()['detector']
    tensors, about = damage(tensors, about)
    save_file(tensors, file, dict(detector=about))
    other = Learner(learn.dls, small_cnn(1, 7))
    before = other.model[0].weight.clone()
    with pytest.raises(ValueError, match='detector.safetensors is no saved detector .*give a whole file'):
        load_detector(file, other)
    assert torch.equal(other.model[0].weight, before)


def test_a_score_with_code_is_not_saved(learn, tmp_path):
    det = learn.ood_detector(score=on_input(lambda model, x: x.flatten(1).mean(1)))
    with pytest.raises(ValueError, match='score of your own'):
        det.save(tmp_path / 'detector.safetensors')
    assert not list(tmp_path.iterdir())


def test_the_watch_uses_the_held_out_scores(det, strange):
    watch = det.monitor(alarm=0.01)
    watch.update(det(inliers('digits7', 'test').take(det.rest).take(slice(0, 200))).score)
    assert not watch.alarmed
    watch.update(det(strange['flower']).score)
    assert watch.alarmed and watch.alarmed_at > 200
