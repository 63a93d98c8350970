"The real sets, wherever they are on this disk; nothing is downloaded."

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from published import learner, sets

from aoe_nb.data import inliers, unseen
from aoe_nb.methods import exposure_of, methods
from aoe_nb.sources import on_disk
from aoe_nb.study.search import trial_config
from aoe_nb.study.train import check_tune, tune

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = 'resnet20-12fca82f.th'


def need(*names, weights=None):
    for name in names:
        if not on_disk(name):
            pytest.skip(f'{name} is not on this disk (aoe_fetch {name})')
    if weights and not (Path(torch.hub.get_dir()) / 'checkpoints' / weights).exists():
        pytest.skip(f'{weights} is not in {Path("torch hub") / "checkpoints"}')


def test_published_resnet20_scores_what_was_published():
    need('cifar10', weights=PUBLISHED)
    learn = learner()
    with learn.no_bar():
        accuracy = float(learn.validate()[1])
    assert accuracy == pytest.approx(0.9173, abs=5e-5)


def test_report_of_the_page_is_reproduced():
    need('cifar10', *sets, weights=PUBLISHED)
    rows = json.loads((ROOT / 'results/published/resnet20-cifar10.json').read_text())['ood']
    want = {row['set']: row for row in rows}
    got = learner().ood_report(unseen(sets))
    for name in sets:
        for metric in 'AUROC', 'AUPR_OUT', 'AUPR_IN', 'FPR95', 'FPR95_ID':
            assert got.loc[name, metric] == pytest.approx(want[name][metric], abs=5e-4), (name, metric)


def test_classes_and_order_are_the_published_ones():
    need('cifar10')
    test = inliers('cifar10', 'test')
    assert test.classes == 'airplane automobile bird cat deer dog frog horse ship truck'.split()
    assert torch.bincount(test.y).tolist() == [1000] * 10


def test_methods_of_a_pair_see_the_same_inliers():
    need('cifar10', 'tinyimagenet_aux', weights=PUBLISHED)
    first = {}
    for method in methods:
        learn = tune(trial_config('cifar10', method, steps=1, bs=64, bn='frozen'))
        first[method] = learn.energy_log.rows[0]
    moved = {m: first.pop(m) for m in methods if 'attack_in' in exposure_of(m, 0.1)}  # those that move the inliers
    attacked = moved['adv']
    assert len({row[0] for row in first.values()}) == 1, first
    assert attacked[0] < first['plain'][0] and attacked[1] is None
    assert first['plain'][1] is None
    assert first['aoe'][1] < first['oe'][1]


def test_bfloat16_trains_nearly_as_float32_does():
    need('cifar10', 'tinyimagenet_aux', weights=PUBLISHED)
    config = trial_config('cifar10', 'aoe', steps=2, bs=64, bn='frozen')
    rows = {}
    for precision in ('fp32', 'bf16'):
        check_tune(config | dict(precision=precision))
        rows[precision] = np.array(tune(config | dict(precision=precision)).energy_log.rows)
    assert 0 < np.abs(rows['fp32'] - rows['bf16']).max() < 0.2
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, not 'fp8'"):
        check_tune(config | dict(precision='fp8'))
