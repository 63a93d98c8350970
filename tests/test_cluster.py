"A grid on a cluster: a real Slurm of one machine, where its programs are; processes of this machine; this process."

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from aoe_nb import cli
from aoe_nb.cluster import states, submit
from aoe_nb.lease import holder
from aoe_nb.record import result_path
from aoe_nb.study import grid
from one_slurm import jobs, missing_programs, one_slurm, wait_for

ROOT = Path(__file__).resolve().parent.parent

# What a task imports: a cell of a few steps. It keeps a checkpoint, notes all that it does, and waits where it is told.
CELLS = """
import json, os, time
from pathlib import Path
from aoe_nb.lease import leased
from aoe_nb.record import result_path

def note(out, *words):
    with open(Path(out) / 'diary', 'a') as f: f.write(' '.join(map(str, words)) + '\\n')

def cell(config, out):
    path = result_path(config, out)
    if path.exists(): return
    with leased(path):
        if (Path(out) / f'break-{path.stem}').exists(): raise ValueError('it broke')
        kept = path.with_suffix('.step')
        first = int(kept.read_text()) if kept.exists() else 0
        note(out, 'begin', path.stem, os.getpid(), first)
        for step in range(first, 3):
            time.sleep(.2)
            kept.write_text(str(step + 1))
            while step == 1 and (Path(out) / f'hold-{path.stem}').exists(): time.sleep(.05)
        path.write_text(json.dumps(dict(config=config, id_acc=1, ood=[], seconds=1)))
        note(out, 'end', path.stem, os.getpid(), first)
"""


@pytest.fixture
def out(tmp_path, monkeypatch):
    "A folder of results, with the search over; tasks find the library and the cell"
    (tmp_path / 'here').mkdir()
    (tmp_path / 'here/slow_cells.py').write_text(CELLS)
    path = f'{ROOT}:{tmp_path}/here'
    monkeypatch.setenv('PYTHONPATH', path)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.syspath_prepend(tmp_path / 'here')
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'results').mkdir()
    shutil.copy(ROOT / 'results/chosen.json', tmp_path / 'results')
    sys.modules.pop('slow_cells', None)
    from slow_cells import cell

    monkeypatch.setattr(grid, 'run_missing_cell', cell)
    monkeypatch.setattr(grid, 'lacks', lambda config: '')
    return Path('results')


def diary(out):
    return [line.split() for line in (out / 'diary').read_text().splitlines()]


def assert_never_twice_at_once(out):
    "And each ended once"
    at_work = {}
    ended = []
    for what, run, pid, first in diary(out):
        if what == 'begin':
            assert run not in at_work or not Path(f'/proc/{at_work[run]}').exists(), 'another is at it'
            at_work[run] = pid
        else:
            assert at_work.pop(run) == pid
            ended.append(run)
    assert sorted(ended) == sorted(set(ended)) == sorted(o.stem for o in (out / 'best').glob('*.json'))


def aoe_run(**asked):
    return cli.aoe_run(**dict(ids='cifar10', out='results') | asked)


def listed(name, capsys):
    "The line of an experiment on the list, and the states beneath it"
    capsys.readouterr()
    aoe_run(list=True)
    lines = capsys.readouterr().out.splitlines()
    i = next(i for i, line in enumerate(lines) if line.startswith(f'{name:8}'))
    below = []
    for line in lines[i + 1 :]:
        if not line.startswith('    '):
            break
        below.append(line.split())
    return lines[i], below


needs_slurm = pytest.mark.skipif(
    bool(missing_programs()), reason=f'Slurm is not installed: {", ".join(missing_programs())}'
)


