"One process at a time: whoever races, whoever is killed, whatever the lease file holds."

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
from aoe_nb import lease
from aoe_nb.lease import Taken, holder, leased, process

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
here_is_proc = pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='no /proc tells which processes live')


def started(code, *args, **env):
    command = [sys.executable, '-W', 'ignore', '-c', code, *map(str, args)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, env=ENV | env, text=True, **pipes)


def together(processes):
    "Let them go when all are there"
    for p in processes:
        assert p.stdout.readline() == 'ready\n'
    for p in processes:
        p.stdin.write('go\n')
        p.stdin.flush()
    return processes


def said(p):
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0, err[-2000:]
    return out.split()


# Each of them goes through all files again and again. To meet another at work is a fault.
RACE = """
import os, random, sys, time
from pathlib import Path
from aoe_nb.lease import Taken, leased
folder = Path(sys.argv[1])
files = [folder / str(i) for i in range(30)]
random.seed(os.getpid())
end = time.time() + 60
while any(not f.exists() for f in files) and time.time() < end:
    for f in random.sample(files, len(files)):
        try:
            with leased(f):
                if f.exists(): continue
                os.close(os.open(f'{f}.at_work', os.O_CREAT | os.O_EXCL))
                time.sleep(.005)
                os.unlink(f'{f}.at_work')
                if random.random() < .3: continue # it failed, and gives the lease back
                f.touch(exist_ok=False)
                print(f.name)
        except Taken: pass
"""


@pytest.mark.parametrize('dead', [False, True], ids=['free', 'held-by-the-dead'])
def test_each_work_is_done_once(dead, tmp_path):
    "Eight processes and thirty files; of the second kind each has the lease of a dead process, which they race for"
    if dead:
        for i in range(30):
            (tmp_path / f'{i}.lease').write_text('cut')
            os.utime(tmp_path / f'{i}.lease', (0, 0))
    done = [o for p in [started(RACE, tmp_path) for _ in range(8)] for o in said(p)]
    assert sorted(map(int, done)) == list(range(30))
    assert sorted(int(o.name) for o in tmp_path.iterdir()) == list(range(30)), 'no lease is left'


HOLD = """
import sys, time
from aoe_nb.lease import leased
with leased(sys.argv[1]):
    print('mine', flush=True)
    time.sleep(60)
"""


@here_is_proc
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM], ids=['kill', 'term'])
def test_whoever_is_killed_makes_room_at_once(how, tmp_path):
    path = tmp_path / 'a.json'
    p = started(HOLD, path)
    assert p.stdout.readline() == 'mine\n'
    assert holder(path)['pid'] == p.pid
    with pytest.raises(Taken, match=f'a.json is left to process {p.pid} on '):
        with leased(path):
            pass
    p.send_signal(how)
    while holder(path):  # even before its parent has heard of it
        time.sleep(0.01)
    with leased(path):
        pass
    p.communicate()
    assert list(tmp_path.iterdir()) == []


@here_is_proc
def test_a_process_that_stands_still_keeps_its_lease(tmp_path):
    "On the same machine its age says nothing"
    path = tmp_path / 'a.json'
    p = started(HOLD, path)
    p.stdout.readline()
    p.send_signal(signal.SIGSTOP)
    os.utime(tmp_path / 'a.json.lease', (0, 0))
    with pytest.raises(Taken):
        with leased(path):
            pass
    p.kill()
    p.communicate()


def far(path, age=0, **more):
    "The lease of a process on another machine"
    file = path.with_name(path.name + '.lease')
    file.write_text(json.dumps(process() | dict(machine='far', host='far', job='', rank='', restart=0) | more))
    os.utime(file, (time.time() - age,) * 2)
    return file


def test_a_lease_from_elsewhere_expires(tmp_path):
    path = tmp_path / 'a.json'
    far(path, age=lease.expires - 60)
    with pytest.raises(Taken, match='on far'):
        with leased(path):
            pass
    far(path, age=lease.expires + 1)
    with leased(path):
        assert holder(path)['pid'] == os.getpid()


def test_a_job_that_was_put_back_finds_its_own_lease(tmp_path, monkeypatch):
    path = tmp_path / 'a.json'
    monkeypatch.setenv('SLURM_ARRAY_JOB_ID', '7')
    monkeypatch.setenv('SLURM_ARRAY_TASK_ID', '3')
    monkeypatch.setenv('SLURM_PROCID', '0')
    far(path, job='7_3', rank='0', restart=0)
    with pytest.raises(Taken, match='job 7_3'):  # it is the same life
        with leased(path):
            pass
    monkeypatch.setenv('SLURM_RESTART_COUNT', '1')
    for other in dict(job='7_2'), dict(rank='1'), dict(restart=1):
        far(path, **dict(job='7_3', rank='0', restart=0) | other)
        with pytest.raises(Taken):
            with leased(path):
                pass
    far(path, job='7_3', rank='0', restart=0)
    with leased(path):
        assert (holder(path)['job'], holder(path)['restart']) == ('7_3', 1)


