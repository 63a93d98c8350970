"Hostile or broken input: files that lie, loaders that fail, interruptions; what is refused is named, the rest goes on."

import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader as FastaiLoader
from fastai.learner import Learner
from fastcore.test import test_eq as eq, test_fail as fails
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import aoe_nb.exposure  # noqa: F401 (what Learner gains)
from aoe_nb import record, sources
from aoe_nb.attack import FGSM, PGD
from aoe_nb.batchnorm import bn_ways
from aoe_nb.data import inliers, outliers
from aoe_nb.energy import energy
from aoe_nb.models import small_cnn
from aoe_nb.sources import cached, fit, image_files, read_file, read_list
from aoe_nb.stream import Numbered, OutlierStream
from aoe_nb.study import grid
from aoe_nb.study import train as study
from aoe_nb.study.claims import claims, runs_of
from aoe_nb.study.protocol import chosen, start_config

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
train, test = (inliers('digits7', split) for split in ('train', 'test'))
china = outliers('china')


# Files that unpack to more than the memory


def header(shape, dtype='|u1', version=(1, 0)):
    "What stands in front of an array in an .npy"
    f = io.BytesIO()
    write = np.lib.format.write_array_header_1_0 if version == (1, 0) else np.lib.format.write_array_header_2_0
    write(f, dict(descr=dtype, fortran_order=False, shape=shape))
    return f.getvalue()


def packed(path, **members):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as f:
        for name, content in members.items():
            f.writestr(f'{name}.npy', content)


def with_size(path, size):
    "The .npz with another size in its table of contents"
    data = path.read_bytes()
    entry = data.rindex(b'PK\x01\x02')
    path.write_bytes(data[: entry + 24] + struct.pack('<I', size) + data[entry + 28 :])


UNPACK = """
import resource, sys
from aoe_nb.sources import read_file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: read_file(sys.argv[1])
except ValueError as e: print(e)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)/1e3)
"""


def python(code, *args):
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *args], env=ENV, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr[-2000:]
    return res.stdout.splitlines()


@pytest.fixture(scope='module')
def little_memory():
    return UNPACK.replace('before =', 'from aoe_nb import sources; sources._memory = lambda: 2e8\nbefore =')


def test_a_bomb_is_refused_before_anything_is_unpacked(tmp_path, little_memory):
    n = 100_000
    path = tmp_path / 'bomb.npz'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z, z.open('x.npy', 'w') as f:
        f.write(header((n, 3, 32, 32)))
        for _ in range(n // 1000):
            f.write(bytes(1000 * 3072))
    assert path.stat().st_size < 1e6
    *said, megabytes = python(little_memory, str(path))
    assert 'bomb.npz' in said[0] and '0.3 GB' in said[0] and 'an .npy stays on the disk' in said[0]
    assert float(megabytes) < 30


@pytest.mark.parametrize('version', [(1, 0), (2, 0)])
def test_an_array_that_claims_to_be_large(tmp_path, version):
    path = tmp_path / 'claim.npz'
    packed(path, x=header((10**10, 3, 32, 32), version=version) + bytes(1000))
    fails(lambda: read_file(path), contains='30,720.0 GB')
    fails(lambda: outliers(path), contains='claim.npz')


def test_a_size_in_the_table_of_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, '_memory', lambda: 1e9)
    path = tmp_path / 'toc.npz'
    packed(path, x=header((1, 3, 32, 32)) + bytes(3072))
    eq(read_file(path).shape, (1, 3, 32, 32))
    with_size(path, 4 * 10**9)
    fails(lambda: read_file(path), contains='4.0 GB')
    with_size(path, 100)  # less than there is: no more than that is ever unpacked
    fails(lambda: read_file(path), contains='toc.npz')


