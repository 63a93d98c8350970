"The study: no result is lost, the search still finds what it found, and claims need nothing but the folder of results."

import importlib, json, os, shutil, subprocess, sys
from copy import deepcopy
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastcore.test import test_close as close
from aoe_nb.record import config_hash, result_path
from aoe_nb.study import claims as study_claims, grid
from aoe_nb.study.claims import claim_line, claims, complete, gains, holds, in_words, method_table, runs_of
from aoe_nb.study.claims import curve_gains, reached, rules_measured
from aoe_nb.study.grid import cells, listing, missing
from aoe_nb.study.protocol import attack_plans, chosen, claim_texts, curve_plans, diverged_means, experiments, exposures
from aoe_nb.study.protocol import protocol, rules, starts, wanted
from aoe_nb.study.search import done_in, search, settled, write_chosen

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'results'
BEFORE = json.loads((ROOT / 'tests/claims.json').read_text())
IDS = ['cifar10', 'cifar100']


# What was found


def settled_claims(table):
    "Without the claims that rules decide, whose runs are still to come"
    return {claim: row for claim, row in table.items() if claim not in diverged_means}


def test_claims_are_what_they_were():
    now = json.loads(claims(RESULTS).to_json(orient='index'))
    assert list(now) == list(BEFORE) and settled_claims(now) == settled_claims(BEFORE)
    assert set(BEFORE) - set(settled_claims(BEFORE)) == {'P5', 'P6', 'P8'}


ELSEWHERE = """
import sys, aoe_nb
assert aoe_nb.__file__.startswith(sys.argv[1]), aoe_nb.__file__
from aoe_nb.study.claims import claims, complete, gains, runs_of
assert 'fastai' not in sys.modules, 'reading results needs no fastai'
runs = complete(runs_of('cifar100', 'results'))
assert len(gains(runs).loc['oe']) and len(runs) == 50
assert [len(runs_of('cifar10', 'results', o)) for o in ('hard','second','recipes','best')] == [5,4,14,6]
print(claims('results').to_json(orient='index'))
"""


