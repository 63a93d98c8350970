"One thread for small images, as the notebooks have it; the last thing a run says is what it did not do."

import os
import sys
from pathlib import Path

# Two threads on an image of 8x8 pixels wait for each other, and where another program wants the cores they wait long.
os.environ['OMP_NUM_THREADS'] = '1'
os.environ.setdefault('MPLBACKEND', 'agg')

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
sys.path.append(str(Path(__file__).resolve().parent.parent / 'tools'))


def pytest_terminal_summary(terminalreporter):
    skipped = {}
    for report in terminalreporter.stats.get('skipped', []):
        why = report.longrepr[2].removeprefix('Skipped: ')
        skipped.setdefault((report.nodeid.partition('[')[0], why), []).append(report)
    terminalreporter.section('skipped, and why')
    for (name, why), reports in skipped.items():
        times = f' ({len(reports)} times)' if len(reports) > 1 else ''
        terminalreporter.line(f'{name}{times}: {why}')
    if not skipped:
        terminalreporter.line('nothing')


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the slow half too')


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: starts many processes, or waits for some; `make test-slow` runs it')


def pytest_collection_modifyitems(config, items):
    for item in items:
        if 'slow' in item.keywords and not config.getoption('--slow'):
            item.add_marker(pytest.mark.skip(reason='slow: make test-slow'))


@pytest.fixture(scope='session')
def fastai_exports(tmp_path_factory):
    "Skip where fastai by itself cannot export a learner of image files, as 2.8.12 beside fastcore 2.2"
    import warnings
    from fastai.vision.all import ImageDataLoaders, Learner, Resize, nn
    from PIL import Image

    folder = tmp_path_factory.mktemp('photos')
    for name in ('a/0.png', 'a/1.png', 'b/0.png', 'b/1.png'):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new('RGB', (8, 8)).save(folder / name)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dls = ImageDataLoaders.from_folder(folder, valid_pct=0.5, item_tfms=Resize(8), bs=1, num_workers=0)
        try:
            Learner(dls, nn.Linear(8, 2), path=folder).export()
        except TypeError as e:
            pytest.skip(f'fastai itself cannot export a learner of image files here ({e})')