def test_tensors_that_claim_to_be_large(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, '_memory', lambda: 1e9)
    torch.save(torch.zeros(1, dtype=torch.uint8).expand(10**7, 3, 32, 32), tmp_path / 'one.pt')  # one number for all
    fails(lambda: read_file(tmp_path / 'one.pt'), contains='30.7 GB')
    torch.save(torch.zeros(100_000, 3, 8, 8, dtype=torch.uint8), tmp_path / 'stored.pt')
    with zipfile.ZipFile(tmp_path / 'stored.pt') as stored, zipfile.ZipFile(tmp_path / 'bomb.pt', 'w') as bomb:
        for o in stored.infolist():
            bomb.writestr(o.filename, stored.read(o), zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(sources, '_memory', lambda: 1e7)
    monkeypatch.setattr(torch, 'load', lambda *args, **kw: pytest.fail('it was unpacked'))
    fails(lambda: read_file(tmp_path / 'bomb.pt'), contains='bomb.pt')


def test_a_strip_is_no_bomb(tmp_path):
    Image.new('L', (10**6, 1)).save(tmp_path / 'strip.png')  # a kilobyte, and 3 GB at 32 pixels in height
    fails(lambda: outliers(tmp_path, size=32), contains='strip.png')
    fails(lambda: outliers(tmp_path, size=32), contains='1000000 by 1 pixels')
    eq(fit(Image.new('L', (2000, 1)), 32).shape, (1, 32, 32))


@pytest.mark.parametrize('where', ['a header', 'a name', 'the end'])
def test_a_corrupt_cache_is_made_again(tmp_path, where, capsys):
    path = tmp_path / 'set.npz'

    def make():
        return IMAGES, [0, 1, 0], ['a', 'b']

    cached(path, make)
    whole = path.read_bytes()
    changed = dict(
        [
            ('a header', whole.replace(b'(3, 3, 8, 8), }' + b' ' * 20, b'(' + b'9' * 25 + b', 3, 8), }')),
            ('a name', whole.replace(b'classes', b'cl\xffsses')),
            ('the end', whole[:-30]),
        ]
    )[where]
    assert changed != whole
    path.write_bytes(changed)
    eq(cached(path, make)[0], IMAGES)
    assert 'set.npz is damaged' in capsys.readouterr().out
    eq(path.read_bytes(), whole)


# A million outliers

MAPPED = """
import resource, sys, torch, numpy as np
import aoe_nb.exposure
from aoe_nb.attack import FGSM
from aoe_nb.data import outliers
from aoe_nb.images import Images
from aoe_nb.models import small_cnn
from fastai.learner import Learner

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3
x = torch.randint(256, (96,3,32,32), dtype=torch.uint8)
data = Images(x, torch.arange(96)%3, ['a','b','c'])
learn = Learner(data.dls(32, valid=data), small_cnn(3, 3))
with learn.no_bar(), learn.no_logging():
    learn.fit(1)
    before = peak()
    learn.expose(sys.argv[1], attack=FGSM(8/255)).fit(1)
    if sys.argv[2] == 'uint8': learn.expose(outliers(sys.argv[1])).fit(1)
assert not np.isnan(learn.recorder.values[-1][-1])
print(peak()-before)
"""


@pytest.mark.parametrize('dtype', ['uint8', 'float32'])
def test_a_million_outliers_stay_on_the_disk(tmp_path, dtype):
    path = tmp_path / 'million.npy'
    np.lib.format.open_memmap(path, mode='w+', dtype=dtype, shape=(10**6, 3, 32, 32))  # 3 GB with nothing in them
    assert float(python(MAPPED, str(path), dtype)[-1]) < 300


def test_a_mapped_file_is_named_where_it_is_found_to_be_wrong(tmp_path):
    path = tmp_path / 'late.npy'
    x = np.zeros((1100, 1, 8, 8), np.float32)
    x[1050:] = 255
    np.save(path, x)
    stream = OutlierStream(path)
    fails(lambda: stream.draw(1100), contains='late.npy span')
    x[3] = np.nan
    np.save(path, x)
    fails(lambda: OutlierStream(path), contains='late.npy span')


# Loaders that fail, and interruptions


class Failing(Dataset):
    "Images, one of which cannot be read while `broken`"

    broken = True

    def __init__(self, images, at):
        self.images = images
        self.at = at

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        if self.broken and i == self.at:
            raise KeyError('no such image')
        x = self.images.x[i] / 255
        return x if self.images.y is None else (x, self.images.y[i])


def new_learner(images=train):
    torch.manual_seed(0)
    return Learner(images.take(slice(160)).dls(32, valid=test), small_cnn(1, 7))


def trained(learn, *args, **kw):
    with learn.no_bar(), learn.no_logging():
        learn.fit(*args, **kw)
    return learn


def assert_untouched(learn):
    "Every layer has its class's `forward`, its mode and no hooks"
    for m in learn.model.modules():
        assert 'forward' not in vars(m), m
        assert not m._forward_hooks and not m._forward_pre_hooks and not m._backward_hooks
    assert all(p.requires_grad for p in learn.model.parameters())


def assert_usable(learn, modes=(True,)):
    "It can be trained, measured, saved, and taken back"
    assert_untouched(learn)
    assert {m.training for m in learn.model.modules()} <= set(modes)
    eq(len(learn.validate()), 1)
    trained(learn, 1)
    x, moved = learn.exposed(4)
    assert len(x) == len(moved) == 4
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert_untouched(learn)
    trained(learn.unexpose(), 1)


def interrupted_batches(data):
    "An iterator, which cannot start over and is over once it has failed"
    yield from DataLoader(data, batch_size=20)


LOADERS = {
    'pytorch': lambda data: DataLoader(data, batch_size=20),
    'pytorch, shuffled': lambda data: DataLoader(data, batch_size=20, shuffle=True),
    'fastai': lambda data: FastaiLoader(data, bs=20),
    'iterator': interrupted_batches,
}


@pytest.mark.parametrize('kind', LOADERS)
def test_a_loader_of_outliers_that_fails(kind):
    data = Failing(china.take(slice(100)), 70)
    learn = new_learner().expose(LOADERS[kind](data), attack=FGSM(8 / 255))
    with pytest.raises(RuntimeError, match=r'batch \d of its pass \(KeyError: .no such image'):
        trained(learn, 1)
    assert_untouched(learn)
    data.broken = False
    if kind == 'iterator':
        fails(lambda: trained(learn, 1), contains='cannot start over')
        learn.expose(china, attack=FGSM(8 / 255))
    assert_usable(learn)


def test_the_failing_batch_is_counted_and_the_state_can_be_kept():
    data = Failing(china.take(slice(100)), 25)
    stream = OutlierStream(DataLoader(data, batch_size=10))
    with pytest.raises(RuntimeError, match='batch 3 of its pass'):
        stream.draw(30)  # the first draw of all: nothing is left of any batch
    again = OutlierStream(DataLoader(china.x[:100], batch_size=10))
    again.load_state_dict(stream.state_dict())
    assert again.draw(10).shape == (10, 1, 8, 8)
    eq(stream.draw(10), china.x[30:40] / 255)
    eq(stream.draw(60), china.x[40:100] / 255)
    with pytest.raises(RuntimeError, match='batch 3 of its pass'):
        stream.draw(30)


@pytest.mark.parametrize('error', [ValueError, TypeError, OSError])
def test_who_catches_an_error_of_a_loader_still_does(error):
    stream = OutlierStream(DataLoader(Raising(error), batch_size=10))
    with pytest.raises(error, match='batch 1 of its pass'):
        stream.draw(1)


class Raising(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 100

    def __getitem__(self, i):
        raise self.error('broken')


@pytest.mark.parametrize('bn', list(bn_ways))
def test_a_loader_of_inliers_that_fails(bn):
    data = Failing(train.take(slice(160)), 100)
    dls = DataLoaders(DataLoader(data, batch_size=32), DataLoader(Failing(test, None), batch_size=32))
    torch.manual_seed(0)
    learn = Learner(dls, small_cnn(1, 7), loss_func=torch.nn.CrossEntropyLoss())
    learn.expose(china, attack=FGSM(8 / 255), bn=bn)
    with pytest.raises(RuntimeError, match='loader of inliers failed at batch 4 of its pass .KeyError: .no such image'):
        trained(learn, 1)
    data.broken = False
    assert_usable(learn, (True, False))


def test_a_loader_that_counts_is_left_out_of_exports():
    dl = test.dl(100)
    numbered = Numbered(dl, 'inliers')
    eq((len(numbered), numbered.bs), (len(dl), 100))
    content = pickle.dumps(numbered)
    assert b'Numbered' not in content
    eq(type(pickle.loads(content)), type(dl))
    eq(torch.cat([x for x, _ in numbered]), torch.cat([x for x, _ in dl]))


def interrupt_at(n, f=energy):
    "`f`, which the user interrupts the `n`th time"
    calls = []

    def interrupted(logits):
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt
        return f(logits)

    return interrupted


@pytest.mark.parametrize('bn', list(bn_ways))
@pytest.mark.parametrize('n', [1, 5])
def test_an_interruption_in_the_attack(bn, n):
    learn = new_learner().expose(china, attack=PGD(8 / 255, steps=3), bn=bn, score=interrupt_at(n))
    with pytest.raises(KeyboardInterrupt):
        trained(learn, 1)
    assert_usable(learn, (True, False))


class Stop(torch.nn.Module):
    "The user interrupts while a pass of the attack, in eval mode, goes through the network"

    armed = True

    def forward(self, x):
        if Stop.armed and not self.training and x.requires_grad:
            raise KeyboardInterrupt
        return x


def test_an_interruption_within_the_network():
    Stop.armed = True
    torch.manual_seed(0)
    net = small_cnn(1, 7)
    learn = Learner(train.take(slice(160)).dls(32, valid=test), torch.nn.Sequential(net[0], Stop(), *net[1:]))
    learn.expose(china, attack=FGSM(8 / 255), bn='aux', attack_in=FGSM(2 / 255))
    with pytest.raises(KeyboardInterrupt):
        trained(learn, 1)
    Stop.armed = False
    assert_usable(learn)


def test_training_after_an_interruption_is_what_it_would_have_been():
    "An interruption before the first step leaves nothing behind, random numbers included"

    class Once(Callback):
        order = 4  # before the exposure
        done = False

        def before_batch(self):
            if not self.done:
                self.done = True
                raise KeyboardInterrupt

    def weights(interrupted):
        learn = new_learner().expose(china, attack=PGD(8 / 255, steps=2, random_start=True), bn='separate')
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                trained(learn, 1, cbs=Once())
        torch.manual_seed(1)
        learn.dls.train.rng.seed(0)
        return trained(learn, 1).model.state_dict()

    for a, b in zip(weights(False).values(), weights(True).values()):
        eq(a, b)


# Links and what is no file


def test_links_that_lead_nowhere_or_everywhere(tmp_path):
    d = tmp_path / 'images'
    d.mkdir()
    Image.fromarray(IMAGES[0, 0]).save(d / '0.png')
    (d / 'up').symlink_to(tmp_path)
    (tmp_path / 'self').symlink_to(tmp_path / 'self')
    (tmp_path / 'a').symlink_to(tmp_path / 'b')
    (tmp_path / 'b').symlink_to(tmp_path / 'a')
    eq(image_files(d), [d / '0.png'])
    for loop in 'self', 'a':
        fails(lambda: outliers(tmp_path / loop), contains='neither a file, a folder')
        fails(lambda: new_learner().expose(tmp_path / loop), contains=loop)
    for name in 'x.png', 'y.png':
        (d / name).symlink_to(d / name)
        fails(lambda: outliers(d), contains=name)
        fails(lambda: new_learner().expose(d), contains=name)
        (d / name).unlink()
    (d / 'gone.png').symlink_to(d / 'nothing')
    fails(lambda: outliers(d), contains='gone.png')


def test_links_among_many_folders_are_not_followed_for_ever(tmp_path):
    for i in range(10):
        (tmp_path / f'{i}').mkdir()
        for j in range(10):
            (tmp_path / f'{i}/to{j}').symlink_to(tmp_path / f'{j}')
    fails(lambda: outliers(tmp_path), contains='in more than 100 ways')


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no pipes')
def test_a_pipe_does_not_let_us_wait(tmp_path):
    Image.fromarray(IMAGES[0, 0]).save(tmp_path / '0.png')
    os.mkfifo(tmp_path / 'pipe')  # without an ending: no image
    eq(len(outliers(tmp_path)), 1)
    for name in '1.png', 'x.npz', 'x.pt', 'x.npy':
        os.mkfifo(tmp_path / name)
        fails(lambda: outliers(tmp_path / name if '.png' not in name else tmp_path), contains=name)


# Fuzzing


class Evil:
    "A pickle that would make a file"

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def in_file(write):
    f = io.BytesIO()
    write(f)
    return f.getvalue()


def npy(x):
    return in_file(lambda f: np.save(f, x))


PNG = in_file(lambda f: Image.fromarray(IMAGES[0].transpose(1, 2, 0)).save(f, 'PNG'))
VALID = {
    '.npy': [npy(IMAGES), npy(IMAGES / 255.0), npy(IMAGES.reshape(9, 8, 8).astype(np.float32) / 255)],
    '.npz': [in_file(lambda f: np.savez(f, x=IMAGES)), in_file(lambda f: np.savez_compressed(f, y=[1], x=IMAGES))],
    '.pt': [
        in_file(lambda f: torch.save(torch.tensor(IMAGES), f)),
        in_file(lambda f: torch.save(torch.tensor(IMAGES), f, _use_new_zipfile_serialization=False)),
    ],
    '.png': [PNG, in_file(lambda f: Image.fromarray(IMAGES[0, 0]).save(f, 'GIF'))],
    '.tif': [in_file(lambda f: Image.fromarray(IMAGES[0, 0].astype(np.float32) / 255).save(f, 'TIFF'))],
    '.csv': [b'image,label\n0.png,1\n'],
    '.txt': [b'tin/0.png -1\ntin/0.png 3\n'],
}


PLACE = st.integers(0, 10**6)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just('set'), PLACE, st.binary(min_size=1, max_size=4)),
        st.tuples(st.just('insert'), PLACE, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just('drop'), PLACE, st.integers(1, 64)),
        st.tuples(st.just('cut'), PLACE, st.none()),
        st.tuples(st.just('digits'), PLACE, st.sampled_from([b'9' * 12, b'-1', b'0', b'9' * 40])),
    ),
    min_size=1,
    max_size=4,
)


