"Other populations of outliers: their words, their shares, and settings that are picked where no table looks."

import json, shutil
from pathlib import Path
import pytest
import torch
from fastcore.test import test_fail as fails  # pytest collects what is called test_
from hypothesis import given, settings, strategies as st
from aoe_nb.data import Images
from aoe_nb.drawn import drawn
from aoe_nb.methods import methods
from aoe_nb.record import config_hash, result_path
from aoe_nb.study import train
from aoe_nb.study.grid import cells, lacks, listing, run_missing
from aoe_nb.study.protocol import cells_of, chosen, picked, protocol
from aoe_nb.study.train import check_tune, exposed_pool, outliers_sha, populations, unmade, weights_sha

RESULTS = Path(__file__).resolve().parent.parent / 'results'
LOCK = chosen(RESULTS)
IDS = list(LOCK)
SELECT = {'populations': 'populations_select', 'past': 'past_select'}


# Words


def numbered(n, name='numbers', **kw):
    "Images that say which they are"
    i = torch.arange(n)
    return Images(torch.stack([i // 256, i % 256], 1).to(torch.uint8).view(-1, 1, 1, 2), name=name, **kw)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.lists(st.integers(1, 90), min_size=2, max_size=5))
def test_parts_are_equal_and_small_ones_repeat(n, sizes):
    n = max(n, len(sizes))
    names = [f'p{k}' for k in range(len(sizes))]
    pools = {
        name: lambda sigma, m, k=k, size=size: numbered(size, str(k))
        for k, (name, size) in enumerate(zip(names, sizes))
    }
    before = dict(populations)
    populations.update(pools)
    try:
        pool = train._population('+'.join(names), 7, n)
    finally:
        populations.clear()
        populations.update(before)
    assert len(pool) == n
    shares = [len(range(k, n, len(sizes))) for k in range(len(sizes))]
    want = [i % size for size, share in zip(sizes, shares) for i in range(share)]
    assert (pool.x[:, 0, 0].long() @ torch.tensor([256, 1])).tolist() == want
    assert max(shares) - min(shares) <= 1


def test_words_stand_for_what_they_say():
    leaves = exposed_pool('leaves', 7, 5)
    assert torch.equal(leaves.x, drawn('leaves', 5).x)
    some = exposed_pool('procedural', 7, 8)
    for k, kind in enumerate(('leaves', 'spectra', 'waves', 'strokes')):
        assert torch.equal(some.x[2 * k : 2 * k + 2], drawn(kind, 2).x)
    generator = 'gan-tiny-cifar100-s0'
    halves = exposed_pool(f'{generator}+leaves', 7, 6)
    assert torch.equal(halves.x, torch.cat([exposed_pool(generator, 7, 3).x, leaves.x[:3]])) and halves.y is None
    for word in populations:
        if word not in ('tinyimagenet_aux', 'procedural') and 'cifar' not in word:
            assert len(exposed_pool(word, 7, 2)) == 2


def test_what_the_search_looks_at_is_never_exposed():
    "Characters and signs are no words, and no kind that is exposed has their pictures"
    assert not {'characters', 'signs'} & set(populations)
    fails(lambda: check_tune(protocol['tune'] | dict(outliers='characters')), contains='no generator characters')
    seen = torch.cat([drawn(kind, 30).x for kind in ('characters', 'signs')])
    shown = torch.cat([drawn(kind, 30).x for kind in ('leaves', 'spectra', 'waves', 'strokes', 'noise')])
    assert len(torch.cat([seen, shown]).flatten(1).unique(dim=0)) == 210


def test_checksums_name_the_generators():
    one, other = 'gan-tiny-cifar10-s0', 'gan-tiny-cifar100-s0'
    sums = [weights_sha(f'{o}.pt') for o in (one, other)]
    assert all(sums) and outliers_sha(one) == sums[0]
    assert outliers_sha(f'{one}+procedural') == outliers_sha(f'leaves+{one}') == sums[0]
    assert outliers_sha(f'{one}+{other}') == '+'.join(sums)
    assert outliers_sha('tinyimagenet_aux') == outliers_sha('noise+leaves') == outliers_sha('gan-tiny-cifar10-s9') == ''
    assert unmade(f'{one}+gan-tiny-cifar10-s9+noise') == ['gan-tiny-cifar10-s9']
    config = protocol['tune'] | dict(outliers='procedural+gan-tiny-cifar10-s9')
    assert lacks(config) == 'aoe_generate --data cifar10 --seed 9'
    assert lacks(config | dict(outliers='procedural')) == ''


def test_what_makes_no_sense_is_refused():
    tune = protocol['tune']
    fails(lambda: check_tune(tune | dict(outliers='procedurl')), contains='choose from tinyimagenet_aux, procedural')
    fails(lambda: check_tune(tune | dict(method='oe', quantile=0.5)), contains='a setting of aoe_least, oe has none')
    fails(lambda: check_tune(tune | dict(method='aoe_least', quantile=1.5)), contains='[0, 1]')
    fails(lambda: check_tune(tune | dict(method='aoe_hold', hold=-1)), contains='weight must be a number from 0')
    fails(lambda: check_tune(tune | dict(method='aoe_lest')), contains='unknown method')


def test_settings_reach_the_exposure():
    config = protocol['tune'] | dict(method='aoe_least', eps_255=32, quantile=0.95)
    assert train._exposure(config)['attack'].quantile == 0.95
    assert train._exposure(config | dict(quantile=0.5))['attack'] == methods['aoe_least'](32 / 255)['attack']
    hold = protocol['tune'] | dict(method='aoe_hold')
    assert train._exposure(hold)['hold'] == 1 and train._exposure(hold | dict(hold=3))['hold'] == 3


@pytest.mark.parametrize('method', ['aoe_least', 'aoe_hold'])
def test_methods_train(method):
    from test_study import small_parts
    from aoe_nb.study.measure import tune_and_measure

    parts = small_parts(method, n=24, bs=8)
    result = tune_and_measure(parts)
    assert 'failed' not in result and len(result['energies']) == 3
    assert all(abs(o) < 1e3 for row in result['energies'] for o in row)
    assert len(result['energy_percentiles']['moved']) == 21


# Cells


def test_cells_of_the_selection():
    for id in IDS:
        some = cells_of('populations_select', id, LOCK[id])
        assert len(some) == 5 * (1 + 5)
        assert {c['view'] for c in some} == {'kinds'} and {c['n_outliers'] for c in some} == {3210}
        assert {c['outliers'] for c in some} >= {f'gan-tiny-{id}-s0', f'cutmix-{id}'}
        assert {c['eps_255'] for c in some if c['method'] == 'aoe'} == {1, 2, 4, 8, 16}
        made = {c['outliers_sha'] for c in some if 'gan' in c['outliers']}
        assert made == {weights_sha(f'gan-tiny-{id}-s0.pt')}
        some = cells_of('past_select', id, LOCK[id])
        assert {c['view'] for c in some} == {'kinds'} and len(some) == 6 + 4 + 3
        assert {c['start'] for c in some} == {'published' if id == 'cifar10' else 's0'}
        for name in SELECT.values():  # nothing is filled in later: results are found under the same names
            assert [config_hash(c) for c in cells_of(name, id, LOCK[id])] == [config_hash(c) for c in cells(name, [id])]


def test_selection_looks_neither_at_the_table_nor_at_what_is_exposed():
    kinds, table = protocol['views']['kinds'], protocol['views']['table']
    assert kinds[1] <= table[0]
    assert not set(protocol['classes']['selection']) & set(protocol['classes']['exposed'])


def as_if(name, folder, auroc, acc=lambda c: 0.95):
    "Results of all cells of a selection, as two functions of the config say"
    for id in IDS:
        for c in cells_of(name, id, LOCK[id]):
            rows = [dict(score='energy', attack='none', AUROC=auroc(c) + d) for d in (-0.1, 0, 0.1)]
            rows.append(dict(score='msp', attack='none', AUROC=1.0))
            path = result_path(c, folder)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(dict(config=c, id_acc=acc(c), ood=rows, seconds=60)))


def test_the_best_that_keeps_its_accuracy_is_picked(tmp_path):
    def auroc(c):
        return 0.8 + c['eps_255'] / 200 + 0.02 * c['outliers'].startswith('cutmix')

    def acc(c):
        if c['outliers'] == 'noise':
            return 0.5 - c['eps_255'] / 100  # none keeps it: the most accurate
        return 0.95 if c['eps_255'] <= 4 else 0.6

    as_if('populations_select', tmp_path, auroc, acc)
    for id in IDS:
        picks = picked('populations_select', id, LOCK[id], tmp_path)
        assert picks['best'] == f'cutmix-{id}'
        found = {o: s['eps_255'] for (method, o), s in picks['settings'].items() if method == 'aoe'}
        want = {o: 4 for o in (f'gan-tiny-{id}-s0', 'tinyimagenet_aux', 'procedural', f'cutmix-{id}')} | dict(noise=1)
        assert found == want


def test_of_equals_the_first_is_picked_and_one_that_diverged_is_not(tmp_path):
    as_if('populations_select', tmp_path, lambda c: 0.8)
    lock = LOCK['cifar10']
    assert {
        s['eps_255']
        for (m, _), s in picked('populations_select', 'cifar10', lock, tmp_path)['settings'].items()
        if m == 'aoe'
    } == {1}
    c = next(c for c in cells_of('populations_select', 'cifar10', lock) if c['eps_255'] == 1 and c['method'] == 'aoe')
    worst = [dict(score='energy', attack='none', AUROC=0.0)]
    result_path(c, tmp_path).write_text(json.dumps(dict(config=c, failed='NaN', id_acc=0.0, ood=worst)))
    assert picked('populations_select', 'cifar10', lock, tmp_path)['settings']['aoe', c['outliers']]['eps_255'] == 2


def test_tables_wait_and_then_have_their_cells(tmp_path, capsys):
    shutil.copy(RESULTS / 'chosen.json', tmp_path)
    for name, first in SELECT.items():
        assert cells(name, IDS, tmp_path) == []
        line = next(o for o in listing(['cifar10'], tmp_path).splitlines() if o.split()[0] == name)
        assert line.split() == [name, 'cifar10', '0', 'done', 'waits', 'for', first]
        run_missing(name, ['cifar10'], out=tmp_path)
        assert f'{first} is not all measured for cifar10 (aoe_run {first})' in capsys.readouterr().out
        as_if(
            first, tmp_path, lambda c: 0.8 + 0.001 * c['eps_255'] + 0.01 * c.get('hold', 0) + 0.1 * c.get('quantile', 0)
        )
        result_path(cells_of(first, 'cifar10', LOCK['cifar10'])[-1], tmp_path).unlink()
        assert cells(name, ['cifar10'], tmp_path) == [] and len(cells(name, ['cifar100'], tmp_path))
        as_if(
            first, tmp_path, lambda c: 0.8 + 0.001 * c['eps_255'] + 0.01 * c.get('hold', 0) + 0.1 * c.get('quantile', 0)
        )
    table = cells('populations', IDS, tmp_path)
    assert len(table) == 60 and {c['view'] for c in table} == {'table'} and {c['attacks'] for c in table} == {'pgd'}
    assert {c['n_outliers'] for c in table} == {3210} and {c['eps_255'] for c in table if c['method'] == 'aoe'} == {16}
    assert len({config_hash(c) for c in table}) == 60
    past = cells('past', IDS, tmp_path)
    assert len(past) == 40 and len({(c['start'], c['method'], c['outliers'], c['id']) for c in past}) == 40
    assert {(c['eps_255'], c['quantile']) for c in past if c['method'] == 'aoe_least'} == {(32, 0.95)}
    assert {c['hold'] for c in past if c['method'] == 'aoe_hold'} == {3}
    assert all(c['outliers_sha'] for c in past)
    for c in past:
        check_tune(c)
