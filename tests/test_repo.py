"What holds for the repository as a whole: notebooks, package and README in step, and clean."
import json, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from readme import render

ROOT = Path(__file__).resolve().parent.parent
NBS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
ids = [p.stem for p in NBS]

def tool(name, cwd): subprocess.run([Path(sys.executable).parent/name], cwd=cwd, check=True, capture_output=True)

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of what nbdev reads and writes, to run it on without touching the tree"
    d = tmp_path_factory.mktemp('repo')
    for o in 'settings.ini','_quarto.yml','README.md': shutil.copy(ROOT/o, d/o)
    for o in 'nbs','aoe_nb': shutil.copytree(ROOT/o, d/o, symlinks=True, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    return d

def test_export_changes_nothing(copy):
    tool('nbdev_export', copy)
    for p in sorted((ROOT/'aoe_nb').glob('*.py')): assert (copy/'aoe_nb'/p.name).read_text() == p.read_text(), f'{p.name}: run nbdev_export'
    assert {p.name for p in (copy/'aoe_nb').glob('*.py')} == {p.name for p in (ROOT/'aoe_nb').glob('*.py')}

def test_clean_changes_nothing(copy):
    tool('nbdev_clean', copy)
    for p in NBS: assert (copy/p.relative_to(ROOT)).read_text() == p.read_text(), f'{p.name}: run nbdev_clean'

def test_readme_is_index():
    text,files = render()
    assert (ROOT/'README.md').read_text() == text, 'run make readme'
    for name,data in files.items(): assert (ROOT/name).read_bytes() == data, f'{name}: run make readme'
    assert {p.name for p in (ROOT/'README_files').iterdir()} == {Path(o).name for o in files}, 'run make readme'

@pytest.mark.parametrize('nb', NBS, ids=ids)
def test_notebook_is_fit_for_the_site(nb):
    assert nb.stat().st_size < 300_000, 'smaller figures, please'
    cells = json.loads(nb.read_text())['cells']
    first = ''.join(cells[0]['source'])
    assert first.startswith('# ') and '\n> ' in first, 'a page opens with its title and one line'
    text = nb.read_text()
    out = json.dumps([c.get('outputs') for c in cells])
    assert 'Traceback' not in out and not re.search(r'\w+Warning', out)
    assert not re.search(r'(?<![\w.])/(?:home|root|work|tmp)/\w', text), 'a path of one machine'
    assert any(c.get('outputs') for c in cells), 'run it and keep the outputs'

def test_flagged_cells_are_listed():
    "Cells that nbdev_test leaves out are named, not forgotten"
    cells = [(nb.stem, ''.join(c['source'])) for nb in NBS for c in json.loads(nb.read_text())['cells']]
    flagged = [f'{n} ({m[1]})' for n,s in cells if (m := re.search(r'^#\|\s*(slow|cuda|data|eval:\s*false)', s, re.M))]
    if flagged: pytest.skip('notebook cells not run here: ' + ', '.join(sorted(set(flagged))))