def mutations(valid):
    "Bytes that are nearly one of the `valid` ones"
    return st.builds(mutated, st.sampled_from(valid), CHANGES)


def mutated(data, changes):
    for what, place, by in changes:
        i = place % (len(data) + 1)
        if what == 'set':
            data = data[:i] + by + data[i + len(by) :]
        elif what == 'insert':
            data = data[:i] + by + data[i:]
        elif what == 'drop':
            data = data[:i] + data[i + by :]
        elif what == 'cut':
            data = data[:i]
        else:  # a number in a header
            j = next((k for k in range(len(data)) if k >= place % 200 and data[k : k + 1].isdigit()), len(data))
            data = data[:j] + by + data[j + 1 :]
    return data


def in_archive(data, changes):
    "The archive `data` with a change in each member, whose checksums are right"
    f = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(f, 'w') as new:
        for o in old.infolist():
            new.writestr(o.filename, mutated(old.read(o), changes), o.compress_type)
    return f.getvalue()


def in_chunks(data, changes):
    "The PNG `data` with a change in each chunk, whose checksums are right"
    res = data[:8]
    i = 8
    while i < len(data):
        size = int.from_bytes(data[i : i + 4], 'big')
        chunk = mutated(data[i + 8 : i + 8 + size], changes)
        kind = data[i + 4 : i + 8]
        res += struct.pack('>I', len(chunk)) + kind + chunk + struct.pack('>I', zlib.crc32(kind + chunk))
        i += size + 12
    return res


