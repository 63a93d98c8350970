"The seven commands as programs: quick with --help and with what is wrong, polite at Ctrl-C, right on a user's folders."

import os, re, signal, subprocess, sys, time
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from aoe_nb import cli

COMMANDS = 'aoe_demo', 'aoe_run', 'aoe_generate', 'aoe_fetch', 'aoe_audit', 'aoe_detect', 'aoe_bench'
SUBJECTS = dict.fromkeys(COMMANDS, 1) | dict(aoe_detect=2)  # what may be given without a name
ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | dict(PYTHONPATH=str(ROOT), COLUMNS='100')


def words(name, *args):
    "The command `name` as its script starts it; it says at its end whether torch was imported"
    start = (
        'import atexit, sys; atexit.register(lambda: "torch" in sys.modules and print("HEAVY", file=sys.stderr)); '
        f'sys.argv[0] = "/bin/{name}"; from aoe_nb.cli import {name}; sys.exit({name}())'
    )
    return [sys.executable, '-W', 'ignore', '-c', start, *map(str, args)]


def listen():
    "Ctrl-C reaches a process that calls this first, even where the tests themselves run in the background"
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(name, *args, cwd):
    "The command as a process that Ctrl-C reaches"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(words(name, *args), cwd=cwd, env=ENV, text=True, preexec_fn=listen, **pipes)


def run(name, *args, cwd=None):
    return subprocess.run(words(name, *args), capture_output=True, text=True, cwd=cwd, env=ENV, timeout=300)


def test_each_command_is_declared():
    settings = ConfigParser()
    settings.read(ROOT / 'settings.ini', encoding='utf-8')
    scripts = dict(o.split('=') for o in settings['DEFAULT']['console_scripts'].split())
    assert scripts == {name: f'aoe_nb.cli:{name}' for name in COMMANDS}


HOMES = dict(aoe_demo='demo', aoe_run='study.grid', aoe_generate='generate', aoe_fetch='sources', aoe_audit='audit')


@pytest.mark.parametrize('name', HOMES)
def test_commands_are_found_where_they_were(name):
    home = import_module(f'aoe_nb.{HOMES[name]}')
    assert getattr(home, name) is getattr(cli, name)
    with pytest.raises(AttributeError, match='has no attribute'):
        home.nothing


@pytest.mark.parametrize('name', COMMANDS)
def test_help_is_quick_and_explains_everything(name):
    r = run(name, '--help')
    assert r.returncode == 0 and 'HEAVY' not in r.stderr
    every = list(getattr(cli, name).__wrapped__.__annotations__)
    usage = r.stdout.split('positional arguments')[0]
    for subject in every[: SUBJECTS[name]]:
        assert f'[{subject}]' in usage, 'what it is about may be given without a name'
    for o in every:
        assert f'--{o}' in r.stdout
    assert len(every) == len(set(every)) and r.stdout.count('The same as') == SUBJECTS[name]


