"The command that makes outliers: trains once, samples the same images again, and says what is wrong before it works."

import json, numpy as np, pytest, subprocess, sys, torch
from pathlib import Path
from PIL import Image
from aoe_nb.data import Images, outliers
from aoe_nb.generate import nearest

COMMAND = str(Path(sys.executable).parent / 'aoe_generate')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Two classes of 64 small pictures, as a folder"
    folder = tmp_path_factory.mktemp('generate')
    rng = np.random.default_rng(0)
    for split in 'train', 'test':
        for k, c in enumerate(('dark', 'bright')):
            (folder / 'toy' / split / c).mkdir(parents=True)
            for i in range(64):
                pixels = rng.random((32, 32, 3)) * 90 + 150 * k
                Image.fromarray(pixels.astype(np.uint8)).save(folder / 'toy' / split / c / f'{i}.png')
    return folder


def generate(home, *args):
    return subprocess.run([COMMAND, '--data', 'toy', *map(str, args)], cwd=home, capture_output=True, text=True)


def test_trains_once_and_repeats(home):
    f = home / 'samples/gan-tiny-toy-s0/samples-3.0.npz'

    def about():
        return json.loads(f.with_suffix('.json').read_text())

    first = generate(home, '--n', 120, '--sigma', 3)
    assert first.returncode == 0, first.stderr[-2000:]
    x = np.load(f)['x']
    assert x.shape == (120, 3, 32, 32) and x.dtype == np.uint8 and len(outliers(f)) == 120
    assert about()['sigma'] == 3
    known = json.loads((home / 'weights/gan-tiny-toy-s0.json').read_text())
    assert known['data'] == 'toy' and known['split'] == 'train' and len(known['log']) == 7

    sha = about()['sha256']
    f.unlink()
    again = generate(home, '--n', 120, '--sigma', 3)
    assert again.returncode == 0 and 'training' not in again.stdout
    assert about()['sha256'] == sha and (np.load(f)['x'] == x).all()


REFUSED = [
    (('--sigma', 0), 'sigma must be a positive'),
    (('--preset', 'huge'), 'tiny, small, big'),
    (('--n', 0), 'n must be at least 1'),
    (('--data', 'nowhere'), 'unknown set of inliers'),
    (('--blend', 3), 'blend must lie'),
    (('--n', 10**15), 'are needed'),
    (('--out', '/proc/x'), 'choose another output folder'),
]


@pytest.mark.parametrize('args,why', REFUSED)
def test_refuses(home, args, why):
    r = generate(home, *args)
    assert r.returncode and why in r.stderr and 'Traceback' not in r.stderr


@pytest.mark.parametrize('kind', ['noise', 'bright', 'features'])
def test_the_nearest_is_exact(kind):
    gen = torch.Generator().manual_seed(0)
    known = torch.randint(256, (500, 3, 8, 8), generator=gen).byte()
    if kind == 'bright':
        known = (200 + torch.randint(2, (500, 3, 8, 8), generator=gen)).byte()
    if kind == 'features':
        known = 100 + 1e-3 * torch.randn(500, 64, generator=gen)
    distance, index = nearest(known[:60], known, bs=7)
    assert (distance == 0).all() and index.tolist() == list(range(60)), 'a copy is at distance 0'
    others = known[60:].flatten(1).double()
    gaps = [(o.double().flatten() - others).square().mean(1).sqrt() for o in known[:60]]
    distance, index = nearest(known[:60], known[60:], bs=7)
    for i, gap in enumerate(gaps):
        assert gap[index[i]] <= gap.min() + 1e-9 and distance[i].item() == pytest.approx(gap.min().item(), rel=1e-6)


def test_the_nearest_needs_one_kind():
    known = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8)
    for some in known[3:5], Images(known[3:5]):
        assert nearest(some, Images(known))[1].tolist() == [3, 4]
    for some in known[:2] / 255, known[:2, :, :2], known[:2, :1]:
        with pytest.raises(ValueError, match='one kind of images'):
            nearest(some, known)
    with pytest.raises(ValueError, match='no images'):
        nearest(known, known[:0])
