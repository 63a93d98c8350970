"""Two and three processes on a CPU: together they train what one would train, and a death is heard."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip('accelerate', reason='pip install accelerate')

import ranks  # noqa: E402

HERE = Path(__file__).resolve().parent


def environment():
    here = f'{HERE.parent}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'
    return os.environ | dict(PYTHONPATH=here, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')


def launch(world, folder, *tasks):
    "`tasks` of ranks.py in `world` processes"
    run = [
        sys.executable,
        '-W',
        'ignore',
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node',
        str(world),
    ]
    cmd = [*run, HERE / 'ranks.py', folder, *tasks]
    return subprocess.run(cmd, capture_output=True, text=True, env=environment())


def torchrun(world, folder, *tasks):
    "What each process kept of each task: {task: one a rank}"
    done = launch(world, folder, *tasks)
    assert not done.returncode, done.stderr[-3000:]

    def kept(task, rank):
        return torch.load(folder / f'{task}-{rank}.pt', weights_only=False)

    return {task: [kept(task, rank) for rank in range(world)] for task in tasks}


SHORT = 'share', 'mined', 'silent_attack', 'pipeline', 'sync_bn', 'bn_local', 'alone'


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    return torchrun(2, tmp_path_factory.mktemp('two'), *SHORT)


@pytest.fixture(scope='module')
def three(tmp_path_factory):
    return torchrun(3, tmp_path_factory.mktemp('three'), 'share')


def rows(xs):
    "Images as a sorted list, so that two multisets can be compared"
    return sorted(map(tuple, torch.cat(xs).flatten(1).tolist()))


slow = pytest.mark.slow


@pytest.mark.parametrize('processes', ['two', pytest.param('three', marks=slow)])
def test_together_they_train_what_one_process_trains(processes, request):
    res = request.getfixturevalue(processes)['share']
    learn = ranks.learner(1, ranks.in_order(len(res)))
    attack = ranks.exposed(learn)
    weights = ranks.fit(learn)
    for step, one in enumerate(attack.seen):  # step by step, so epoch by epoch too
        assert rows([one]) == rows([o['seen'][step] for o in res])
    for o in res:
        assert torch.equal(o['weights'], res[0]['weights'])
        assert (o['weights'] - weights).abs().max() < 1e-6
    noise = [tuple(n.tolist()) for o in res for n in o['noise']]
    assert len(set(noise)) == len(noise)


def test_all_mine_the_same_outliers(two):
    a, b = two['mined']
    learn = ranks.learner(1, order=ranks.in_order(2))
    ranks.exposed(learn, mine=ranks.Mining(0.1, 0.5))
    weights = ranks.fit(learn)
    assert torch.equal(a['rows'], b['rows']) and torch.equal(a['rows'], learn.outlier_exposure.stream.rows)
    assert torch.equal(a['weights'], b['weights']) and (a['weights'] - weights).abs().max() < 1e-5


def test_columns_are_those_of_all_processes(two):
    "Or a callback that stops by them would stop one process, and the others would wait for it"
    learn = ranks.learner(1, ranks.in_order(2))
    ranks.exposed(learn)
    ranks.fit(learn)
    a, b = (o['values'] for o in two['share'])
    assert a == b
    columns = slice(learn.recorder.metric_names.index('out_loss') - 1, None)
    assert len(a[columns]) == 3
    assert a[columns] == pytest.approx(learn.recorder.values[-1][columns], abs=1e-5)


def test_a_full_pass_has_no_image_twice(two):
    "The first 24 outliers of an epoch of 30: none is drawn by both"
    a, b = two['share']
    first = [rows(o['seen'][:2]) for o in (a, b)]
    assert not set(first[0]) & set(first[1])
    assert len(set(first[0] + first[1])) == 24


def test_an_attack_talks_to_nobody(two):
    for o in two['silent_attack']:
        assert len(o['during']) == 8
        assert all(not any(d.values()) for d in o['during'])
        assert o['count']['averages'] >= 8 and o['count']['passes'] >= 8


def test_the_pipeline_is_found_behind_the_wrapper(two):
    for o in two['pipeline']:
        assert o == dict(marked=True, found=True)


def test_sync_bn_keeps_what_the_ways_promise(two):
    for o in two['sync_bn']:
        assert len(o) == 5 and max(o.values()) < 1e-3, o


def test_buffers_are_the_first_ones_when_an_attack_begins(two):
    a, b = two['bn_local']
    assert [len(o) for o in a['starts']] == [1] + [2] * 7
    for one, other in zip(a['starts'], b['starts']):
        assert all(map(torch.equal, one, other))


def test_processes_that_share_nothing_see_everything(two):
    a, b = two['alone']
    learn = ranks.learner(1)
    attack = ranks.exposed(learn)
    ranks.fit(learn, 1)
    for o in a, b:
        assert all(map(torch.equal, o['seen'], attack.seen))


@pytest.mark.parametrize('world', [2, pytest.param(3, marks=slow)])
def test_killed_and_resumed_on_several_ranks(tmp_path, world):
    want = torchrun(world, tmp_path, 'whole_run', 'half_run')['whole_run']
    for o, w in zip(torchrun(world, tmp_path, 'other_half')['other_half'], want):
        assert o['first'] == 2
        assert torch.equal(o['weights'], w['weights'])


def test_sync_bn_on_a_cpu_is_refused_by_name(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='SyncBatchNorm works on GPUs only'):
        with ranks.learner().ranks_ctx(sync_bn=True, cpu=True):
            pass


def test_one_process_is_left_alone(monkeypatch):
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    learn = ranks.learner()
    with learn.ranks_ctx() as same:
        assert same is learn and 'any_trainer' not in str(learn.cbs)


@slow
def test_a_death_ends_the_others(tmp_path):
    start = time.time()
    done = launch(2, tmp_path, 'death')
    assert done.returncode and time.time() - start < 60
    assert 'SIGKILL' in done.stderr or 'Signal 9' in done.stderr


def by_hand(task, folder):
    "Two processes that nobody watches"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    env = environment() | dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    cmd = [sys.executable, '-W', 'ignore', HERE / 'ranks.py', folder, task]
    return [
        subprocess.Popen(cmd, stderr=subprocess.PIPE, text=True, env=env | dict(RANK=str(r), LOCAL_RANK=str(r)))
        for r in range(2)
    ]


@pytest.mark.parametrize('task', ['death', pytest.param('silence', marks=slow)])
def test_a_death_or_a_silence_is_heard_where_nobody_watches(tmp_path, task):
    start = time.time()
    first, second = by_hand(task, tmp_path)
    try:
        _, said = first.communicate(timeout=60)
    finally:
        for p in first, second:
            p.send_signal(signal.SIGKILL)
            p.wait()
    assert first.returncode and time.time() - start < 60
    assert 'process 0 of 2 stops: another process died, or did not answer' in said