def test_claims_need_only_the_folder_of_results(tmp_path):
    "The package somewhere else, no weights, no checkout: the same table"
    skip = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / 'aoe_nb', tmp_path / 'site/aoe_nb', ignore=skip)
    shutil.copytree(RESULTS, tmp_path / 'there/results')
    env = os.environ | dict(PYTHONPATH=str(tmp_path / 'site'), OMP_NUM_THREADS='1')
    command = [sys.executable, '-W', 'ignore', '-c', ELSEWHERE, str(tmp_path)]
    res = subprocess.run(command, cwd=tmp_path / 'there', env=env, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr[-2000:]
    assert settled_claims(json.loads(res.stdout)) == settled_claims(BEFORE)


def test_runs_beside_the_grid_do_not_count(tmp_path):
    shutil.copytree(RESULTS / 'grid', tmp_path / 'grid')
    shutil.copy(RESULTS / 'chosen.json', tmp_path)
    before = runs_of('cifar10', tmp_path)
    for i, change in enumerate((dict(lr=0.1), dict(start_sha='00000000'), dict(model='wrn40_2'))):
        other = before[0] | dict(config=before[0]['config'] | change)
        (tmp_path / 'grid' / f'plain-cifar10-s0-other{i}.json').write_text(json.dumps(other))
    assert runs_of('cifar10', tmp_path) == before
    assert runs_of('cifar10', tmp_path / 'grid') == []  # nothing is chosen there


# What was chosen


def test_lock_file_holds_what_the_search_found():
    lock = chosen(RESULTS)
    settings = {id: tuple(o['settings'].values()) for id, o in lock.items()}
    assert settings == dict(
        cifar10=('frozen', 7, 16, 1e-3, 0.125, 'uniform'), cifar100=('frozen', 7, 8, 3e-3, 0.5, 'uniform')
    )
    assert {id: list(o['settings']) for id, o in lock.items()} == {id: list(protocol['search']['space']) for id in IDS}
    assert [lock[id]['floor'] for id in IDS] == [0.9025000238418579, 0.6410000228881836]
    assert [lock[id]['best'] for id in IDS] == [('aoe_pgd_half', 8), ()]
    assert [lock[id]['taken'] for id in IDS] == [('aoe_pgd_half', 8)] * 2


@pytest.mark.parametrize('id', IDS)
def test_search_finds_it_again(id):
    assert settled(id, RESULTS) == chosen(RESULTS)[id]


def test_search_writes_once(tmp_path):
    for name in 'select', 'recipes':
        shutil.copytree(RESULTS / name, tmp_path / name)
    write_chosen(tmp_path)
    assert (tmp_path / 'chosen.json').read_bytes() == (RESULTS / 'chosen.json').read_bytes()
    shutil.rmtree(tmp_path / 'select')
    write_chosen(tmp_path)
    assert (tmp_path / 'chosen.json').read_bytes() == (RESULTS / 'chosen.json').read_bytes()


def test_recipe_is_added_when_it_is_known(tmp_path):
    shutil.copytree(RESULTS / 'select', tmp_path / 'select')
    first = write_chosen(tmp_path)
    assert first['cifar10']['best'] is None and first['cifar10']['taken'] is None
    assert cells('best', IDS, tmp_path) == [] and len(cells('recipes', IDS, tmp_path)) == 28
    shutil.copytree(RESULTS / 'recipes', tmp_path / 'recipes')
    assert write_chosen(tmp_path) == chosen(RESULTS)


# What was run


@pytest.mark.parametrize('name', [o for o in experiments if o != 'select'])
def test_every_file_is_a_cell_and_every_cell_a_file(name):
    paths = {result_path(c, RESULTS) for c in cells(name, IDS, RESULTS)}
    there = set((RESULTS / name).glob('*.json'))
    assert there == paths if name not in {o[0] for o in TO_COME} else there <= paths
    for path in there:
        config = json.loads(path.read_text())['config']
        assert result_path(config, RESULTS) == path
    assert len(missing(name, IDS, RESULTS)) == len(paths - there)


def test_trials_beside_the_search_are_those_of_the_first_rule():
    used = {name for o in chosen(RESULTS).values() for name in o['trials']}
    there = {f.name for f in (RESULTS / 'select').glob('*.json')}
    assert used <= there and len(there - used) == 48
    first_rule = set()

    def done(config):
        path = result_path(config, RESULTS)
        first_rule.add(path.name)
        return done_in(RESULTS)(config)

    for id in IDS:
        search(id, done, floored=protocol['search']['space'])
    assert first_rule <= there and first_rule - used <= there - used


COUNTS = [
    ('starts', 4, 5),
    ('select', 60, 59),
    ('grid', 50, 50),
    ('hard', 5, 5),
    ('second', 4, 4),
    ('recipes', 14, 14),
    ('best', 6, 6),
]
TO_COME = [  # how many cells on each set of inliers
    ('curve', 10, 10),
    ('samples', 40, 40),
    ('adv', 1, 1),
    ('adv_mild', 5, 5),
    ('kinds', 18, 18),
    ('sensitive', 0, 110),
    ('defects', 0, 60),
    ('free', 10, 10),
    ('sizes', 12, 0),
    ('longer', 6, 6),
    ('relatives', 45, 45),
    ('populations_select', 30, 30),
    ('populations', 30, 30),
    ('past_select', 13, 13),
    ('past', 20, 20),
    ('adversaries', 21, 21),
]
WAITS = dict(populations='populations_select', past='past_select')  # has no cells before that is measured


def test_listing_counts():
    lines = [line.split() for line in listing(IDS, RESULTS).splitlines()]
    want = [(name, id, str(n)) for name, *both in COUNTS for id, n in zip(IDS, both)]
    older = lines[: len(want)]
    assert [tuple(line[:3]) for line in older] == want
    assert all(line[4:] == (['over'] if line[0] == 'select' else ['0', 'missing']) for line in older)
    newer = lines[len(want) :]
    waiting = {tuple(line[:2]) for line in newer if line[4:] == ['waits', 'for', WAITS.get(line[0])]}
    assert waiting <= {(name, id) for name in WAITS for id in IDS}
    counted = [(line[0], line[1], int(line[2]) + int(line[4])) for line in newer if tuple(line[:2]) not in waiting]
    asked = [(name, id, n) for name, *both in TO_COME for id, n in zip(IDS, both) if n]
    assert counted == [o for o in asked if o[:2] not in waiting]


def test_command_lists(tmp_path):
    command = [sys.executable, '-W', 'ignore', '-c', 'from aoe_nb.study.grid import aoe_run; aoe_run(list=True)']
    res = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert res.stdout.strip() == listing(IDS, RESULTS)


def pretend_cell(config, out, redo, wait):
    "A result as if `aux` were a little better and five steps on all outliers cost accuracy"
    acc = 0.9 - 0.1 * (config['method'] == 'aoe_pgd')
    auroc = 0.8 + 0.01 * (config['bn'] == 'aux')
    rows = [
        dict(score='energy', attack=a, eps_255=e, AUROC=auroc + (e > 0) * ('pgd' in config['method']) * 0.1)
        for a, e in (('none', 0), ('pgd20', 1))
    ]
    path = result_path(config, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(config=config, id_acc=acc, ood=rows, seconds=60)))


def test_command_goes_from_search_to_grid(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grid, 'run_cell', pretend_cell)
    grid.run_missing('grid', ['cifar10'], out=tmp_path)
    said = capsys.readouterr().out
    assert 'the search for cifar10 is not over (aoe_run select), so its grid has no cells yet' in said
    grid.run_missing('select', ['cifar10'], out=tmp_path)
    assert 'nothing is missing in select' in capsys.readouterr().out
    lock = chosen(tmp_path)
    assert list(lock) == ['cifar10'] and lock['cifar10']['settings']['bn'] == 'aux' and lock['cifar10']['best'] is None
    grid.run_missing('best', ['cifar10'], out=tmp_path)
    assert 'the recipes for cifar10 are not all measured' in capsys.readouterr().out
    grid.run_missing('recipes', ['cifar10'], out=tmp_path)
    assert chosen(tmp_path)['cifar10']['taken'] == ('aoe_pgd_half', 8)
    grid.run_missing('second', ['cifar10'], out=tmp_path)
    assert len(list((tmp_path / 'second').glob('*.json'))) == 4 and len(cells('best', ['cifar10'], tmp_path)) == 6
    line = next(o for o in listing(['cifar10'], tmp_path).splitlines() if o.startswith('grid'))
    assert line.split() == ['grid', 'cifar10', '0', 'done', '50', 'missing']


