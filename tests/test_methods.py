"The relatives of AOE: each recipe is the step of its paper, written out here in plain torch. And mining."

import copy

import pytest
import torch
import torch.nn.functional as F
from fastai.vision.all import SGD, Callback, CrossEntropyLossFlat, DataLoaders, Learner, load_learner, set_seed
from fastcore.test import test_close as close, test_eq as eq, test_fail as fails
from hypothesis import given, settings, strategies as st
from test_resume import Kill, interrupted, whole_run

import aoe_nb.evaluation  # noqa: F401 (what Learner gains)
from aoe_nb.attack import FGSM, PGD
from aoe_nb.data import Images, inliers, outliers
from aoe_nb.energy import energy
from aoe_nb.exposure import OutlierExposure
from aoe_nb.methods import exposure_of, methods, relatives, step_cost
from aoe_nb.mining import Mining
from aoe_nb.models import small_cnn
from aoe_nb.stream import OutlierStream

TRAIN = inliers('digits7')
CHINA = outliers('china')
N = 32
RELATIVES = 'acet', 'acet_oe', 'aloe', 'advoe', 'atom', 'divoe'


class Noted(Callback):
    "What the network gets in each step, the outliers' loss, and the gradients"

    order = 1000
    run_valid = False

    def before_fit(self):
        self.seen = []

    def before_batch(self):
        self.seen.append(dict(x=self.xb[0].detach().clone(), n=self.learn.outlier_exposure.n))

    def after_backward(self):
        grads = [p.grad for p in self.model.parameters()]
        self.seen[-1]['grads'] = torch.cat([g.flatten() for g in grads if g is not None]).clone()


def new_learner(n=N, cbs=(), path=None):
    "A network that knows the digits a little, and images that nothing normalises"
    torch.manual_seed(0)
    some = Images(TRAIN.x[:n], TRAIN.y[:n], TRAIN.classes)
    dls = DataLoaders(some.dl(N), some.dl(N))
    net = small_cnn(1, 7)
    learn = Learner(dls, net, CrossEntropyLossFlat(), opt_func=SGD, cbs=cbs, train_bn=True, path=path)
    return fit(learn, 10, 0.1) if not cbs else learn


def fit(learn, *args):
    with learn.no_bar(), learn.no_logging():
        learn.fit(*args)
    return learn


NET = new_learner(len(TRAIN)).model.eval()


def exposed(method, cbs=(), n=N, path=None, pool=CHINA, **kw):
    learn = new_learner(n, [*cbs, Noted()], path)
    learn.model.load_state_dict(NET.state_dict())
    learn.expose(pool, **dict(bn='frozen') | exposure_of(method) | kw)
    return learn


# Each paper's step, by hand


def climb(x, loss, eps, steps, alpha, gen, best=False):
    "Signed steps up `loss` within `eps` of `x` from a random start; `best`: the best point met, and `x` among them"
    adv = (x + eps * (2 * torch.rand(x.shape, generator=gen) - 1)).clamp(0, 1)
    met = [x, adv]
    for _ in range(steps):
        adv = adv.detach().requires_grad_()
        grad = torch.autograd.grad(loss(NET(adv)).sum(), adv)[0]
        adv = adv.detach() + alpha * grad.sign()
        adv = torch.min(torch.max(adv, x - eps), x + eps).clamp(0, 1)
        met.append(adv)
    if not best:
        return adv
    with torch.no_grad():
        values = torch.stack([loss(NET(o)) for o in met])
    return torch.stack(met)[values.argmax(0), torch.arange(len(x))]


def to_uniform(logits):
    return -logits.log_softmax(1).mean(1)


def log_confidence(logits):
    return logits.softmax(1).amax(1).log()


def more(logits):
    "The logits with that of a class that is none of the others"
    return torch.cat([logits, logits.new_zeros(len(logits), 1)], 1)


def to_more(logits):
    return -more(logits).log_softmax(1)[:, -1]


def ce(net, x, y):
    return F.cross_entropy(net(x), y)