@needs_slurm
def test_a_grid_on_slurm(out, capsys):
    "Two at a time; one task is killed, one cancelled, one preempted, one breaks; in the end each cell is there once"
    cells = grid.cells('best', ['cifar10'], out)
    runs = [result_path(c, out).stem for c in cells]
    assert len(runs) == 6
    for run in runs[:2]:
        (out / f'hold-{run}').touch()
    (out / f'break-{runs[4]}').touch()

    def state():
        return list(states(cells, out).state)

    with one_slurm(cpus=2):
        aoe_run(name='best', cluster='slurm', parallel=2, hours=1)
        said = capsys.readouterr().out
        job = re.search(r'6 tasks of best submitted, the first as job (\d+);', said)[1]
        wait_for(lambda: state() == ['running'] * 2 + ['submitted'] * 4, lambda: f'{state()} {jobs()}')
        line, below = listed('best', capsys)
        assert '0 done' in line and '6 missing' in line
        assert below[0] == ['running', runs[0], f'results/jobs/{job}_0_0_log.out'] and Path(below[0][2]).exists()
        assert [o[0] for o in below] == ['running'] * 2 + ['submitted'] * 4

        with pytest.raises(SystemExit, match='slurm took no job: .*invalid partition'):
            aoe_run(name='curve', cluster='slurm', partition='nowhere')
        aoe_run(name='best', cluster='slurm')  # all is on its way
        assert 'nothing to submit' in capsys.readouterr().out and len(jobs()) == 6
        paths = [result_path(c, out) for c in cells]
        wait_for(lambda: all(p.with_suffix('.step').exists() for p in paths[:2]), 'no checkpoints')
        subprocess.run(['scancel', f'{job}_5'], check=True)
        os.kill(holder(paths[0])['pid'], signal.SIGKILL)
        preempt = ['scancel', '--signal=USR2', f'{job}_1']  # what submitit asks Slurm to send first
        # Slurm may not be ready yet; a signal that came through may be reported as lost, and the next then finds no job
        put_back = lambda: holder(paths[1]) is None  # noqa: E731
        wait_for(lambda: put_back() or not subprocess.run(preempt).returncode, 'Slurm took no signal')
        wait_for(put_back, 'it was not put back')
        for run in runs[:2]:
            (out / f'hold-{run}').unlink()
        wait_for(lambda: not jobs(), lambda: f'{state()} {jobs()}')
        assert state() == ['failed', 'done', 'done', 'done', 'failed', 'failed']
        line, below = listed('best', capsys)
        assert '3 done' in line and [o[0] for o in below] == ['failed'] * 3
        assert 'it broke' in Path(below[1][2]).read_text()

        (out / f'break-{runs[4]}').unlink()
        aoe_run(name='best', cluster='slurm', parallel=2)
        assert '3 tasks of best submitted' in capsys.readouterr().out
        wait_for(lambda: state() == ['done'] * 6, lambda: f'{state()} {jobs()}')
    assert_never_twice_at_once(out)
    begun = {run: [int(first) for what, r, _, first in diary(out) if what == 'begin' and r == run] for run in runs}
    assert [begun[run] for run in runs[2:]] == [[0]] * 4
    assert all(len(begun[run]) > 1 and begun[run][-1] > 0 for run in runs[:2]), 'they went on from their checkpoints'
    assert not list(out.rglob('*.lease')) and not list(out.rglob('*.door'))


def test_a_grid_as_processes_of_this_machine(out, capsys):
    "With a plain command on the same folder; whoever is quicker has the cell"
    cells = grid.cells('best', ['cifar10'], out)
    aoe_run(name='best', cluster='local', parallel=2)
    assert '2 tasks of best submitted' in capsys.readouterr().out
    wait_for((out / 'diary').exists, 'nothing begins')
    aoe_run(name='best')
    capsys.readouterr()
    wait_for(lambda: list(states(cells, out).state) == ['done'] * 6, lambda: str(states(cells, out)))
    assert_never_twice_at_once(out)


def test_a_local_task_that_is_killed_is_seen(out):
    cells = grid.cells('best', ['cifar10'], out)[:2]
    runs = [result_path(c, out).stem for c in cells]
    (out / f'hold-{runs[0]}').touch()
    submit(cells, grid.run_missing_cell, out, 'local')
    wait_for(lambda: list(states(cells, out).state) == ['running', 'submitted'], lambda: str(states(cells, out)))
    os.kill(holder(result_path(cells[0], out))['pid'], signal.SIGKILL)
    wait_for(lambda: list(states(cells, out).state) == ['failed'] * 2, lambda: str(states(cells, out)))
    (out / f'hold-{runs[0]}').unlink()
    assert len(submit(cells, grid.run_missing_cell, out, 'local')) == 1
    wait_for(lambda: list(states(cells, out).state) == ['done'] * 2, lambda: str(states(cells, out)))


def test_a_grid_in_this_process(out, capsys):
    cells = grid.cells('best', ['cifar10'], out)
    aoe_run(name='best', cluster='debug')
    assert list(states(cells, out).state) == ['done'] * 6
    assert_never_twice_at_once(out)
    capsys.readouterr()
    aoe_run(name='best', cluster='debug')
    assert 'nothing to submit' in capsys.readouterr().out


def test_a_start_without_its_weights_is_submitted_again(out, monkeypatch):
    "Its result alone is not enough"
    config = grid.cells('starts', ['cifar10'], out)[0]
    path = result_path(config, out)
    path.parent.mkdir()
    path.write_text(json.dumps(dict(config=config)))
    ran = []
    monkeypatch.setattr(grid, 'run_missing_cell', lambda config, out: ran.append(config['seed']))
    monkeypatch.setattr(grid, 'weights_file', lambda name: Path('nowhere'))
    aoe_run(name='starts', cluster='debug', seeds=str(config['seed']))
    assert ran == [config['seed']]
    assert submit([config], grid.run_missing_cell, out, 'debug') == []  # for others it is done


def test_a_search_says_that_it_has_more_steps(out, capsys):
    (out / 'chosen.json').unlink()
    aoe_run(name='select', cluster='debug')
    said = capsys.readouterr().out
    assert '1 tasks of select submitted' in said and 'the same command submits the next' in said
    assert len(list((out / 'select').glob('*.json'))) == 2