def with_checksums(suffix):
    "Bytes that nothing but their content is wrong with, where a format has checksums"
    zips = [o for o in VALID[suffix] if o[:2] == b'PK']
    if zips:
        return st.builds(in_archive, st.sampled_from(zips), CHANGES)
    return st.builds(in_chunks, st.just(PNG), CHANGES) if suffix == '.png' else st.nothing()


def contents(suffix):
    magic = st.sampled_from([o[:10] for o in VALID[suffix]])
    return st.one_of(
        with_checksums(suffix),
        mutations(VALID[suffix]),
        mutations(sum(VALID.values(), [])),
        st.binary(max_size=300),
        st.builds(lambda a, b: a + b, magic, st.binary(max_size=300)),
    )


def read_any(path):
    "Images, or one of the errors that a reader may raise, with the file's name"
    try:
        if path.suffix == '.txt':
            files, labels = read_list(path)
            assert len(files) == len(labels) > 0
        else:
            x = outliers(path).x
            assert x.dtype == torch.uint8 and x.ndim == 4
            OutlierStream(path).draw(2) if len(x) else None
    except (ValueError, TypeError, OSError) as e:
        assert path.name in str(e), (type(e), str(e))
        assert not isinstance(e, UnicodeError)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    d = tmp_path_factory.mktemp('fuzz')
    for place in 'benchmark_imglist/cifar10', 'images_classic/tin':
        (d / place).mkdir(parents=True)
    (d / 'images_classic/tin/0.png').write_bytes(PNG)
    return d