def test_grid_of_another_network_needs_its_starts():
    some = cells('grid', ['cifar10'], RESULTS, 'wrn40_2')
    assert len(some) == 50 and {c['start_sha'] for c in some} == {''}
    assert {c['start'] for c in some} == {'s0', 's1', 's2', 's3', 's4'} and {c['lr'] for c in some} == {1e-3}


def test_deeper_networks_have_one_start_that_others_published():
    from aoe_nb.models import published
    from aoe_nb.study.protocol import start_name, starts_of

    some = cells('sizes', ['cifar10'], RESULTS)
    assert {c['start'] for c in some} == {'published'} and len(some) == 4 * 3
    sums = {c['model']: c['start_sha'] for c in some}
    assert sums == protocol['published']
    for model, checksum in sums.items():  # the file is called by its checksum
        assert checksum in published[model] and start_name('cifar10', 'published', model) != start_name('cifar10', 's1')
    assert len({start_name('cifar10', 'published', model) for model in sums}) == 4
    assert starts_of('cifar10', 'resnet56') == ['published'] and starts_of('cifar10') == starts['cifar10']
    assert len(starts_of('cifar100', 'resnet56')) == len(starts_of('cifar10', 'wrn40_2')) == 5


@pytest.fixture
def tf32():
    "Switched on for a test, as cuDNN has it"
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    yield lambda: torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_a_cell_is_measured_in_whole_float32(tf32):
    assert tf32()
    grid.run_missing_cell(cells('grid', ['cifar10'], RESULTS)[0], RESULTS)  # it is there, so nothing is trained
    assert not tf32()


# What is measured: the fields of a row, in their order


def test_rows_have_the_fields_they_had():
    from fastai.learner import Learner
    from aoe_nb.data import inliers, unseen
    from aoe_nb.models import small_cnn
    from aoe_nb.study.measure import attacked_rows, clean_rows
    from aoe_nb.study.train import logits_of

    old = json.loads(next((RESULTS / 'grid').glob('aoe-cifar10-s0-*.json')).read_text())['ood']
    torch.manual_seed(0)
    test = inliers('digits7', 'test')
    sets = unseen(['digits389', 'flower'], id='digits7')
    learn = Learner(inliers('digits7').dls(64, valid=test), small_cnn(1, 7))
    rows = clean_rows(logits_of(learn.model, test), {k: (o.group, logits_of(learn.model, o)) for k, o in sets.items()})
    assert [(o['set'], o['score']) for o in rows] == [(k, s) for s in ('energy', 'msp') for k in sets]
    plan = next(o for o in attack_plans.itertuples() if (o.attack, o.eps_255) == ('fgsm', 0.5))
    more = attacked_rows(learn, test, sets, plan._replace(n_in=50, n_out=40))
    assert [o['attacked'] for o in more] == ['ood', 'ood', 'id', 'id', 'both', 'both']
    assert {(o['attack'], o['eps_255'], o['n_in'], o['n_out']) for o in more} == {('fgsm', 0.5, 50, 40)}
    for o in rows + more:
        assert list(o) == list(old[0])
    json.dumps(rows + more)
    one = attacked_rows(learn, test, sets, plan._replace(eps_255=1.0, sides='ood', n_in=50, n_out=40))
    assert repr(one[0]['eps_255']) == '1'


def test_attack_plans_are_those_of_the_files():
    for plan, name in (('all', 'grid'), ('hard', 'hard')):
        file = next((RESULTS / name).glob('aoe-cifar10-s0-*.json'))
        rows = [o for o in json.loads(file.read_text())['ood'] if o['attack'] != 'none']
        said = [(o['attack'], o['eps_255'], o['attacked'], o['n_in'], o['n_out']) for o in rows[::4]]
        asked = attack_plans[attack_plans.plan == plan].itertuples()
        assert said == [(o.attack, o.eps_255, s, o.n_in, o.n_out) for o in asked for s in o.sides.split()]


# Verdicts, on grids as they would be


def row(attack, attacked, eps, auroc):
    numbers = dict(AUROC=auroc, AUPR_OUT=auroc, AUPR_IN=auroc, FPR95=1 - auroc, FPR95_ID=1 - auroc)
    about = dict(score='energy', attack=attack, attacked=attacked, eps_255=eps, n_in=10, n_out=10)
    return [dict(set=name, group=group, **about, **numbers) for name, group in (('x', 'near'), ('y', 'far'))]


def a_run(method, start, ood, seed=0):
    return dict(method=method, start=start, seed=seed, id_acc=0.9, calibration=dict(ECE=0.01, NLL=0.3), ood=ood)


def as_if(shift, hard=0.1, id='cifar10', n=5, seeds=2):
    "AOE `shift` better than OE and noise everywhere, and PGD-50 as much below Square as `hard` says"
    where = [
        ('none', 'none', 0),
        *[('fgsm', 'ood', e) for e in (0.5, 1, 2, 4, 8, 16)],
        ('pgd20', 'ood', 1),
        ('pgd20', 'ood', 2),
    ]
    grid = []
    for k, start in enumerate(starts[id][:n]):
        level = {m: 0.8 + 0.01 * k + (m == 'aoe') * (shift + 0.0005 * (k * 7 % 3)) for m in ('plain', *exposures)}
        for seed in range(seeds):
            grid += [a_run(m, start, sum([row(*o, level[m]) for o in where], []), seed) for m in level]
    attacked = [
        row(a, 'ood', e, 0.5 - (a == 'pgd50x5') * hard) for a in ('fgsm', 'square1000', 'pgd50x5') for e in (1, 2)
    ]
    return {(id, 'grid'): grid, (id, 'hard'): [a_run(m, 's', sum(attacked, [])) for m in ('oe', 'aoe')]}


