"Results and checkpoints that were cut, edited or made to harm; a disk that is full."

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from aoe_nb.cache import kept
from aoe_nb.generate import Checkpoint
from aoe_nb.images import Images
from aoe_nb.record import read_result, read_results, result_path, run, write_whole
from aoe_nb.study.search import done_in
from aoe_nb.study.train import nesterov
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'results'
ENV = os.environ | dict(PYTHONPATH=str(ROOT))
CONFIG = dict(experiment='toy', method='aoe', id='digits7', start='scratch', seed=0, eps_255=16)


def work(config, path):
    return dict(id_acc=0.9, ood=[dict(set='toy', group='near', AUROC=0.8)])


# results


def test_every_result_that_was_written_can_be_read():
    files = sorted(RESULTS.rglob('*.json'))
    assert len(files) > 500
    for file in files:
        read_result(file)


def test_a_sealed_result_notices_each_byte(tmp_path):
    run(CONFIG, work, tmp_path)
    path = result_path(CONFIG, tmp_path)
    whole = path.read_bytes()
    want = read_result(path)
    rng = np.random.default_rng(0)
    unseen = 0
    for i in rng.permutation(whole.index(b'"digest"'))[:200]:
        byte = bytes([(whole[i] + 1 + int(rng.integers(90))) % 128])
        path.write_bytes(whole[:i] + byte + whole[i + 1 :])
        try:
            unseen += read_result(path) != want
        except ValueError as e:
            assert str(path) in str(e)
    assert not unseen
    for n in rng.integers(1, len(whole), 20):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match='cut or is no JSON'):
            read_result(path)


OTHERS = [
    ('{"a": 1}', 'is not the result that its name stands for'),
    ('[]', 'is no result'),
    ('', 'cut or is no JSON'),
    ('\x00' * 99, 'cut or is no JSON'),
]


@pytest.mark.parametrize('text,why', OTHERS)
def test_what_is_no_result_is_named_by_everybody_who_reads(text, why, tmp_path):
    path = result_path(CONFIG, tmp_path)
    path.parent.mkdir()
    path.write_text(text)
    for read in (
        lambda: run(CONFIG, work, tmp_path),
        lambda: read_results(tmp_path),
        lambda: read_results([path]),
        lambda: done_in(tmp_path)(CONFIG),
    ):
        with pytest.raises(ValueError, match=why) as e:
            read()
        assert str(path) in str(e.value)
    assert path.read_text() == text  # nobody removes what is somebody's


def test_results_from_before_the_seal(tmp_path):
    "Their config must be that of their name, and they say of themselves what it says"
    path = result_path(CONFIG, tmp_path)
    path.parent.mkdir()
    old = dict({k: CONFIG[k] for k in ('experiment', 'method', 'id', 'start', 'seed')}, config=CONFIG, id_acc=1, ood=[])
    path.write_text(json.dumps(old))
    assert read_result(path) == old
    path.write_text(json.dumps(old | dict(seed=1)))
    with pytest.raises(ValueError, match='its seed is not that of its config'):
        read_result(path)
    path.write_text(json.dumps(old | dict(config=CONFIG | dict(eps_255=8))))
    with pytest.raises(ValueError, match='not the result that its name stands for'):
        read_result(path)


@pytest.mark.parametrize('value', [float('inf'), float('nan'), [1, float('inf')], Path('here')])
def test_what_a_config_cannot_hold_is_named(value, tmp_path):
    config = CONFIG | dict(margin=value)
    with pytest.raises(ValueError, match='margin of a config is .* which JSON cannot hold'):
        run(config, work, tmp_path)
    if isinstance(value, float):
        path = tmp_path / 'edited-00000000.json'
        path.write_text(json.dumps(dict(config=config)))
        with pytest.raises(ValueError, match=f'{path.name} .*margin of a config'):
            read_result(path)


def test_a_table_needs_whole_results(tmp_path):
    file = tmp_path / 'mine.json'
    file.write_text('{"ood": []}')
    with pytest.raises(ValueError, match='lacks experiment, method, id, start, seed, id_acc, config'):
        read_results(tmp_path)


# disks


FULL = """
import resource, signal, sys, torch, numpy as np
from pathlib import Path
from aoe_nb.record import result_path, run, write_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
config = dict(experiment='toy', method='aoe', id='digits7', start='scratch', seed=0)
def work(n): return lambda config, path: dict(id_acc=n, ood=[['x'] * n])
run(config, work(1), folder)
before = result_path(config, folder).read_text()
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
many = torch.rand(30_000)
tries = dict(
    torch=lambda: write_whole(folder / 'torch', lambda f: torch.save(dict(x=many), f)),
    npy=lambda: write_whole(folder / 'npy', lambda f: np.save(f, many.numpy())),
    npz=lambda: write_whole(folder / 'npz', lambda f: np.savez(f, x=many.numpy())),
    text=lambda: write_whole(folder / 'text', 'a' * 10_000),
    aoe=lambda: run(config, work(5000), folder, redo=True))
for name, f in tries.items():
    try: f()
    except OSError as e: assert name in str(e) and 'make room' in str(e), e
    else: raise AssertionError(name)
assert result_path(config, folder).read_text() == before, 'the old result is as it was'
left = [o.name for o in folder.rglob('*') if o.is_file()]
assert left == [result_path(config, folder).name], left
"""