def place_of(root, suffix):
    return root / ('benchmark_imglist/cifar10' if suffix == '.txt' else '.') / f'file{suffix}'


@pytest.mark.parametrize('suffix', VALID)
def test_what_is_valid_is_read(root, suffix):
    for data in VALID[suffix]:
        path = place_of(root, suffix)
        path.write_bytes(data)
        if suffix == '.csv':
            fails(lambda: outliers(path), contains='file.csv')
        elif suffix == '.txt':
            eq(read_list(path)[1], [-1, 3])
        else:
            assert len(outliers(path)) in (1, 3, 9)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('suffix', VALID)
def test_readers_give_images_or_name_the_file(root, suffix):
    path = place_of(root, suffix)
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=checks)
    @given(contents(suffix))
    def read(data):
        path.write_bytes(data)
        read_any(path)

    read()


@pytest.mark.parametrize('suffix', ['.npy', '.npz', '.pt', '.pth', '.png'])
@pytest.mark.parametrize('form', ['a pickle', 'a legacy file', 'a zip', 'an array of objects', 'an archive of objects'])
def test_no_code_is_run(tmp_path, suffix, form):
    marker = tmp_path / 'ran'
    evil = Evil(marker)
    objects = np.array([evil], dtype=object)
    data = {
        'a pickle': pickle.dumps(evil),
        'a legacy file': in_file(lambda f: torch.save([evil], f, _use_new_zipfile_serialization=False)),
        'a zip': in_file(lambda f: torch.save({'x': evil}, f)),
        'an array of objects': npy(objects),
        'an archive of objects': in_file(lambda f: np.savez(f, x=objects)),
    }[form]
    path = tmp_path / f'file{suffix}'
    path.write_bytes(data)
    for read in outliers, OutlierStream, lambda p: new_learner().expose(p):
        with pytest.raises((ValueError, TypeError, OSError), match=f'file{suffix}'):
            read(path)
    assert not marker.exists()
    cached(path, lambda: (IMAGES, None, None))
    assert not marker.exists()