HALF = json.dumps({k: v for k, v in process().items() if k != 'pid'})


@pytest.mark.parametrize(
    'text',
    ['', '{"pid": 1', '[1]', '"x"', 'null', '{"machine": 1}', HALF],
    ids=['empty', 'cut', 'list', 'text', 'null', 'elsewhere', 'no process'],
)
def test_a_lease_that_says_nothing_counts_by_its_age(text, tmp_path):
    path = tmp_path / 'a.json'
    file = tmp_path / 'a.json.lease'
    file.write_text(text)
    with pytest.raises(Taken, match='left to another process'):
        with leased(path):
            pass
    os.utime(file, (0, 0))
    with leased(path):
        pass
    assert not file.exists()


def test_a_door_that_was_left_shut_opens_again(tmp_path):
    "Who was killed while taking over"
    path = tmp_path / 'a.json'
    far(path, age=lease.expires + 1)
    door = tmp_path / 'a.json.lease.door'
    door.touch()
    with pytest.raises(Taken):
        with leased(path):
            pass
    os.utime(door, (0, 0))
    with leased(path, wait=True):
        pass
    assert list(tmp_path.iterdir()) == []


def test_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, '_beat', 0.02)
    file = tmp_path / 'a.json.lease'
    with leased(tmp_path / 'a.json'):
        os.utime(file, (0, 0))
        end = time.time() + 10
        while file.stat().st_mtime == 0 and time.time() < end:
            time.sleep(0.01)
        assert time.time() - file.stat().st_mtime < 60
        file.write_text('of another, who took over')
        time.sleep(0.1)
        os.utime(file, (0, 0))
        time.sleep(0.1)
        assert file.stat().st_mtime == 0, 'it is not ours to touch'
    assert file.exists(), 'nor to take away'


def test_the_lease_ends_with_an_error_too(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with leased(tmp_path / 'a'):
            1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_lease_is_named():
    with pytest.raises(OSError, match='cannot write /proc/a.json.lease'):
        with leased('/proc/a.json'):
            pass


# Two runs of one config. `redo` says that there is work even with a result.
RUN = """
import sys, time
import aoe_nb.record as R
from aoe_nb.lease import Taken
R.provenance = dict
config = dict(experiment='toy', method='start', id='digits7', start='s0', seed=0)
def work(config, path):
    ckpt = path.with_suffix('.pth')
    ckpt.touch()
    print('worked', flush=True)
    time.sleep(1)
    ckpt.unlink() # as a start does with its checkpoint
    return dict(id_acc=1, ood=[])
print('ready', flush=True)
sys.stdin.readline()
try: R.run(config, work, sys.argv[1], redo=sys.argv[2] == 'redo', wait=sys.argv[3] == 'wait')
except Taken: print('left', flush=True)
else: print('has', flush=True)
"""


@pytest.mark.parametrize('wait', ['wait', 'go'])
@pytest.mark.parametrize('redo', ['redo', 'keep'])
def test_two_runs_of_one_config_work_once(redo, wait, tmp_path):
    p = together([started(RUN, tmp_path, redo, wait) for _ in range(2)])
    words = [o for q in p for o in said(q)]
    assert words.count('worked') == 1
    assert words.count('has') == (2 if wait == 'wait' else 1)
    assert [o.suffix for o in (tmp_path / 'toy').iterdir()] == ['.json']


GRID = """
import sys, time
import aoe_nb.record
from aoe_nb.study import grid
aoe_nb.record.provenance = dict
def work(config, path):
    print('ran', path.name, flush=True)
    time.sleep(.2)
    return dict(id_acc=.9, ood=[dict(score='energy', attack='none', eps_255=0, AUROC=.9),
        dict(score='energy', attack='pgd20', eps_255=1, AUROC=.8)])
grid.tune_and_measure = work
grid.check_tune = lambda config: None
grid.lacks = lambda config: ''
print('ready', flush=True)
sys.stdin.readline()
grid.run_missing(sys.argv[2], ['cifar10'], out=sys.argv[1])
"""


@pytest.mark.parametrize('name,n', [pytest.param('recipes', 14, marks=pytest.mark.slow), ('select', 60)])
def test_two_commands_on_one_folder_share_the_work(name, n, tmp_path):
    "Of the search too, each step of which waits for the whole step before"
    if name != 'select':
        shutil.copy(ROOT / 'results/chosen.json', tmp_path)
    p = together([started(GRID, tmp_path, name) for _ in range(2)])
    ran = [re.findall(r'^ran (\S+)', q.communicate(timeout=120)[0], re.M) for q in p]
    both = ran[0] + ran[1]
    made = [o.name for o in (tmp_path / name).iterdir()]
    assert sorted(both) == sorted(made) and len(made) == n and all(ran)
