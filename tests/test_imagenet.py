"""examples/imagenet.py on a miniature of ImageNet's folders: one process, two, again, and what it refuses."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / 'examples/imagenet.py'
COLOURS = dict(n01440764=(200, 60, 60), n01443537=(60, 200, 60), n01484850=(60, 60, 200))
SMALL = '--arch resnet18 --weights none --size 32 --workers 0 --bs 12 --epochs 2'.split()


def write(file, colour, rng):
    noise = rng.integers(-50, 50, (40, 48, 3))
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(file)


def miniature(folder):
    "Images whose class is their colour, and outliers of any colour"
    rng = np.random.default_rng(0)
    for split, n in dict(train=24, val=40).items():
        for name, colour in COLOURS.items():
            for i in range(n):
                write(folder / f'data/{split}/{name}/{name}_{i}.JPEG', colour, rng)
    for i in range(30):
        write(folder / f'outliers/{i}.JPEG', rng.integers(0, 256, 3), rng)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp('imagenet')
    miniature(made)
    return made


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('imagenet_example', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(folder, out, *more):
    return [str(o) for o in (folder / 'data', folder / 'outliers', folder / out, *SMALL, *more)]


def test_one_process_trains_and_then_nothing_more(folder, script, capsys, monkeypatch):
    learn = script.main(command(folder, 'one'))
    out = folder / 'one'
    assert {o.name for o in (out / 'models').iterdir()} == {'epoch_0.pth', 'epoch_1.pth'}
    assert learn.outlier_exposure.bn == 'frozen' and learn.detector.threshold
    assert (out / 'detector.safetensors').exists()
    right = re.search(r'accuracy ([\d.]+) on 120 images', capsys.readouterr().out)
    assert float(right[1]) > 0.9
    first = torch.load(out / 'weights.pth', weights_only=True)
    kept = (out / 'models/epoch_1.pth').stat().st_mtime_ns

    monkeypatch.delattr(script.Learner, 'fit_one_cycle')
    again = script.main(command(folder, 'one'))
    assert (out / 'models/epoch_1.pth').stat().st_mtime_ns == kept
    assert all(torch.equal(v, first[k]) for k, v in again.model.state_dict().items())


def test_it_goes_on_and_takes_weights_from_a_file(folder, script):
    script.main(command(folder, 'part', '--epochs', 1))
    learn = script.main(command(folder, 'part', '--weights', folder / 'part/weights.pth'))
    assert (folder / 'part/models/epoch_1.pth').exists()
    assert [bool(row) for row in learn.recorder.values] == [False, True]


@pytest.mark.slow
def test_two_processes(folder):
    pytest.importorskip('accelerate', reason='pip install accelerate')
    here = f'{ROOT}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'
    env = os.environ | dict(PYTHONPATH=here, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    torchrun = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    run = [*torchrun, SCRIPT, *command(folder, 'two')]
    done = subprocess.run(run, capture_output=True, text=True, env=env)
    assert not done.returncode, done.stderr[-3000:]
    assert done.stdout.count('accuracy 0.') + done.stdout.count('accuracy 1.') == 1
    assert (folder / 'two/detector.safetensors').exists()


def no_val(folder):
    (folder / 'half/train/n01440764').mkdir(parents=True, exist_ok=True)
    return [folder / 'half', folder / 'outliers']


def flat_val(folder):
    (folder / 'flat/train/n01440764').mkdir(parents=True, exist_ok=True)
    (folder / 'flat/val').mkdir(exist_ok=True)
    return [folder / 'flat', folder / 'outliers']


def good(folder):
    return [folder / 'data', folder / 'outliers']


BAD = {
    'no data': (lambda o: [o / 'nowhere', o / 'outliers'], [], 'there is no folder .*nowhere/train: give DATA'),
    'no val': (no_val, [], 'there is no folder .*half/val'),
    'flat val': (flat_val, [], 'not the same classes: sort the images of both into one folder a class'),
    'no outliers': (lambda o: [o / 'data', o / 'nothing'], [], 'there is no folder .*nothing'),
    'arch': (good, ['--arch', 'resnet51'], 'no classifier resnet51: take one such as resnet50'),
    'weights': (good, ['--weights', 'nowhere.pth'], 'nowhere.pth is no file: give one, or none, or .*IMAGENET1K_V1'),
    'ranks': (good, ['--bs', '13'], '--bs 13 cannot be shared by 8 processes: take --bs 16'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_refused_in_one_line(folder, script, monkeypatch, name):
    paths, more, line = BAD[name]
    if name == 'ranks':
        monkeypatch.setattr(script, 'RANKS', 8)
    argv = [*paths(folder), folder / 'never', '--arch', 'resnet18', '--weights', 'none', *more]
    with pytest.raises(SystemExit, match=line) as refused:
        script.main([str(o) for o in argv])
    assert '\n' not in str(refused.value)


def test_weights_of_other_classes_are_refused(folder, script):
    other = folder / 'other.pth'
    torch.save(torch.nn.Linear(2, 2).state_dict(), other)
    with pytest.raises(SystemExit, match='is not of resnet18 with 3 classes'):
        script.main(command(folder, 'never', '--weights', other))


# benchmarks/imagenet.py


@pytest.fixture(scope='module')
def benchmark():
    folder = str(ROOT / 'benchmarks')
    sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location('imagenet_benchmark', ROOT / 'benchmarks/imagenet.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(folder)
    return module


def test_the_prediction_by_hand(benchmark):
    assert benchmark.prediction(800, 2.5, 320 * 3600) == dict(inliers_per_second=320.0, hours=1.0)
    of_a_gpu = dict(weights=1e9, gradients=1e9, momentum=1e9, training_a_network=5e8, training_an_image=1e7)
    of_a_gpu |= dict(attack_a_network=5e8, attack_an_image=1e7)
    assert benchmark.gigabytes(of_a_gpu, 100, 50) == 3 + 0.5 + 1.5
    assert benchmark.gigabytes(of_a_gpu | dict(attack_an_image=1e8), 100, 50) == 3 + 0.5 + 5


def test_kept_bytes_by_hand(benchmark):
    first, second = torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(8, 2, bias=False)
    x = torch.rand(3, 4)
    kept = benchmark.kept(torch.nn.Sequential(first, second), lambda: second(first(x).relu()))
    assert kept == 4 * (3 * 4 + 3 * 8)  # the input, and what relu gives, which two layers keep


def test_the_file_holds_what_follows_from_its_parts(benchmark):
    file = json.loads(benchmark.OUT.read_text())
    for name in 'OE', 'AOE':
        for kind, row in file['predicted'][name].items():
            assert row == benchmark.prediction(16621, file['ratios'][f'{name}/plain'][kind])
    assert file['gigabytes_a_gpu']['256 + 256 in all'] == benchmark.gigabytes(file['bytes'], 32, 32)
    assert file['ratios']['AOE/plain']['counted'] == pytest.approx(8 / 3, rel=0.02)
    assert file['on_gpus'] == 'not measured'