def half(x, move):
    return torch.cat([move(x[: len(x) // 2]), x[len(x) // 2 :]])


def acet(x, y, out, gen):
    out = climb(out, log_confidence, 0.3, 40, 0.3 / 40, gen, best=True)
    return x, out, lambda net: ce(net, x, y) + log_confidence(net(out)).mean()


def acet_oe(x, y, out, gen):
    out = half(out, lambda o: climb(o, to_uniform, 8 / 255, 5, 2 / 255, gen, best=True))
    return x, out, lambda net: ce(net, x, y) + to_uniform(net(out)).mean()


def aloe(x, y, out, gen):
    x = climb(x, lambda logits: F.cross_entropy(logits, y, reduction='none'), 1 / 255, 2, 1 / 255, gen)
    out = climb(out, to_uniform, 1 / 255, 2, 1 / 255, gen)
    return x, out, lambda net: ce(net, x, y) + 0.5 * to_uniform(net(out)).mean()


def advoe(x, y, out, gen):
    x = climb(x, lambda logits: F.cross_entropy(logits, y, reduction='none'), 2 / 255, 7, 0.5 / 255, gen)
    out = climb(out, to_uniform, 2 / 255, 7, 0.5 / 255, gen)
    return x, out, lambda net: ce(net, x, y) + 0.5 * to_uniform(net(out)).mean()


def atom(x, y, out, gen):
    out = half(out, lambda o: climb(o, to_more, 8 / 255, 5, 2 / 255, gen, best=True))

    def loss(net):
        return F.cross_entropy(more(net(x)), y) + F.cross_entropy(more(net(out)), torch.full((len(out),), 7))

    return x, out, loss


def divoe(x, y, out, gen):
    out = half(out, lambda o: climb(o, to_uniform, 0.05, 5, 0.05 / 4, gen))
    return x, out, lambda net: ce(net, x, y) + 0.5 * to_uniform(net(out)).mean()


BY_HAND = dict(acet=acet, acet_oe=acet_oe, aloe=aloe, advoe=advoe, atom=atom, divoe=divoe)


def drawn_by_hand(method, n):
    "The outliers of the first step"
    stream = OutlierStream(CHINA, 0)
    if method == 'atom':
        with torch.no_grad():
            scores = more(NET(CHINA.x.float() / 255)).softmax(1)[:, -1]
        order = sorted(range(len(scores)), key=lambda i: scores[i].item())
        first = int(0.125 * len(scores))
        stream.choose(torch.tensor(order[first : first + round(len(scores) / 4)]))
    return stream.draw(n)


@pytest.mark.parametrize('method', RELATIVES)
def test_a_step_is_that_of_the_paper(method):
    learn = fit(exposed(method), 1, 0.0)
    (seen,) = learn.noted.seen
    eq(seen['n'], N)
    gen = torch.Generator().manual_seed(0)
    x, y = TRAIN.x[:N].float() / 255, TRAIN.y[:N]
    ratio = 2 if method in ('aloe', 'atom') else 1
    x_in, x_out, loss = BY_HAND[method](x, y, drawn_by_hand(method, ratio * N), gen)
    want = torch.cat([x_in, x_out])
    alike = (want - seen['x']).abs() < 1e-6
    assert alike.float().mean() > 0.999, method  # but for gradients that are zero within rounding
    net = copy.deepcopy(NET)
    loss(net).backward()
    close(seen['grads'], torch.cat([p.grad.flatten() for p in net.parameters()]), 1e-4)


@pytest.mark.parametrize('method', RELATIVES)
def test_it_trains_and_moves_the_right_way(method):
    learn = exposed(method, n=3 * N)
    x, moved = learn.exposed(16)
    assert (moved - x).abs().max() <= exposure_of(method)['attack'].eps + 1e-6
    n = round(exposure_of(method).get('frac', 1) * 16)
    assert torch.equal(moved[n:], x[n:]) and (moved[:n] != x[:n]).flatten(1).any(1).all()
    with torch.no_grad():
        before, after = NET(x[:n]), NET(moved[:n])
    assert to_uniform(after).mean() > to_uniform(before).mean()
    assert log_confidence(after).mean() > log_confidence(before).mean()
    fit(learn, 1, 0.01)
    eq(len(learn.noted.seen), 3)
    with torch.no_grad():
        assert energy(learn.model(x)).isfinite().all()
    changed = [(a != b).any() for a, b in zip(learn.model.state_dict().values(), NET.state_dict().values())]
    assert any(changed)


def test_the_papers_sizes_unless_another_is_given():
    own = dict(acet=0.3, acet_oe=8 / 255, aloe=1 / 255, advoe=2 / 255, atom=8 / 255, divoe=0.05)
    for method in RELATIVES:
        close(exposure_of(method)['attack'].eps, own[method], 1e-9)
        given = exposure_of(method, 0.1)
        eq(given['attack'].eps, 0.1)
        close(given['attack'].alpha / 0.1, exposure_of(method)['attack'].alpha / own[method], 1e-9)
        assert 'attack_in' not in given or given['attack_in'] == given['attack']
    eq(exposure_of('oe'), dict(attack=None))
    fails(lambda: exposure_of('aoe_half'), contains='aoe_half has no eps of its own')
    fails(lambda: exposure_of('goe'), contains='unknown method')


OLDER = """plain oe oe_gaussian oe_sign aoe aoe_rs aoe_vary aoe_free aoe_pgd aoe_l2 aoe_uniform aoe_msp
aoe_quarter aoe_half aoe_free_pgd aoe_pgd_half adv""".split()


def test_older_methods_are_what_they_were():
    "Finished runs have their names"
    eq(list(methods)[: len(OLDER)], OLDER)
    newer = 'aoe_least', 'aoe_hold', 'aoe_pgd2', 'aoe_pgd10', 'aoe_pgd20', 'aoe_mi', 'aoe_apgd'
    eq({*methods} - {*OLDER}, {*RELATIVES, *newer})
    eq(exposure_of('aoe', 0.1), dict(attack=FGSM(0.1)))
    eq(exposure_of('aoe_pgd_half', 0.1), dict(attack=PGD(0.1, 5), frac=0.5))
    eq(exposure_of('adv', 0.1), dict(lam=0.0, attack_in=PGD(0.1, 5)))
    for name in OLDER:
        assert not {'mine', 'ratio', 'loss'} & set(exposure_of(name, 0.1)), name


# What a step costs


class Passes(Callback):
    "How many images pass the network forward while it trains"

    order = -1
    run_valid = False

    def before_fit(self):
        self.n = 0
        self.hook = self.model[0].register_forward_hook(self.count)

    def count(self, module, x, out):
        self.n += len(out) * self.learn.training

    def after_fit(self):
        self.hook.remove()


@pytest.mark.parametrize(
    'method,want',
    [
        ('acet', 1 + 1 + 42),  # the image itself, forty gradients, the last point
        ('acet_oe', 1 + 1 + 0.5 * 7),
        ('aloe', 1 + 2 + 2 * 2 + 2),
        ('advoe', 1 + 1 + 7 + 7),
        ('atom', 1 + 2 + 2 * 0.5 * 7 + len(CHINA) / N),
        ('divoe', 1 + 1 + 0.5 * 5),
    ],
)
def test_forward_passes(method, want):
    eq(fit(exposed(method, [Passes()]), 1, 0.0).passes.n, want * N)


def test_cost_is_counted():
    cost = {o: step_cost(o) for o in ('oe', 'aoe', 'aoe_half', 'aoe_pgd', 'aoe_free', 'adv', *RELATIVES)}
    want = dict(oe=6, aoe=8, aoe_half=7, aoe_pgd=16, aoe_free=6, adv=13)
    want |= dict(acet=6 + 82, acet_oe=6 + 6, aloe=9 + 8 + 4, advoe=6 + 28, atom=9 + 12 + 1, divoe=6 + 5)
    for name in want:
        close(cost[name], want[name] / 6, 1e-9)
    close(step_cost('atom', pool=8), (9 + 12 + 8) / 6, 1e-9)
    eq(relatives().cost['ATOM'], step_cost('atom'))


def test_table_says_what_the_recipes_do():
    table = relatives()
    assert {*RELATIVES, 'oe', 'aoe'} == {*table.method}
    for name, o in table.iterrows():
        kw = exposure_of(o.method, 8 / 255)
        assert o.ratio == kw.get('ratio', 1) and o.attacked == (kw.get('frac', 1) if kw['attack'] else 0)
        assert (o.inliers == '-') == ('attack_in' not in kw)
        own = o.lam if o.lam == o.lam else None
        assert own == kw.get('lam')


def test_cells_say_what_is_used():
    from aoe_nb.study.protocol import cells_of, chosen

    for id, lock in chosen('results').items():
        cells = cells_of('relatives', id, lock)
        eq(len({(c['method'], c['start']) for c in cells}), 9 * 5)
        for c in cells:
            kw = exposure_of(c['method'], c['eps_255'] / 255)
            eq(kw.get('lam', c['lam']), c['lam'])
            if c['method'] in RELATIVES:
                close(kw['attack'].eps, exposure_of(c['method'])['attack'].eps, 1e-9)
            if c['method'] in ('oe', 'aoe'):
                eq((c['eps_255'], c['lam']), (lock['settings']['eps_255'], lock['settings']['lam']))


# Mining


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    st.floats(0, 1),
    st.floats(0.01, 1),
    st.randoms(use_true_random=False),
)
@settings(max_examples=200, deadline=None)
def test_rows_are_those_of_a_plain_sort(scores, q, share, random):
    scores = [s + random.choice([0, 0.5]) for s in scores]
    if q + share > 1:
        q, share = q / (q + share), share / (q + share)
    n = len(scores)
    want = [i for _, i in sorted((s, i) for i, s in enumerate(scores))][int(q * n) : int(q * n) + round(share * n)]
    mining = Mining(q, share)
    if not want:
        return fails(lambda: mining.span(n), contains='too small')
    eq(mining.rows(torch.tensor(scores)).tolist(), want)


def test_what_mining_refuses():
    for kw, why in [
        (dict(q=-0.1), 'part of the pool'),
        (dict(q='0.1'), 'part of the pool'),
        (dict(q=float('nan')), 'part of the pool'),
        (dict(share=0), 'above 0'),
        (dict(q=0.9), 'whole pool'),
        (dict(every=0), 'whole number of steps'),
        (dict(every=1.5), 'whole number of steps'),
    ]:
        fails(lambda: Mining(**kw), contains=why)
    fails(lambda: Mining().rows(torch.tensor([1.0, float('nan'), 0, 0])), contains='NaN')
    fails(lambda: Mining().rows(torch.rand(4, 2)), contains='one score an image')
    loader = torch.utils.data.DataLoader(CHINA.x, 8)
    for source in loader, lambda n: torch.rand(n, 1, 8, 8):
        fails(lambda: OutlierExposure(source, mine=Mining()), contains='exist only once they are drawn')
    fails(lambda: OutlierExposure(CHINA.x[:1], mine=Mining()), contains='a pool of 1 outliers is too small')
    for wrong in 0.125, Mining:
        fails(lambda: OutlierExposure(CHINA, mine=wrong), contains='such as Mining(.125)')


class Looks(Callback):
    "Before each look the rows that a plain sort would take, after it those that are drawn"

    order = 4
    run_valid = False

    def before_fit(self):
        self.want, self.got = [], []

    def before_batch(self):
        model = copy.deepcopy(self.model).eval()
        with torch.no_grad():
            scores = energy(model(CHINA.x.float() / 255)).tolist()
        order = sorted(range(len(scores)), key=lambda i: scores[i])
        first = int(0.125 * len(scores))
        self.want.append(set(order[first : first + round(len(scores) / 4)]))

    def after_pred(self):
        self.got.append(set(self.learn.outlier_exposure.stream.rows.tolist()))


@pytest.mark.parametrize('every', [None, 2])
def test_each_look_takes_the_hard_ones_of_the_network_as_it_is(every):
    learn = exposed('oe', [Looks()], n=4 * N, mine=Mining(every=every), attack=FGSM(8 / 255))
    fit(learn, 2, 0.1)
    want, got = learn.looks.want, learn.looks.got
    eq(len(got), 8)
    for step in range(8):
        latest = step - step % (every or 4)
        assert len(want[latest] ^ got[step]) <= 2, step  # equal within rounding
    assert len(want[0] ^ want[-1]) > 20  # training changes what is hard


def test_only_the_chosen_are_drawn():
    pool = torch.arange(40, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    stream = OutlierStream(pool, 3)
    rows = torch.tensor([5, 7, 30, 31, 2])
    stream.choose(rows)
    state = stream.state_dict()
    drawn = (255 * stream.draw(15)[:, 0, 0, 0]).round().int().reshape(3, 5)
    assert all(sorted(o.tolist()) == sorted(rows.tolist()) for o in drawn) and (drawn[0] != drawn[1]).any()
    again = OutlierStream(pool, 3)
    again.load_state_dict(state)
    close(255 * again.draw(15)[:, 0, 0, 0], drawn.flatten(), 1e-3)
    both = [OutlierStream(pool, 3) for _ in range(2)]
    for rank, one in enumerate(both):
        one.choose(rows)
        one.rank, one.world = rank, 2
    shared = torch.cat([(255 * o.draw(5)[:, 0, 0, 0]).round().int() for o in both])
    eq(shared.sort()[0], drawn[:2].flatten().sort()[0])
    del state['rows']  # as it was saved before there was a choice
    again.load_state_dict(state)
    eq(again.rows, None)
    fails(lambda: OutlierStream(pool[:10]).load_state_dict(stream.state_dict()), contains='chosen outlier 31')


def test_processes_score_a_part_each():
    learn = exposed('atom')
    cb = learn.outlier_exposure
    cb._start()
    like = torch.rand(4, 1, 8, 8)
    net = learn.model.eval()
    whole = cb._pool_scores(like)
    parts = []
    for rank in range(3):
        cb.stream.rank, cb.stream.world = rank, 3
        parts.append(cb._pool_scores(like))
    close(sum(parts), whole, 1e-5)
    close(whole, energy(net(CHINA.x.float() / 255)).detach(), 1e-4)


def test_a_look_disturbs_nothing():
    def inliers_of(mine):
        set_seed(0)
        learn = exposed('oe', n=4 * N, mine=mine)
        learn.dls.train.shuffle = True
        fit(learn, 1, 0.0)
        return torch.cat([o['x'][: o['n']] for o in learn.noted.seen]), torch.rand(1)

    for a, b in zip(inliers_of(None), inliers_of(Mining())):
        assert torch.equal(a, b)
    learn = fit(exposed('atom', n=4 * N), 1, 0.0)
    cb = learn.outlier_exposure
    before = cb.state_dict()['stream']
    shown = learn.exposed(8)[0]
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(show_plot=False)
    after = cb.state_dict()['stream']
    assert all(torch.equal(before[k], after[k]) for k in ('gen', 'perm', 'rows')) and before['pos'] == after['pos']
    chosen = CHINA.x[before['rows']].float() / 255
    assert all((chosen == o).flatten(1).all(1).any() for o in shown)  # of a network that lr=0 has left alone


def test_a_killed_run_goes_on(tmp_path):
    kw = dict(mine=Mining(0.1, 0.3), ratio=2.0)
    want = whole_run(tmp_path / 'a', **kw)
    assert torch.equal(interrupted(tmp_path / 'b', Kill(2, 'epoch'), **kw), want)
    assert not torch.equal(whole_run(tmp_path / 'c', ratio=2.0), want)


def test_exported_and_said_when_it_differs(tmp_path):
    learn = fit(exposed('atom', path=tmp_path), 1, 0.0)
    learn.export('it.pkl')
    eq(load_learner(tmp_path / 'it.pkl').outlier_exposure.mine, Mining())
    assert repr(Mining()) in learn.outlier_exposure._settings()['mine']
    again = copy.deepcopy(learn.outlier_exposure)
    assert again.mine == Mining() and again.stream.rows is None