REFUSED = [
    ('aoe_demo', '--eps 9999', "eps must lie in [0, 255] (1/255 of a pixel's range), not 9999"),
    ('aoe_demo', '--lam nan', 'lam must lie'),
    ('aoe_demo', '--seeds two', "invalid int value: 'two'"),
    ('aoe_demo', '--out /proc/x', 'choose another output folder'),
    ('aoe_demo', '--what', 'unrecognized'),
    ('aoe_run', 'grids', "unknown experiment 'grids': choose from starts"),
    ('aoe_run', 'grid --ids mnist', "unknown inliers 'mnist': choose from cifar10"),
    ('aoe_run', 'grid --seeds 0,a', 'seeds must be whole numbers'),
    ('aoe_run', 'x --device tpu', 'unknown'),
    ('aoe_run', 'grid --cluster cloud', "unknown cluster 'cloud': choose from slurm, local, debug"),
    ('aoe_run', 'grid --cluster local --hours 0', 'hours must lie in'),
    ('aoe_run', 'grid --part 1/2', 'partition is for a cluster, add --cluster slurm; two plain commands share'),
    ('aoe_generate', 'nowhere', 'unknown set of inliers'),
    ('aoe_generate', '--sample-seed x', 'invalid int'),
    ('aoe_generate', '--sigma inf', 'sigma must be a positive number'),
    ('aoe_fetch', 'svhn,svnh', "unknown data set 'svnh'"),
    ('aoe_audit', 'a --id b', 'not allowed'),
    ('aoe_audit', 'nowhere', 'unknown set of inliers'),
    ('aoe_audit', '--size -3', 'size must lie in'),
    ('aoe_audit', '--sets flower,x', "'x' is neither"),
    ('aoe_audit', '--exposed x', "'x' is neither a file nor a folder, nor one of china"),
    ('aoe_detect', '', 'give a model and a folder'),
    ('aoe_detect', 'x.pkl .', 'there is no file x.pkl'),
    ('aoe_detect', '/proc/version y', 'there is neither a folder nor a file y'),
    ('aoe_detect', '/proc/version .', '. is empty'),
    ('aoe_detect', '/proc/version /proc/version --out x.csv', 'out must end in .html'),
    ('aoe_detect', '/proc/version /proc/version --out /proc/x/x.html', 'choose another output folder'),
    ('aoe_detect', 'a b --model c', 'not allowed'),
    ('aoe_detect', 'a b --n many', "invalid int value: 'many'"),
    ('aoe_bench', '', 'give checkpoints'),
    ('aoe_bench', 's0.ckpt', 'there is no file s0.ckpt'),
    ('aoe_bench', '.', 'has no s0/best.ckpt'),
    ('aoe_bench', '/proc/version --id cifar', "unknown benchmark 'cifar': choose from cifar10"),
    ('aoe_bench', '/proc/version --arch vit', "unknown network 'vit'"),
    ('aoe_bench', '/proc/version --eps 300', 'eps must lie in [0, 255]'),
    ('aoe_bench', '/proc/version --attacked none', "unknown side 'none'"),
    ('aoe_bench', '/proc/version --root nowhere', 'there are no lists in nowhere/benchmark_imglist/cifar10'),
]


@pytest.mark.parametrize('name,args,why', REFUSED)
def test_what_is_wrong_is_said_at_once(name, args, why, tmp_path):
    r = run(name, *args.split(), cwd=tmp_path)
    assert r.returncode and why in r.stderr and 'Traceback' not in r.stderr
    assert 'HEAVY' not in r.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize('name,wait', [*((name, 1.5) for name in COMMANDS), ('aoe_demo', 8.0)])
def test_ctrl_c_is_polite(name, wait, tmp_path):
    "While it imports, and while it works"
    args = []
    if name == 'aoe_detect':
        args = ['export.pkl'] * 2  # while it imports; while it works: tests/test_sheet.py
        (tmp_path / args[0]).touch()
    if name == 'aoe_bench':
        args = ['s0.ckpt', '--root', tmp_path]
        (tmp_path / args[0]).touch()
        (tmp_path / 'benchmark_imglist/cifar10').mkdir(parents=True)
    p = started(name, *args, cwd=tmp_path)
    time.sleep(wait)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and f'{name}: stopped; ' in err and 'Traceback' not in err


def test_ctrl_c_in_an_import_that_swallows_it(tmp_path):
    "As a C++ library can, in which an exception of Python's aborts the process"
    lines = 'import os, signal', 'try: os.kill(os.getpid(), signal.SIGINT)', 'except KeyboardInterrupt: os.abort()'
    (tmp_path / 'heavy.py').write_text('\n'.join(lines))
    slow = 'def slow(', '    out:str="all", # Folder', '): import heavy'
    body = 'from aoe_nb.cli import command', '@command("{out} is kept")', *slow, 'slow()'
    (tmp_path / 'slow.py').write_text('\n'.join(body))
    p = subprocess.Popen([sys.executable, 'slow.py'], cwd=tmp_path, env=ENV, stderr=subprocess.PIPE, preexec_fn=listen)
    said = p.communicate(timeout=60)[1].decode()
    assert p.returncode == 130 and said == '\nslow: stopped; all is kept\n'