REFUSED = [
    (dict(cluster='cloud'), "unknown cluster 'cloud': choose from slurm, local, debug"),
    (dict(cluster='local', hours=0), 'hours must lie in'),
    (dict(cluster='local', gpus=-1), 'gpus must lie in'),
    (dict(cluster='local', parallel=-1), 'parallel must lie in'),
    (dict(cluster='local', device='cpu'), 'on a cluster --gpus decides'),
]


@pytest.mark.parametrize('asked,why', REFUSED, ids=[o[1].split()[0] for o in REFUSED])
def test_what_is_wrong_is_said_before_anything_is_submitted(asked, why, out):
    with pytest.raises(SystemExit, match=re.escape(why)):
        aoe_run(name='best', **asked)
    assert sorted(o.name for o in out.iterdir()) == ['chosen.json']


def test_what_is_not_installed_is_named(out, monkeypatch):
    monkeypatch.setenv('PATH', '/nowhere')
    with pytest.raises(SystemExit, match='there is no sbatch here'):
        aoe_run(name='best', cluster='slurm')
    monkeypatch.setattr('aoe_nb.cluster.find_spec', lambda _: None)
    with pytest.raises(SystemExit, match=r'pip install aoe_nb\[cluster\]'):
        aoe_run(name='best', cluster='local')


def test_a_queue_that_cannot_be_asked_loses_nothing(out, monkeypatch):
    "What was submitted counts as on its way"
    cells = grid.cells('best', ['cifar10'], out)[:1]
    path = result_path(cells[0], out)
    path.parent.mkdir()
    path.with_name(path.name + '.job').write_text(json.dumps(dict(cluster='slurm', job='7', log='jobs/7_0_log.out')))
    monkeypatch.setenv('PATH', '/nowhere')
    assert list(states(cells, out).state) == ['submitted']
    for text in '', '{"a": 1}', '[7]', '{"cluster": null}':
        path.with_name(path.name + '.job').write_text(text)
        assert list(states(cells, out).state) == ['missing']
    path.with_name(path.name + '.job').write_text('{"cluster": "slurm", "job": "7", "log": null}')
    assert list(states(cells, out).iloc[0][['state', 'log']]) == ['submitted', '']


def test_the_newest_word_counts_on_the_list(out, capsys):
    "A cell that somebody runs without a cluster has no log, but a process"
    from aoe_nb.lease import leased

    cells = grid.cells('best', ['cifar10'], out)
    path = result_path(cells[0], out)
    path.parent.mkdir()
    with leased(path):
        assert time.time() - path.with_name(path.name + '.lease').stat().st_mtime < 60
        line, below = listed('best', capsys)
    assert [o[:4] for o in below] == [['running', path.stem, 'process', str(os.getpid())]]
    assert listed('best', capsys)[1] == []


@pytest.mark.slow
@needs_slurm
def test_the_tutorial_runs_on_slurm():
    "`nbdev_test` runs it by itself, as processes of this machine"
    nbdev_test = Path(sys.executable).parent / 'nbdev_test'
    if not nbdev_test.exists():
        pytest.skip('nbdev is not installed here')
    command = [nbdev_test, '--path', ROOT / 'nbs/tutorials/a_cluster.ipynb']
    with one_slurm(cpus=2):
        r = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT))
        )
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-2000:]


START = """
import sys, torch, numpy as np
from aoe_nb.images import Images
from aoe_nb.study import grid, train
def small(id, split='train'):
    pixels = np.random.default_rng(len(split)).integers(0, 255, (128, 3, 32, 32), dtype=np.uint8)
    return Images(torch.from_numpy(pixels), torch.arange(128) % 10, [str(i) for i in range(10)], id)
train.inliers = small
train.view_of = lambda view, id: (small(id, 'test'), {})
config = grid.start_config | dict(epochs=3, seed=7, bs=32)
grid.run_missing_cell(config, 'results')
"""


def test_a_start_that_is_killed_goes_on_from_its_checkpoint(tmp_path):
    "And ends with the weights of one that was left alone"
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    weights = {}
    for name in 'alone', 'killed':
        folder = tmp_path / name
        folder.mkdir()
        command = [sys.executable, '-W', 'ignore', '-c', START]
        if name == 'killed':
            p = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wait_for(lambda: list((folder / 'results/starts').glob('*.pth')), 'no checkpoint')
            p.kill()
            p.wait()
            assert not list((folder / 'results/starts').glob('*.json'))
        r = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert r.returncode == 0, r.stderr[-2000:]
        (file,) = (folder / 'weights').glob('*.pt')
        weights[name] = file.read_bytes()
        (result,) = (folder / 'results/starts').iterdir()
        log = json.loads(result.read_text())['log']
        assert [o['epoch'] for o in log] == [0, 1, 2]
    assert weights['alone'] == weights['killed']
