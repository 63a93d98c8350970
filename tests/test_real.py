"The real sets, wherever they are on this disk; nothing is downloaded."
import json, sys, time
from pathlib import Path
import pytest, torch
from aoe_nb.data import inliers, unseen
from aoe_nb.sources import on_disk

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT/'benchmarks'))
from published import learner, sets

def need(*names, weights=None):
    for o in names:
        if not on_disk(o): pytest.skip(f'{o} is not on this disk (aoe_fetch {o})')
    if weights and not (Path(torch.hub.get_dir())/'checkpoints'/weights).exists(): pytest.skip(f'{weights} is not in {Path("torch hub")/"checkpoints"}')

def test_published_resnet20_scores_what_was_published():
    need('cifar10', weights='resnet20-12fca82f.th')
    learn = learner()
    with learn.no_bar(): assert float(learn.validate()[1]) == pytest.approx(.9173, abs=5e-5)

def test_report_of_the_page_is_reproduced():
    need('cifar10', *sets, weights='resnet20-12fca82f.th')
    want = {o['set']: o for o in json.loads((ROOT/'results/published/resnet20-cifar10.json').read_text())['ood']}
    got = learner().ood_report(unseen(sets))
    for s in sets:
        for m in 'AUROC','AUPR_OUT','AUPR_IN','FPR95','FPR95_ID': assert got.loc[s,m] == pytest.approx(want[s][m], abs=5e-4), (s, m)

def test_classes_and_order_are_the_published_ones():
    need('cifar10')
    test = inliers('cifar10', 'test')
    assert test.classes == 'airplane automobile bird cat deer dog frog horse ship truck'.split()
    assert torch.bincount(test.y).tolist() == [1000]*10

def test_methods_of_a_pair_see_the_same_inliers():
    need('cifar10', 'tinyimagenet_aux', weights='resnet20-12fca82f.th')
    from aoe_nb.methods import methods
    from aoe_nb.poster import _trial, tune
    first = {m: tune(_trial('cifar10', m, steps=1, bs=64, bn='frozen')).energy_log.rows[0] for m in methods}
    assert len({o[0] for o in first.values()}) == 1, first
    assert first['plain'][1] is None and first['aoe'][1] < first['oe'][1]