def test_a_list_stays_in_its_folder(root):
    path = root / 'benchmark_imglist/cifar10/list.txt'
    for line in '/etc/hostname -1', '../../secret.png 0', 'tin/../../x.png 0':
        path.write_text(line)
        fails(lambda: read_list(path), contains='list.txt names a file that lies elsewhere')
    for line in 'tin/0.png 99999999999', 'tin/0.png ' + '9' * 5000, 'tin/0.png 1.5':
        path.write_text(line)
        fails(lambda: read_list(path), contains='list.txt has a line without a label')
    path.write_text('a' * 5000 + '.png 1')
    fails(lambda: read_list(path), contains='list.txt are missing')
    path.write_bytes(b'tin/\xff.png 1')
    fails(lambda: read_list(path), contains='list.txt is no list')


# The study's results


def test_who_reads_results_names_the_damaged_one(tmp_path):
    for name in 'grid', 'starts':
        if (ROOT / 'results' / name).exists():
            shutil.copytree(ROOT / 'results' / name, tmp_path / name)
    shutil.copy(ROOT / 'results/chosen.json', tmp_path)
    victim = sorted((tmp_path / 'grid').glob('aoe-cifar10-*.json'))[0]
    whole = victim.read_text()
    for bad in whole[:500], whole.replace('"seed": 0', '"seed": 7'), '[]':
        victim.write_text(bad)
        for read in (lambda: runs_of('cifar10', tmp_path)), (lambda: claims(tmp_path)):
            fails(read, contains=victim.name)
    victim.write_text(whole)
    lock = tmp_path / 'chosen.json'
    lock.write_text(lock.read_text()[:-9])
    for read in (lambda: chosen(tmp_path)), (lambda: runs_of('cifar10', tmp_path)):
        fails(read, contains='chosen.json is cut')


