"What holds for the repository as a whole: notebooks, package and README in step, and clean."

import ast
import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from collapse import collapse, notebooks
from readme import render
from website import pages

ROOT = Path(__file__).resolve().parent.parent
NBS = notebooks()
PAGES = pages()
ids = [p.relative_to(ROOT / 'nbs').with_suffix('').as_posix() for p in PAGES]
each_page = pytest.mark.parametrize('nb', PAGES, ids=ids)


def tool(name, cwd):
    subprocess.run([Path(sys.executable).parent / name], cwd=cwd, check=True, capture_output=True)


def generated(root):
    "Text by path of the modules in `root`"
    return {p.relative_to(root).as_posix(): p.read_text() for p in sorted((root / 'aoe_nb').rglob('*.py'))}


# In step


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of what nbdev reads and writes, to run it on without touching the tree"
    folder = tmp_path_factory.mktemp('repo')
    for name in 'settings.ini', '_quarto.yml', 'README.md':
        shutil.copy(ROOT / name, folder)
    leave = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for name in 'nbs', 'aoe_nb':
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=leave)
    return folder


def test_export_changes_nothing(copy):
    tool('nbdev_export', copy)
    now, then = generated(copy), generated(ROOT)
    assert list(now) == list(then), 'run nbdev_export'
    for name, text in then.items():
        assert now[name] == text, f'{name}: run nbdev_export'


def test_clean_changes_nothing(copy):
    tool('nbdev_clean', copy)
    for nb in NBS:
        assert (copy / nb.relative_to(ROOT)).read_text() == nb.read_text(), f'{nb.name}: run nbdev_clean'


def test_readme_is_index():
    text, files = render()
    assert (ROOT / 'README.md').read_text() == text, 'run make readme'
    for name, data in files.items():
        assert (ROOT / name).read_bytes() == data, f'{name}: run make readme'
    assert {p.name for p in (ROOT / 'README_files').iterdir()} == {Path(name).name for name in files}, 'run make readme'


# Notebooks


@each_page
def test_notebook_is_fit_for_the_site(nb):
    assert nb.stat().st_size < 300_000, 'smaller figures, please'
    text = nb.read_text()
    cells = json.loads(text)['cells']
    first = ''.join(cells[0]['source'])
    assert first.startswith('# ') and '\n> ' in first, 'a page opens with its title and one line'
    outputs = [c.get('outputs') for c in cells]
    assert 'Traceback' not in json.dumps(outputs)
    assert not re.search(r'\w+Warning', json.dumps(outputs))
    assert not re.search(r'(?<![\w.])/(?:home|root|work|tmp)/\w', text), 'a path of one machine'
    assert any(outputs), 'run it and keep the outputs'


def test_imports_and_helpers_are_collapsed():
    open_ = [nb.name for nb in NBS if collapse(json.loads(nb.read_text()))]
    assert not open_, 'run python tools/collapse.py'


def test_flagged_cells_are_listed():
    "Cells that nbdev_test leaves out are named, not forgotten"
    flagged = set()
    for nb in NBS:
        for cell in json.loads(nb.read_text())['cells']:
            flag = re.search(r'^#\|\s*(slow|cuda|data|eval:\s*false)', ''.join(cell['source']), re.M)
            if flag:
                flagged.add(f'{nb.stem} ({flag[1]})')
    if flagged:
        pytest.skip('notebook cells not run here: ' + ', '.join(sorted(flagged)))


# Rooms

# A room imports only from lines above its own. The library does not know the study, nobody the old names.
ROOMS = """
lease
energy attack metrics plots record device conformal drift distributed
batchnorm free least mining sources models cache
images methods cluster
loaders drawn painted
data
stream
evaluation heads resumption hold
peers audit attack_audit exposure detector openood
generate graph
sheet
demo
all
study study.protocol study.defects
study.train
study.measure
study.search
study.grid study.claims
experiment poster
cli
"""
LEVELS = {room: level for level, line in enumerate(ROOMS.strip().splitlines()) for room in line.split()}


def modules():
    "Path by name of the rooms, `study.claims` for aoe_nb/study/claims.py"
    found = {}
    for path in sorted((ROOT / 'aoe_nb').rglob('*.py')):
        parts = path.relative_to(ROOT / 'aoe_nb').with_suffix('').parts
        name = '.'.join(parts).removesuffix('.__init__')
        if name not in ('__init__', '_modidx'):
            found[name] = path
    return found


MODULES = modules()


def imported(name, path):
    "The rooms that a room imports, anywhere but in the door that keeps an old name (its `__getattr__`)"
    package = ['aoe_nb', *name.split('.')]
    if path.stem != '__init__':
        package.pop()
    rooms = set()
    tree = ast.parse(path.read_text())
    tree.body = [o for o in tree.body if getattr(o, 'name', '') != '__getattr__']
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [o.name for o in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            start = '.'.join([*base, *([node.module] if node.module else [])])
            targets = [start, *(f'{start}.{o.name}' for o in node.names)]
        else:
            continue
        rooms |= {t.removeprefix('aoe_nb.') for t in targets if t.startswith('aoe_nb.')} & set(MODULES)
    return rooms


def test_every_room_has_its_place():
    assert set(MODULES) <= set(LEVELS), 'a new room? give it a line in ROOMS'
    assert not {'core', 'utils', 'common', 'misc'} & {part for name in MODULES for part in name.split('.')}


@pytest.mark.parametrize('room', MODULES)
def test_arrows_point_down(room):
    "So there is no circle either"
    up = [other for other in imported(room, MODULES[room]) if LEVELS[other] >= LEVELS[room]]
    assert not up, f'{room} imports {up}, which are not above it'


OLD_NAMES = json.loads((ROOT / 'tests/old_names.json').read_text())


@pytest.mark.parametrize('room', OLD_NAMES)
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_old_names_are_found_where_they_were(room):
    module = import_module(f'aoe_nb.{room}')
    assert not [name for name in OLD_NAMES[room] if not hasattr(module, name)]


def test_everything_comes_with_one_import():
    code = 'from fastai.learner import Learner; from aoe_nb.all import *; OutlierExposure, energy, Learner.ood_report'
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, cwd=ROOT)


# One address


def test_the_address_stands_in_one_place():
    "It is made of `user` and `repo` in settings.ini; _quarto.yml has braces for it"
    user = re.search(r'^user\s*=\s*(.+)$', (ROOT / 'settings.ini').read_text(), re.M)[1].strip()
    for name in '_quarto.yml', 'setup.py', 'CITATION.cff', 'CONTRIBUTING.md', 'Makefile':
        assert f'/{user}/' not in (ROOT / name).read_text() and f'{user}.github.io' not in (ROOT / name).read_text(), (
            name
        )