def images(folder, n, seed, side=16, spread=90, least=0):
    "Noise as files"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        pixels = least + rng.random((side, side, 3)) * spread
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i}.png')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Inliers, outliers, and outliers with an image of the training among them"
    folder = tmp_path_factory.mktemp('audit')
    for k, o in enumerate(('train/a', 'train/b', 'test/a', 'test/b')):
        images(folder / 'mine' / o, 8, k, spread=150)
    images(folder / 'out', 8, 9, spread=150)
    images(folder / 'more/out', 8, 10, spread=150)
    (folder / 'more/out/8.png').write_bytes((folder / 'mine/train/a/0.png').read_bytes())
    return folder


@pytest.fixture
def audit(home, monkeypatch, capsys):
    "The command in this process, in the folder `home`: its exit code and what it printed"
    monkeypatch.chdir(home)

    def run(*args, **kwargs):
        try:
            code = cli.aoe_audit(*args, **kwargs)
        except SystemExit as e:
            code = e.code
        return code, capsys.readouterr().out

    return run


def test_audit_of_a_users_folders(audit, home):
    code, good = audit('mine', exposed='out')
    assert code is None and '0 faults' in good
    assert audit(str(home / 'mine'), exposed=str(home / 'out'))[0] is None
    code, leak = audit('mine', exposed='out', sets='more/out,out')
    rows = [o.split() for o in leak.splitlines()]
    assert code == 1 and ['duplicates', 'more/out', 'mine', 'train', '1', 'exact,', '1', 'near', 'fault'] in rows
    assert ['duplicates', 'out', 'out', '8', 'exact,', '8', 'near', 'fault'] in rows, 'exposed and unseen are the same'


def test_audit_brings_folders_to_one_size(audit, home):
    images(home / 'large', 4, 11, side=24, spread=150)
    code, said = audit('mine', exposed='large')
    assert code == 1 and '3x24x24' in said
    assert audit('mine', exposed='large', size=12)[0] is None


def test_audit_needs_something_to_compare(audit):
    assert 'give --exposed or --sets' in audit('mine')[0]


def test_help_of_run_names_every_experiment():
    from aoe_nb.cli import aoe_run
    from aoe_nb.study.protocol import experiments

    words = set(re.findall(r'\w+', aoe_run.__doc__))
    assert set(experiments) <= words


def test_run_alone_lists(tmp_path):
    r = run('aoe_run', cwd=tmp_path)
    assert r.returncode == 0 and 'starts    cifar10      0 done  4 missing' in r.stdout and 'aoe_run NAME' in r.stdout


def test_generate_says_what_it_will_do(tmp_path):
    "And begins, for nobody sits at a terminal"
    p = started('aoe_generate', 'cifar10', '--seed', 9, cwd=tmp_path)
    said = []
    while not said or said[-1] and 'to do without' not in said[-1]:
        said.append(p.stdout.readline())
    p.send_signal(signal.SIGINT)
    p.communicate(timeout=60)
    said = ''.join(said)
    assert 'weights/gan-tiny-cifar10-s9.pt is trained first: 7 epochs of 50,000 images, about' in said
    assert 'on this machine' in said and 'Ctrl-C stops it' in said and 'to do without: --weights' in said


def test_generate_asks_at_a_terminal(monkeypatch):
    monkeypatch.setattr(cli.sys, 'stdin', type('Terminal', (), dict(isatty=lambda self: True))())
    monkeypatch.setattr(cli.sys, 'stdout', type('Terminal', (), dict(isatty=lambda self: True))())
    for answer, yes in ('y', True), ('', False), ('no', False):
        monkeypatch.setattr('builtins.input', lambda _, answer=answer: answer)
        assert cli._go_on() is yes