class Counting(torch.nn.Module):
    "Counts the images that a network is trained on"

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        if self.training:
            self.seen.append(len(x))
        return x


def toy_start(monkeypatch, seen):
    "A start of few images that trains in a second"

    def data(id, split='train'):
        return train.take(slice(64)) if split == 'train' else test.take(slice(32))

    def net(n, stats):
        return torch.nn.Sequential(Counting(seen), small_cnn(1, 7))

    monkeypatch.setattr(study, 'inliers', data)
    monkeypatch.setattr(study, 'view_of', lambda view, id: (data(id, 'test'), {}))
    monkeypatch.setattr(study, 'networks', dict(resnet20=net))
    return start_config | dict(experiment='starts', epochs=2, bs=32, seed=1)


def test_a_start_that_is_killed_before_its_result_is_written_is_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    config = toy_start(monkeypatch, seen)
    path = record.result_path(config, tmp_path / 'results')
    write = record.write_whole

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(record, 'write_whole', killed)
    with pytest.raises(KeyboardInterrupt):
        grid.run_cell(config, tmp_path / 'results')
    assert path.with_suffix('.pth').exists() and not path.exists()
    weights = sorted((tmp_path / 'weights').glob('*.pt'))
    before = torch.load(weights[0])
    monkeypatch.setattr(record, 'write_whole', write)
    steps = len(seen)
    result = grid.run_cell(config, tmp_path / 'results')
    eq(steps, 4)
    eq(len(seen), steps)  # nothing is trained again
    eq(len(result['log']), 2)
    for name, after in torch.load(weights[0]).items():
        eq(after, before[name])
    assert path.exists() and not path.with_suffix('.pth').exists()
    eq(grid.run_cell(config, tmp_path / 'results'), result)
