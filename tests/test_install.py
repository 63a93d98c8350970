"The wheel in an empty environment: without nbdev, with the newest fastai. PyTorch is shared with this environment, for it is large."
import os, subprocess, sys, venv
from importlib.metadata import distributions
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
BIG = 'torch','torchvision','triton','nvidia-','cuda-'

TRAIN = '''
import importlib.util, pkgutil
assert importlib.util.find_spec('nbdev') is None
import aoe_nb
for m in pkgutil.iter_modules(aoe_nb.__path__):
    if m.name != '_modidx': importlib.import_module(f'aoe_nb.{m.name}')
assert '.venv' not in aoe_nb.__file__ or 'site-packages' in aoe_nb.__file__, aoe_nb.__file__
from aoe_nb.attack import FGSM
from aoe_nb.data import inliers, outliers, unseen
from aoe_nb.models import small_cnn
import fastai, fastcore
from fastai.vision.all import Learner, accuracy
dls = inliers('digits7').dls(64, valid=inliers('digits7', 'test'))
learn = Learner(dls, small_cnn(1, dls.c), metrics=accuracy).expose(outliers('china'), attack=FGSM(16/255))
before = [p.clone() for p in learn.model.parameters()]
with learn.no_bar(), learn.no_logging(): learn.fit(1)
assert any((p != q).any() for p, q in zip(before, learn.model.parameters())) and learn.recorder.losses[-1].isfinite()
print(learn.ood_report(unseen('near', id='digits7')).AUROC.round(3).to_dict())
print('fastai', fastai.__version__, 'fastcore', fastcore.__version__)
'''

def share(site):
    "Link the large distributions of this environment into `site`"
    for d in distributions():
        if not (d.metadata['Name'] or '').lower().replace('_', '-').startswith(BIG): continue
        for top in {f.parts[0] for f in d.files or [] if f.parts[0] not in ('..','__pycache__')}:
            src = Path(d.locate_file(top)).resolve()
            if src.exists() and not (site/top).exists(): (site/top).symlink_to(src)

def test_wheel_with_newest_fastai(tmp_path):
    def sh(*a, **kw): return subprocess.run(list(map(str, a)), check=True, capture_output=True, text=True, **kw).stdout
    env = tmp_path/'env'; venv.create(env, with_pip=True)
    py = env/'bin'/'python'
    site = Path(sh(py, '-c', 'import site; print(site.getsitepackages()[0])').strip())
    share(site)
    try:
        sh(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', tmp_path, ROOT)
        sh(py, '-m', 'pip', 'install', '-q', next(tmp_path.glob('aoe_nb-*.whl')))
        out = sh(py, '-c', TRAIN, cwd=tmp_path, env=os.environ | dict(MPLBACKEND='agg', HOME=str(tmp_path)))
    except subprocess.CalledProcessError as e: pytest.fail(f'{" ".join(e.cmd[:5])}\n{e.stderr[-3000:]}')
    major,minor,patch = map(int, out.split('fastai ')[1].split()[0].split('.'))
    assert (major,minor,patch) >= (2,8,12), out
    assert (env/'bin'/'aoe_demo').exists()