def both(shift, **kw):
    return claims(runs=as_if(shift, **kw) | as_if(shift, id='cifar100', **kw))


@pytest.mark.parametrize('shift,want', [(0.02, 'holds'), (-0.02, 'fails')])
def test_verdicts_follow_the_difference(shift, want):
    assert both(shift).verdict[['P1', 'P2', 'P3', 'P4']].tolist() == [want, want, want, 'holds']


@pytest.mark.parametrize('a,b,want', [(0.02, 0.0, 'undecided'), (0.02, -0.02, 'fails'), (0.0, 0.0, 'undecided')])
def test_verdict_over_both_sets_of_inliers(a, b, want):
    assert claims(runs=as_if(a) | as_if(b, id='cifar100')).loc['P1', 'verdict'] == want


def test_numbers_in_words():
    some = as_if(0.02)['cifar10', 'grid']
    sign = gains(some, ['oe_sign']).loc[('oe_sign', 'mean natural', 'AUROC')]
    close(sign[['diff', 'lo']].astype(float), [0.0204, 0.01988], 1e-5)
    gain = gains(some, ['oe']).loc[('oe', 'mean natural', 'AUROC')]
    assert in_words(gain) == '+2.04 [+1.99, +2.09], n = 5, detectable 0.07'
    alone = gains(as_if(0.02, n=1)['cifar10', 'grid'], ['oe']).loc[('oe', 'mean natural', 'AUROC')]
    assert 'no interval' in in_words(alone)
    close(method_table(some).loc[['oe', 'aoe'], 'mean near'], [82.0, 84.04], 1e-6)
    assert not len(gains([]))


def test_before_all_is_measured():
    found = claims(runs=as_if(0.02) | as_if(0.02, id='cifar100', n=4))
    on_each = ['holds: AUROC +2.04 [+1.99, +2.09], FPR95_ID -2.04 [-2.09, -1.99]', '4 of 5 starts so far']
    assert found.loc['P1', ['CIFAR-10', 'CIFAR-100']].tolist() == on_each
    p4 = 'holds: accuracy +0.00 [+0.00, +0.00], minus plain +0.00 [+0.00, +0.00]'
    assert found.loc['P4', 'CIFAR-10'] == p4
    assert claim_line('P4', found) == f'**none yet**. CIFAR-10 {p4}. CIFAR-100 4 of 5 starts so far'
    assert both(0.02, n=4).verdict.P1 == 'none yet'
    assert '4 of 5 starts' in both(0.02, n=4)['CIFAR-10'].P1
    one_seed = both(0.02, seeds=1)
    assert 'some runs are missing' in one_seed['CIFAR-10'].P1 and one_seed.verdict.P3 == 'holds'


def test_nothing_measured(tmp_path):
    found = claims(tmp_path)
    assert set(found['CIFAR-10'][['P1', 'P2', 'P3', 'P4']]) == {'not measured yet'}
    assert set(found.verdict[['P1', 'P2', 'P3', 'P4']]) == {'none yet'}


def test_masked_gradients_leave_a_claim_undecided():
    found = both(0.02, hard=-0.1)
    assert 'masked' in found['CIFAR-10'].P3 and found.verdict.P3 == 'undecided'
    no_hard = {k: [] if k[1] == 'hard' else o for k, o in (as_if(0.02) | as_if(0.02, id='cifar100')).items()}
    assert claims(runs=no_hard).verdict.P3 == 'none yet'


def test_starts_are_the_same_for_all():
    some = as_if(0.02)['cifar10', 'grid']
    lopsided = [r for r in some if r['start'] != 'published' or r['method'] != 'oe' or not r['seed']]
    assert (len(lopsided), len(complete(lopsided)), len(complete(some))) == (len(some) - 1, len(some) - 5, len(some))
    a, b = (gains(o, ['oe'])['diff'].astype(float).values for o in (complete(lopsided), some))
    close(a, b, 1e-9)


def test_margin_and_side_are_data(monkeypatch):
    "What a claim wants is read from the table: turn a side round, and the verdict turns"
    turned = wanted.assign(side=wanted.side.map(dict(above='below', below='above')).fillna(''))
    monkeypatch.setattr(study_claims, 'wanted', turned)
    assert both(0.02).verdict[['P1', 'P2', 'P3']].tolist() == ['fails'] * 3
    strict = wanted.assign(margin=np.where(wanted.claim == 'P1', -0.1, wanted.margin))
    monkeypatch.setattr(study_claims, 'wanted', strict)
    assert both(0.02).verdict[['P1', 'P2']].tolist() == ['fails', 'holds']


def test_holds_names_the_sentence(capsys):
    holds('AOE above OE', np.bool_(True))
    assert capsys.readouterr().out == 'holds: AOE above OE\n'
    with pytest.raises(AssertionError, match='AOE above noise'):
        holds('AOE above noise', False)


def test_pages_of_claims_exist():
    pages = [o for o in claim_texts.page if o]
    assert len(pages) == 10 and all((ROOT / 'nbs' / o).exists() for o in pages)


