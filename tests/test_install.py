"The wheel in an environment of its own: without nbdev, with the newest fastai, away from the repository."

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

TRAIN = """
import importlib, importlib.util, pkgutil
assert importlib.util.find_spec('nbdev') is None
import aoe_nb
assert 'site-packages' in aoe_nb.__file__, aoe_nb.__file__
for module in pkgutil.walk_packages(aoe_nb.__path__, 'aoe_nb.'):
    if module.name != 'aoe_nb._modidx':
        importlib.import_module(module.name)
from aoe_nb.attack import FGSM
from aoe_nb.data import inliers, outliers, unseen
from aoe_nb.models import small_cnn
import fastai, fastcore
from fastai.vision.all import Learner, accuracy
dls = inliers('digits7').dls(64, valid=inliers('digits7', 'test'))
learn = Learner(dls, small_cnn(1, dls.c), metrics=accuracy).expose(outliers('china'), attack=FGSM(16/255))
before = [p.clone() for p in learn.model.parameters()]
with learn.no_bar(), learn.no_logging():
    learn.fit(1)
assert any((p != q).any() for p, q in zip(before, learn.model.parameters()))
assert learn.recorder.losses[-1].isfinite()
print(learn.ood_report(unseen('near', id='digits7')).AUROC.round(3).to_dict())
print('fastai', fastai.__version__, 'fastcore', fastcore.__version__)
"""

CLAIMS = """
from aoe_nb.study.claims import claims
print(claims('results').to_json(orient='index'))
"""


PAINT = """
import torch
from pathlib import Path
from aoe_nb.all import outliers
from aoe_nb.models import weights_file
x = outliers('gan-cifar10')
print(x)
assert 100 < x.x.float().mean() < 140
assert torch.equal(outliers('gan-cifar10').x, x.x) # from the disk
assert 'site-packages' in str(weights_file('gan-tiny-cifar100-s0.pt'))
"""


def lists():
    "What the library needs, and the names that only the tools hold back"
    settings = ConfigParser()
    settings.read(ROOT / 'settings.ini', encoding='utf-8')
    settings = settings['DEFAULT']
    tools = map(Requirement, settings['dev_requirements'].split())
    held = {r.name for r in tools if any(s.operator in ('<', '==') for s in r.specifier)}
    return settings['requirements'].split(), held


def needed(requirements):
    "Installed distributions, by name, that `requirements` lead to"
    found = {}
    todo = list(requirements)
    while todo:
        requirement = Requirement(todo.pop())
        name = re.sub(r'[-_.]+', '-', requirement.name).lower()
        wanted = requirement.marker is None or requirement.marker.evaluate({'extra': ''})
        if name in found or not wanted:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        todo += found[name].requires or []
    return found


def share(site):
    "Link what the library needs into `site`, file by file; what the tools hold back is left to pip, the newest of it"
    requirements, held = lists()
    for name, dist in needed(requirements).items():
        if name in held:
            continue
        for file in dist.files or []:
            source = dist.locate_file(file)
            if '..' in file.parts or not source.is_file():
                continue
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.symlink_to(Path(source).resolve())


def sh(*args, home=None, **kwargs):
    "The output of a command that must succeed; neither the checkout nor the user's settings are on its way"
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    if home:
        env['HOME'] = str(home)
    try:
        done = subprocess.run(list(map(str, args)), check=True, capture_output=True, text=True, env=env, **kwargs)
    except subprocess.CalledProcessError as e:
        pytest.fail(f'{" ".join(e.cmd[:5])}\n{e.stdout[-1000:]}\n{e.stderr[-3000:]}', pytrace=False)
    return done.stdout


def copy_sources(folder):
    "A copy of the sources, so that nothing of an earlier build gets into a new one"
    source = folder / 'source'
    source.mkdir()
    for name in 'settings.ini', 'setup.py', 'MANIFEST.in', 'README.md', 'LICENSE':
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / 'aoe_nb', source / 'aoe_nb', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(ROOT / 'weights', source / 'weights')
    return source


