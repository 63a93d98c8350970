"The main job, as a user runs it."
import json, os, subprocess, sys
from pathlib import Path
import pytest

DEMO = Path(sys.executable).parent/'aoe_demo'
def demo(*args, **kw): return subprocess.run([DEMO, *map(str, args)], capture_output=True, text=True, timeout=300, env=os.environ | dict(MPLBACKEND='agg'), **kw)

def numbers(folder):
    return {p.name: [{k: o[k] for k in ('set','attack','eps_255','AUROC','FPR95','AUPR_OUT')} for o in json.loads(p.read_text())['ood']] for p in sorted(folder.rglob('*.json'))}

def test_help_explains_every_option():
    text = ' '.join(demo('--help').stdout.split('options:')[1].split())
    explained = {o.split()[0]: ' '.join(o.split()[1:]) for o in text.split(' --')[1:]}
    for o in 'out','seeds','seed','epochs','lam','eps','bn','redo': assert len(explained[o]) > 20, f'--{o} is not explained'

def test_same_seed_same_numbers_and_nothing_is_done_twice(tmp_path):
    a,b = tmp_path/'a',tmp_path/'b'
    one,two = demo('--out', a, '--seeds', 1, '--epochs', 2),demo('--out', b, '--seeds', 1, '--epochs', 2)
    assert one.returncode == two.returncode == 0, one.stderr[-2000:]
    assert len(numbers(a)) == 4 and numbers(a) == numbers(b)
    for name in 'table.txt','figure.png': assert (a/'demo'/name).exists() and str(a/'demo'/name) in one.stdout
    assert 'run' in one.stderr and '100%' in one.stderr # the progress bar
    times = {p: p.stat().st_mtime_ns for p in a.rglob('*.json')}
    again = demo('--out', a, '--seeds', 1, '--epochs', 2, '--eps', '16.0')
    assert '4 of 4 runs' in again.stdout and times == {p: p.stat().st_mtime_ns for p in a.rglob('*.json')}

@pytest.mark.parametrize('args,why', [(('--bn','own'), 'mixed, inliers, separate'), (('--eps','300'), 'eps'), (('--lam','-1'), 'lam'),
                                      (('--seeds','0'), 'at least 1'), (('--out','/proc/x'), 'choose another output folder')])
def test_bad_input_is_refused_before_training(args, why, tmp_path):
    r = demo(*(('--out', tmp_path) if '--out' not in args else ()), *args)
    assert r.returncode and why in r.stderr and 'run/s' not in r.stderr and not list(tmp_path.rglob('*.json'))

def test_another_config_in_the_same_folder_has_a_table_of_its_own(tmp_path):
    def table(*a): r = demo('--out', tmp_path, '--seeds', 1, *a); return (tmp_path/'demo/table.txt').read_text()
    first = table('--epochs', 1)
    second = table('--epochs', 2)
    assert first != second and '±' not in second and table('--epochs', 1) == first