def test_defaults_and_recipe_follow_what_was_found():
    from inspect import signature
    from aoe_nb.exposure import OutlierExposure

    default = {name: o.default for name, o in signature(OutlierExposure).parameters.items()}
    found = [o['settings'] for o in chosen(RESULTS).values()]
    assert {o['loss'] for o in found} == {default['loss']}
    assert default['lam'] in [o['lam'] for o in found]
    assert default['attack_in'] is None and default['score'].__name__ == 'energy'
    verdicts = claims(RESULTS).verdict
    recipe = (ROOT / 'README.md').read_text().split('```python')[1]
    assert verdicts.P8 == 'holds' and 'attack_in' not in recipe  # attacked inliers cost too much
    assert 'attack=FGSM(' in recipe and 'fails' not in verdicts[['P1', 'P2', 'P3', 'P4']].tolist()
    advice = (ROOT / 'nbs/experiments/what_to_use.ipynb').read_text()
    assert "attack=FGSM(8/255), bn='frozen'" in advice and {o['bn'] for o in found} == {'frozen'}


# Convergence, sample efficiency, inlier adversaries


def test_new_settings_are_in_new_configs_only():
    new = {'epochs', 'curve', 'n_outliers', 'defect', 'precision', 'surface'}
    bf16 = dict.fromkeys(('kinds', 'sensitive', 'sizes', 'relatives'), {'precision'})
    bf16 |= dict(defects={'defect', 'precision'}, longer={'epochs', 'precision'}, adversaries={'precision', 'surface'})
    bf16 |= dict.fromkeys(('populations_select', 'populations'), {'n_outliers', 'precision'})
    old = set(protocol['tune'])
    leads = {frozenset({'precision', *o}) for o in ([], ['hold'], ['quantile'])}
    assert {frozenset(set(c) - old) for c in cells('past_select', IDS, RESULTS)} == leads
    for name in experiments[2:]:
        if name in ('past_select', 'past') or name in WAITS and not cells(name, IDS, RESULTS):
            continue
        extra = {frozenset(set(c) - old) for c in cells(name, IDS, RESULTS)}
        want = (bf16 | dict(curve={'epochs', 'curve'}, samples={'n_outliers'})).get(name, set())
        assert extra == {frozenset(want)} and want <= new


def first_cell(name, **about):
    found = [c for c in cells(name, ['cifar10'], RESULTS) if all(c[k] == v for k, v in about.items())]
    return found[0]


HASHES = ['9fad8976', '3bc9f605', 'bbee281d']


def test_hashes_of_new_configs():
    "Where a result lies; a change here would leave finished runs behind"
    one = [
        first_cell('curve', method='aoe'),
        first_cell('samples', method='aoe', n_outliers=100),
        first_cell('adv'),
    ]
    assert [config_hash(c) for c in one] == HASHES
    assert {c['eps_255'] for c in one} == {16} and {c['start'] for c in one} == {'published'}
    assert {c['eps_255'] for c in cells('adv', ['cifar100'], RESULTS)} == {8}  # that of AOE, on both sets


def test_runs_are_resumed(tmp_path, monkeypatch):
    ran = []

    def noted(config, out, redo, wait):
        if len(ran) == 15 and not stopped:
            stopped.append(config)
            raise KeyboardInterrupt
        ran.append(config_hash(config))
        pretend_cell(config, out, redo, wait)

    stopped = []
    monkeypatch.setattr(grid, 'run_cell', noted)
    shutil.copy(RESULTS / 'chosen.json', tmp_path)
    with pytest.raises(KeyboardInterrupt):
        grid.run_missing('samples', ['cifar10'], out=tmp_path)
    assert len(ran) == 15 and len(missing('samples', ['cifar10'], tmp_path)) == 25
    grid.run_missing('samples', ['cifar10'], out=tmp_path)
    assert len(ran) == len(set(ran)) == 40 and missing('samples', ['cifar10'], tmp_path) == []


def small_parts(method='aoe', n=1560, bs=4, **settings):
    "Parts as `resolve` would give them, of digits and a small network that knows them a little"
    from aoe_nb.data import Images, inliers, outliers, unseen
    from aoe_nb.methods import exposure_of
    from aoe_nb.models import small_cnn
    from aoe_nb.study.train import Parts

    config = protocol['tune'] | dict(method=method, bs=bs, lr=1e-3, eps_255=16, bn='frozen', attacks='none') | settings
    digits = inliers('digits7')
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)) % len(digits)
    torch.manual_seed(0)
    exposure = dict(lam=0.5, bn='frozen', loss='uniform', seed=0) | exposure_of(method, 16 / 255)
    sets = unseen(['digits389', 'flower'], id='digits7')
    pool = Images(outliers('china').x[:500])
    return Parts(config, digits.take(order), inliers('digits7', 'test'), sets, small_cnn(1, 7), pool, exposure)


