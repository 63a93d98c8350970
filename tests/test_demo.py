"The main job, as a user runs it."

import json, os, subprocess, sys
from pathlib import Path
import pytest

DEMO = Path(sys.executable).parent / 'aoe_demo'


def demo(*args):
    env = os.environ | dict(MPLBACKEND='agg')
    return subprocess.run([DEMO, *map(str, args)], capture_output=True, text=True, timeout=300, env=env)


def rows(path):
    "The numbers of one result"
    keep = 'set', 'attack', 'eps_255', 'AUROC', 'FPR95', 'AUPR_OUT'
    return [{k: o[k] for k in keep} for o in json.loads(path.read_text())['ood']]


def numbers(folder):
    return {p.name: rows(p) for p in sorted(folder.rglob('*.json'))}


def times(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob('*.json')}


def test_help_explains_every_option():
    text = ' '.join(demo('--help').stdout.split('options:')[1].split())
    explained = {o.split()[0]: ' '.join(o.split()[1:]) for o in text.split(' --')[1:]}
    for o in 'out', 'seeds', 'seed', 'epochs', 'lam', 'eps', 'bn', 'redo':
        assert len(explained[o]) > 20, f'--{o} is not explained'


@pytest.mark.slow
def test_same_seed_same_numbers_and_nothing_is_done_twice(tmp_path):
    a = tmp_path / 'a'
    b = tmp_path / 'b'
    short = '--seeds', 1, '--epochs', 2
    one = demo('--out', a, *short)
    two = demo('--out', b, *short)
    assert one.returncode == two.returncode == 0, one.stderr[-2000:]
    assert len(numbers(a)) == 4 and numbers(a) == numbers(b)
    for name in 'table.txt', 'figure.png':
        assert (a / 'demo' / name).exists() and str(a / 'demo' / name) in one.stdout
    assert 'run' in one.stderr and '100%' in one.stderr  # the progress bar
    before = times(a)
    again = demo('--out', a, *short, '--eps', '16.0')
    assert '4 of 4 runs' in again.stdout and times(a) == before


REFUSED = [
    (('--bn', 'own'), 'mixed, inliers, separate'),
    (('--eps', '300'), 'eps'),
    (('--lam', '-1'), 'lam'),
    (('--seeds', '0'), 'at least 1'),
    (('--out', '/proc/x'), 'choose another output folder'),
]


@pytest.mark.parametrize('args,why', REFUSED)
def test_bad_input_is_refused_before_training(args, why, tmp_path):
    out = () if '--out' in args else ('--out', tmp_path)
    r = demo(*out, *args)
    assert r.returncode and why in r.stderr
    assert 'run/s' not in r.stderr and not list(tmp_path.rglob('*.json'))


@pytest.mark.slow
def test_another_config_in_the_same_folder_has_a_table_of_its_own(tmp_path):
    def table(*args):
        demo('--out', tmp_path, '--seeds', 1, *args)
        return (tmp_path / 'demo/table.txt').read_text()

    first = table('--epochs', 1)
    second = table('--epochs', 2)
    assert first != second and '±' not in second and table('--epochs', 1) == first