def test_a_full_disk_is_named_and_nothing_half_done_is_left(tmp_path):
    command = [sys.executable, '-W', 'ignore', '-c', FULL, str(tmp_path)]
    r = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]


def test_a_disk_that_is_full_only_at_the_end(tmp_path, monkeypatch):
    "As over a network: the fault comes when all is handed over"

    def full(_):
        raise OSError(28, 'No space left on device')

    file = tmp_path / 'a.json'
    write_whole(file, 'old')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='a.json .No space left'):
        write_whole(file, 'new')
    assert [o.name for o in tmp_path.iterdir()] == ['a.json'] and file.read_text() == 'old'


@pytest.mark.parametrize('folder', ['/proc/nowhere', '/dev/null/x'])
def test_a_read_only_folder_is_refused_before_the_work(folder):
    with pytest.raises(OSError, match='choose another output folder'):
        run(CONFIG, lambda *_: 1 / 0, folder)
    with pytest.warns(UserWarning, match='scores are not cached: '):
        scores = kept(folder, 'about', lambda: [(torch.ones(2),)], lambda batches: torch.cat([x for (x,) in batches]))
    assert scores.tolist() == [1, 1]


# caches


def test_damaged_scores_are_computed_again(tmp_path):
    calls = []

    def compute(batches):
        calls.append(1)
        return torch.cat([x for (x,) in batches])

    def ask():
        return kept(tmp_path, 'about', lambda: [(torch.arange(99.0),)], compute)

    want = ask()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    np.savez(tmp_path / 'other.npz', x=np.ones(3))
    np.save(tmp_path / 'objects.npy', np.array([dict()]), allow_pickle=True)
    others = [(tmp_path / o).read_bytes() for o in ('other.npz', 'objects.npy')]
    np.save(tmp_path / 'foreign.npy', np.ones(99, dtype=np.float32))
    others.append((tmp_path / 'foreign.npy').read_bytes())
    changed = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(0, len(whole), 40)]
    for damaged in (b'', whole[:20], whole[:-1], whole + b'.', b'\x00' * len(whole), *others, *changed):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match='is damaged'):
            assert torch.equal(ask(), want)
        assert file.read_bytes() == whole
    n = len(calls)
    assert torch.equal(ask(), want) and len(calls) == n


# checkpoints


class Evil:
    "What runs a command when it is unpickled"

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


def small_learner(folder, opt, about=None):
    images = Images((torch.rand(64, 1, 4, 4) * 255).byte(), torch.arange(64) % 3, list('abc'))
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    ckpt = Checkpoint(folder / 'c', 0, about)
    dls = images.dls(16, valid=images, seed=0)
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), opt_func=opt, cbs=ckpt)
    return learn, ckpt


@pytest.mark.parametrize('part', ['model', 'opt', 'log', 'about', 'more'])
def test_a_checkpoint_runs_no_code(part, tmp_path):
    learn, ckpt = small_learner(tmp_path, Adam)
    state = dict(model=learn.model.state_dict(), opt={}, log=[], about=None)
    torch.save(state | {part: Evil(tmp_path / 'ran')}, tmp_path / 'c.pth')
    with pytest.raises(ValueError, match='c.pth .*remove it to start over'):
        ckpt.resume()
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('opt', [Adam, nesterov], ids=['adam', 'nesterov'])
def test_a_checkpoint_of_ours_is_read(opt, tmp_path):
    about = dict(lr=1e-3, classes=['a'], eps=(1, 2.5), name=None)
    for resumed in 0, 2:
        learn, ckpt = small_learner(tmp_path, opt, about)
        assert ckpt.resume() == resumed
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(2 + resumed, 1e-2, start_epoch=resumed)
    assert len(ckpt.log) == 4


@pytest.mark.parametrize('damage', [b'', b'PK', b'\x80\x04.'])
def test_a_damaged_checkpoint_is_named(damage, tmp_path):
    _, ckpt = small_learner(tmp_path, Adam)
    (tmp_path / 'c.pth').write_bytes(damage)
    with pytest.raises(ValueError, match='c.pth .*remove it to start over'):
        ckpt.resume()