def test_curve_has_fourteen_points():
    from aoe_nb.energy import energy
    from aoe_nb.study.measure import clean_rows, tune_and_measure
    from aoe_nb.study.train import fixed_subset, logits_of

    steps = curve_plans['two_epochs']['steps']
    assert len(steps) == 14 and steps[0] == 0 and 195 in steps and steps[-1] == 2 * 195
    parts = small_parts(n=195 * 4, epochs=2, curve='two_epochs')
    start = deepcopy(parts.net)
    result = tune_and_measure(parts)
    assert [o['step'] for o in result['curve']] == steps and len(result['energies']) == 390
    some = fixed_subset(parts.test, 1000)
    logits = logits_of(start, some)
    outs = {k: (o.group, logits_of(start, fixed_subset(o, 250))) for k, o in parts.unseen.items()}
    first, last = result['curve'][0], result['curve'][-1]
    assert first['ood'] == clean_rows(logits, outs)[: len(outs)]
    assert first['id_acc'] == float((logits.argmax(1) == some.y).float().mean())
    close(first['energies']['inliers'], float(energy(logits).mean()), 1e-3)
    assert all(o['energies']['change'] < 0 for o in result['curve'])
    assert last['ood'] != first['ood'] and last['ood'][0]['n_out'] <= 250
    assert [o['score'] for o in result['ood']] == ['energy'] * 2 + ['msp'] * 2
    json.dumps(result)


def test_curve_only_looks():
    from aoe_nb.study.measure import Curve
    from aoe_nb.study.train import tune

    def trained(look):
        parts = small_parts(n=40, epochs=2, curve='two_epochs')
        return tune(parts, Curve(parts) if look else None).model.state_dict()

    seen, alone = trained(True), trained(False)
    assert all(torch.equal(seen[k], alone[k]) for k in alone)


def test_divergence_is_recorded():
    from aoe_nb.study.measure import tune_and_measure

    result = tune_and_measure(small_parts(n=40, lr=1e30, curve='two_epochs'))
    assert 'NaN' in result['failed'] and result['id_acc'] == 0
    assert result['curve'][0]['step'] == 0 and len(result['curve']) < 14