def build_wheel(folder):
    "A wheel from the sources"
    source = copy_sources(folder)
    sh(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', folder, source)
    return next(folder.glob('aoe_nb-*.whl'))


@pytest.fixture(scope='session')
def installed(tmp_path_factory):
    "The folder of programs of an environment with the wheel"
    folder = tmp_path_factory.mktemp('wheel')
    venv.create(folder / 'env')
    programs = folder / 'env/bin'
    python = programs / 'python'
    share(Path(sh(python, '-c', 'import site; print(site.getsitepackages()[0])').strip()))
    sh(sys.executable, '-m', 'pip', '--python', python, 'install', '-q', build_wheel(folder))
    return programs


def test_wheel_with_newest_fastai(installed, tmp_path):
    out = sh(installed / 'python', '-c', TRAIN, cwd=tmp_path, home=tmp_path)
    version = out.split('fastai ')[1].split()[0]
    assert tuple(map(int, version.split('.'))) >= (2, 8, 12), out
    assert (installed / 'aoe_demo').exists()


@pytest.mark.slow
def test_outliers_of_a_generator_without_a_checkout(installed, tmp_path):
    "The wheel is small enough to bring two generators along"
    out = sh(installed / 'python', '-c', PAINT, cwd=tmp_path, home=tmp_path)
    assert 'gan-cifar10: 25,000 images of 3x32x32' in out
    wheel = next(tmp_path.parent.glob('wheel*/aoe_nb-*.whl'))
    assert wheel.stat().st_size < 8e6


def test_a_source_archive_is_whole(tmp_path):
    "A wheel that is built from the archive of the sources has what one from the checkout has"
    pytest.importorskip('setuptools', reason='setuptools is not installed here: nothing builds')
    source = copy_sources(tmp_path)
    sh(sys.executable, 'setup.py', '-q', 'sdist', '-d', tmp_path, cwd=source)
    wheels = []
    for place in source, next(tmp_path.glob('aoe_nb-*.tar.gz')):
        folder = tmp_path / place.name.replace('.', '_')
        sh(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', folder, place)
        wheels.append(sorted(ZipFile(next(folder.glob('*.whl'))).namelist()))
    assert wheels[0] == wheels[1]
    assert sum(name.startswith('aoe_nb/weights/gan-tiny-') for name in wheels[0]) == 4


@pytest.mark.skipif(not find_spec('aoe_nb.study'), reason='no aoe_nb.study yet')
def test_claims_need_only_the_results(installed, tmp_path):
    (tmp_path / 'results').symlink_to(ROOT / 'results')
    here = json.loads(sh(sys.executable, '-c', CLAIMS, cwd=ROOT).splitlines()[-1])
    away = json.loads(sh(installed / 'python', '-c', CLAIMS, cwd=tmp_path, home=tmp_path).splitlines()[-1])
    assert away == here
    assert away['P1']['verdict'] in ('holds', 'undecided', 'fails')


@pytest.mark.slow
def test_nbdev_3_exports_the_same_modules(tmp_path):
    tree = tmp_path / 'tree'
    tree.mkdir()
    for name in 'nbs', 'aoe_nb':
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns('__pycache__', '_proc'))
    for name in 'settings.ini', 'pyproject.toml', 'README.md':
        shutil.copy(ROOT / name, tree)
    modules = [p.relative_to(ROOT) for p in (ROOT / 'aoe_nb').rglob('*.py') if p.name != '_modidx.py']
    generated = [p for p in modules if 'AUTOGENERATED' in (ROOT / p).read_text()]
    for path in generated:
        (tree / path).unlink()
    venv.create(tmp_path / 'env', with_pip=True)
    sh(tmp_path / 'env/bin/pip', 'install', '-q', 'nbdev>=3')
    sh(tmp_path / 'env/bin/nbdev-export', cwd=tree, home=tmp_path)
    assert len(generated) > 30
    assert not [str(p) for p in modules if (tree / p).read_bytes() != (ROOT / p).read_bytes()]


def test_both_versions_of_nbdev_are_told_the_same():
    import tomllib

    old = ConfigParser()
    old.read(ROOT / 'settings.ini', encoding='utf-8')
    new = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['nbdev']
    assert {k: old['DEFAULT'][k].lower() for k in new} == {k: str(v).lower() for k, v in new.items()}


def interpreter(version):
    "A Python of that version, on the path or kept by pyenv; None if there is none"
    kept = sorted(Path.home().glob(f'.pyenv/versions/{version}.*/bin/python'))
    found = [str(o) for o in kept] + [shutil.which(f'python{version}')]
    works = [o for o in found if o and not subprocess.run([o, '-c', ''], capture_output=True).returncode]
    return works[0] if works else None


@pytest.mark.parametrize('version', ['3.10', '3.12'])
def test_other_pythons_read_every_module(version):
    "`make test-newest PYTHON=...` runs the tests there"
    python = interpreter(version)
    if python is None:
        pytest.skip(f'no Python {version} on this machine')
    code = 'import ast, pathlib, sys\nfor f in pathlib.Path(sys.argv[1]).rglob("*.py"): ast.parse(f.read_text("utf-8"))'
    done = subprocess.run([python, '-c', code, str(ROOT / 'aoe_nb')], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