def test_fewer_outliers_are_part_of_more():
    from aoe_nb.data import Images
    from aoe_nb.stream import OutlierStream
    from aoe_nb.study.train import first_outliers

    i = torch.arange(25_088)
    pool = Images(torch.stack([i // 256, i % 256], 1).to(torch.uint8).view(-1, 1, 1, 2))

    def numbers(images):
        return (images.x[:, 0, 0].long() @ torch.tensor([256, 1])).tolist()

    sizes = next(o for o in protocol['cells'] if o['experiment'] == 'samples')['vary']['n_outliers']
    chosen_ones = [numbers(first_outliers(pool, n, seed=0)) for n in sizes]
    assert [len(set(o)) for o in chosen_ones] == sizes == [100, 1000, 10_000, 25_000]
    assert all(more[: len(few)] == few for few, more in zip(chosen_ones, chosen_ones[1:]))
    assert numbers(first_outliers(pool, 100, seed=1)) != chosen_ones[0]
    images = pool.take(slice(0, 300))
    drawn = OutlierStream(first_outliers(images, 100)).draw(256)
    assert len(drawn) == 256 and len(drawn.unique(dim=0)) == 100
    with pytest.raises(ValueError, match='more than the 300 of the pool'):
        first_outliers(images, 301)


def test_config_cuts_the_pool(monkeypatch):
    from aoe_nb.study import train

    parts = small_parts()
    monkeypatch.setattr(train, '_pass_of', lambda config: parts.train)
    monkeypatch.setattr(train, 'view_of', lambda view, id: (parts.test, parts.unseen))
    monkeypatch.setattr(train, 'load_start', lambda id, start, model: parts.net)
    monkeypatch.setattr(train, 'exposed_pool', lambda name, sigma, n: parts.pool)
    config = parts.config | dict(n_outliers=100)
    assert len(train.resolve(config).pool) == 100 and len(train.resolve(parts.config).pool) == len(parts.pool)
    want = train.first_outliers(parts.pool, 100, config['seed']).x
    assert torch.equal(train.resolve(config).pool.x, want)


def test_inlier_adversaries():
    "Inliers move within eps and [0,1], up their loss, and BatchNorm keeps the statistics of the start"
    from fastai.callback.core import Callback
    from torch.nn.functional import cross_entropy
    from aoe_nb.attack import eval_mode
    from aoe_nb.study.train import tune

    class Before(Callback):
        order = 4

        def before_batch(self):
            self.x = self.xb[0].clone()

    class After(Callback):
        order = 6
        run_valid = False

        def before_fit(self):
            self.seen = []

        def before_batch(self):
            self.moved = self.xb[0].as_subclass(torch.Tensor).clone()

        def after_batch(self):
            x, y = (o.as_subclass(torch.Tensor) for o in (self.learn.before.x, self.yb[0]))
            assert len(self.moved) == len(x) and self.moved.min() >= 0 and self.moved.max() <= 1
            loss = [cross_entropy(logits(self.model, o), y).item() for o in (x, self.moved)]
            self.seen.append((float((self.moved - x).abs().max()), *loss))

    def logits(model, x):
        with eval_mode(model), torch.no_grad():
            return model(x)

    parts = small_parts('adv', n=120, bs=24)
    start = deepcopy(parts.net.state_dict())
    learn = tune(parts, [Before(), After()])
    sizes, clean, attacked = zip(*learn.after.seen)
    assert len(sizes) == 5 and 0 < min(sizes) and max(sizes) <= 16 / 255 + 1e-6
    assert all(a > c for c, a in zip(clean, attacked))
    end = learn.model.state_dict()
    statistics = [k for k in start if 'running' in k]
    assert statistics and all(torch.equal(start[k], end[k]) for k in statistics)
    assert any(not torch.equal(start[k], end[k]) for k in start)
    assert all(out is None for _, out in learn.energy_log.rows)


def colour_parts(defect, method='aoe', n=64):
    "Parts of coloured images and a ResNet-20 for CIFAR-100, with a defect"
    from aoe_nb.drawn import drawn
    from aoe_nb.methods import exposure_of
    from aoe_nb.models import cifar100_stats, resnet20
    from aoe_nb.study.defects import made_wrong
    from aoe_nb.study.train import Images, Parts

    about = dict(method=method, bs=32, lr=1e-3, eps_255=8, bn='frozen', attacks='none', id='cifar100', start='s0')
    config = protocol['tune'] | about | dict(defect=defect)
    gen = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 100
    names = [str(k) for k in range(100)]
    noise = Images(torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=gen), y, names)
    exposure = dict(lam=0.5, bn='frozen', loss='uniform', seed=0) | exposure_of(method, 8 / 255)
    exposure, pool = made_wrong(defect, method, exposure, drawn('signs', n), cifar100_stats)
    torch.manual_seed(0)
    return Parts(
        config, noise, noise, dict(signs=drawn('signs', 20, seed=1)), resnet20(100, cifar100_stats), pool, exposure
    )


def test_a_step_in_train_mode_moves_the_averages_and_nothing_else_does():
    from aoe_nb.study.train import tune

    for defect, moves in dict(none=False, raw_outliers=False, inlier_step=False, train_mode=True).items():
        parts = colour_parts(defect)
        before = {k: v.clone() for k, v in parts.net.state_dict().items() if 'running' in k}
        after = tune(parts).model.state_dict()
        assert any(not torch.equal(v, after[k]) for k, v in before.items()) == moves, defect


def test_a_step_at_the_inliers_is_that_of_the_inliers():
    from fastai.callback.core import Callback
    from aoe_nb.attack import eval_mode, fgsm
    from aoe_nb.energy import energy
    from aoe_nb.study.train import tune

    class Look(Callback):
        order = 4
        run_valid = False
        seen = []

        def before_batch(self):
            x = torch.as_tensor(self.xb[0]).as_subclass(torch.Tensor)
            with eval_mode(self.model):
                step = fgsm(x, lambda x: energy(self.model(x)), 8 / 255, lo=-1, hi=2) - x
            self.learn.want = step

        def after_pred(self):
            self.seen.append(self.learn.want)

    parts = colour_parts('inlier_step')
    moved = []
    attack = parts.exposure['attack']

    class Spy(type(attack)):
        def __call__(self, x, loss, generator=None):
            out = super().__call__(x, loss, generator)
            moved.append((x, out))
            return out

    parts.exposure['attack'] = Spy(attack.eps)
    look = Look()
    tune(parts, [look])
    assert len(moved) == len(look.seen) == 2
    for (x, out), step in zip(moved, look.seen):
        close((x + step).clamp(0, 1), out, 1e-5)


def test_a_defective_run_holds_both_tests():
    from aoe_nb.study.measure import tune_and_measure

    res = tune_and_measure(colour_parts('none'))
    public = [o for o in res['ood'] if o['attack'] == 'public']
    assert [o['n_out'] for o in public] == [20 * k for k in range(1, 8)]
    assert {o['set'] for o in res['other_stats']['ood']} == {'signs'}
    everything = tune_and_measure(colour_parts('all'))
    assert 'other_stats' not in everything and 'moved' not in everything['energy_percentiles']


def test_robust_accuracy_is_recorded_of_adversaries_only():
    from aoe_nb.study.measure import tune_and_measure

    adv = tune_and_measure(small_parts('adv', n=120, bs=24))['robust_acc']
    assert {k: adv[k] for k in protocol['robust']} == protocol['robust']
    assert 0 <= adv['start'] <= 1 and 0 <= adv['tuned'] <= 1
    assert 'robust_acc' not in tune_and_measure(small_parts('plain', n=24, bs=24))


def as_if_ruled(id, gain=0.05, half=0.95, more=0.02, last=0.001, hurt=0.03, n=5):
    "Runs in which AOE gains so much, half of the steps bring that share, and adversaries cost so much"
    runs = {(id, name): [] for name in ('curve', 'samples', 'adv_mild', 'hard')}
    wobble = [0, 0.0004, -0.0003, 0.0002, -0.0001]
    for start, w in zip(starts[id][:n], wobble):

        def run(method, auroc, acc=0.9, **config):
            ood = row('none', 'none', 0, auroc) + row('pgd20', 'ood', 1, auroc - 0.3)
            return a_run(method, start, ood) | dict(id_acc=acc, config=config)

        for m in 'oe', 'aoe':
            share = {0: 0, 195: half, 390: 1}
            look = [
                dict(step=s, id_acc=0.9, ood=row('none', 'none', 0, 0.8 + (gain + w) * share.get(s, half)))
                for s in curve_plans['two_epochs']['steps']
            ]
            runs[id, 'curve'].append(run(m, 0.8 + gain) | dict(curve=look))
            level = {100: 0.8, 1000: 0.81, 10_000: 0.8 + more - last, 25_000: 0.8 + more}
            runs[id, 'samples'] += [run(m, v + w * (k > 10_000), n_outliers=k) for k, v in level.items()]
        runs[id, 'adv_mild'].append(run('adv', 0.8 - hurt + w, 0.9 - hurt + w))
    runs[id, 'grid'] = [
        r | dict(id_acc=0.9 + 0.001 * (r['start'] == 's2'), ood=row('none', 'none', 0, 0.8))
        for r in as_if(0.02, id=id)[id, 'grid']
    ]
    return runs


RULED = ['P5', 'P6', 'P8']


def ruled(**kw):
    return claims(runs=as_if_ruled('cifar10', **kw) | as_if_ruled('cifar100', **kw)).loc[RULED]


@pytest.mark.parametrize(
    'settings,want',
    [
        (dict(), ['holds', 'holds', 'holds']),
        (dict(half=0.5), ['fails', 'holds', 'holds']),
        (dict(gain=-0.05), ['fails', 'holds', 'holds']),
        (dict(last=0.02), ['holds', 'fails', 'holds']),
        (dict(last=0.005), ['holds', 'undecided', 'holds']),
        (dict(more=-0.02), ['holds', 'fails', 'holds']),
        (dict(hurt=-0.03), ['holds', 'holds', 'fails']),
        (dict(hurt=0), ['holds', 'holds', 'undecided']),
    ],
)
def test_verdicts_of_rules(settings, want):
    assert ruled(**settings).verdict.tolist() == want


def test_rules_before_all_is_measured(tmp_path):
    shutil.copy(RESULTS / 'chosen.json', tmp_path)
    for found in claims(tmp_path), both(0.02):
        for claim, status in claim_texts.status[RULED].items():
            assert found.verdict[claim] == (status or 'none yet')
            assert found.loc[claim, 'CIFAR-10'] == ('' if status else 'not measured yet')
    some = claims(runs=as_if_ruled('cifar10') | as_if_ruled('cifar100', n=2)).loc[RULED]
    assert set(some.verdict) == {'none yet'} and set(some['CIFAR-100']) == {'2 of 5 starts so far'}
    assert all(o.startswith('holds: ') for o in some['CIFAR-10'])
    assert '25,000 minus 10,000 +0.10' in some.loc['P6', 'CIFAR-10']


def test_runs_that_diverged_count():
    runs = as_if_ruled('cifar10') | as_if_ruled('cifar100')
    for name in 'curve', 'samples':
        last = next(r for r in runs['cifar10', name][::-1] if r['method'] == 'aoe')
        last['failed'] = 'the loss is NaN'
    found = claims(runs=runs)
    assert found.loc['P5', ['verdict', 'CIFAR-10']].tolist() == ['fails', 'fails: 1 of 5 runs diverged']
    assert found.loc['P6', ['verdict', 'CIFAR-10']].tolist() == ['undecided', 'undecided: 1 of 20 runs diverged']
    assert found.verdict.P8 == 'holds'
    table = rules_measured({name: o for (id, name), o in runs.items() if id == 'cifar10'})
    assert table.n.min() < 5


def test_how_fast_it_was():
    runs = as_if_ruled('cifar10')['cifar10', 'curve']
    gain = curve_gains(runs, 'aoe')
    assert gain.loc[0, ['diff', 'lo', 'hi']].tolist() == [0, 0, 0] and set(gain.n) == {5}
    close(gain.loc[390, 'diff'], 0.05004, 1e-6)
    assert reached(curve_gains(runs, 'aoe', share=0.9)) == dict(mean=2, sure=2)
    assert reached(curve_gains(runs, 'aoe', share=0.97)) == dict(mean=390, sure=390)
    one = curve_gains(runs[:2], 'aoe', share=0.9)
    assert reached(one) == dict(mean=2, sure=None)
    assert reached(curve_gains([], 'aoe')) == dict(mean=None, sure=None)


def test_rules_name_what_is_run():
    "Every term is about cells that exist"
    for term in (t for o in rules for t in o['terms']):
        about = {k: term[k] for k in ('method', 'seed', 'n_outliers') if k in term}
        assert first_cell(term['experiment'], **about)
        assert term.get('step', 0) in curve_plans['two_epochs']['steps']
        plan = attack_plans[attack_plans.plan == first_cell(term['experiment'], **about)['attacks']]
        sides = plan[(plan.attack == term['attack']) & (plan.eps_255 == term['eps_255'])].sides
        assert term['attack'] == 'none' or term['attacked'] in ' '.join(sides).split()


# Old names


@pytest.mark.parametrize('name', ['poster', 'experiment'])
def test_old_modules_say_where_the_names_went(name):
    with pytest.warns(DeprecationWarning, match=f'aoe_nb.{name} will go'):
        module = importlib.reload(importlib.import_module(f'aoe_nb.{name}'))
    for o in module.__all__:
        assert hasattr(module, o)


def test_old_run_takes_any_config():
    with pytest.warns(DeprecationWarning):
        module = importlib.reload(importlib.import_module('aoe_nb.experiment'))
    for name in [o for o, *_ in COUNTS[2:]]:
        result = json.loads(next((RESULTS / name).glob('*.json')).read_text())
        assert module.run(result['config'], RESULTS) == result
    demo = json.loads(next((RESULTS / 'demo').glob('*.json')).read_text())
    assert module.run(demo['config'], RESULTS) == demo
    with pytest.raises(ValueError, match='choose from demo, starts'):
        module.run(dict(experiment='digits'))
    assert config_hash(demo['config']) in result_path(demo['config']).name
    assert isinstance(module.read_results(RESULTS / 'demo'), pd.DataFrame)
