"Every planted fault is found under its own name, honest claims are not accused, and what cannot be used is refused."

from functools import cache
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from torch import nn
from torch.nn import functional as F
from aoe_nb.attack import APGD, MIFGSM, PGD, Square, fgsm, pgd
from aoe_nb.attack_audit import _moved, _slip, attack_audit
from aoe_nb.data import inliers, outliers, unseen
from aoe_nb.energy import energy
from aoe_nb.evaluation import log_msp
from aoe_nb.metrics import ood_metrics

SEVEN = [0, 1, 2, 4, 5, 6, 7]
EPS = 24 / 255
MEAN, SD = 0.3, 0.37
SEEDS = [0, 1, 2]
quick = dict(steps=20, restarts=2, n_queries=60, draws=4)


@cache
def images():
    train = inliers('digits', 'train').select(SEVEN)
    known = inliers('digits', 'test').select(SEVEN).x[:200]
    strange = unseen('near', id='digits7')['digits389'].x[:150]
    return SimpleNamespace(x=train.x / 255, y=train.y, known=known, strange=strange)


def gradient(f, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


@cache
def trained(seed, exposed):
    "A small network; exposed: to attacked patches of a photograph"
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 64), nn.Softplus(5), nn.Linear(64, 64), nn.Softplus(5), nn.Linear(64, 7)]
    net = nn.Sequential(nn.Flatten(), *layers)
    adam = torch.optim.Adam(net.parameters(), 3e-3)
    patches = outliers('china').x / 255
    x, y = images().x, images().y

    def score(x):
        return energy(net((x - MEAN) / SD))

    for _ in range(5):
        for i in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(net((x[i] - MEAN) / SD), y[i])
            if exposed:
                patch = PGD(EPS, 3)(patches[torch.randint(len(patches), (64,))], score)
                loss += 0.1 * F.relu(score(x[i]) + 8).square().mean()
                loss += 0.1 * F.relu(-2 - score(patch)).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    return net.eval()


class World:
    "Detectors of one seed, and attacks on them"

    def __init__(self, seed):
        self.net = trained(seed, True)
        self.base = trained(seed + 10, False)
        g = torch.Generator().manual_seed(seed)
        self.direction = torch.randn(1, 8, 8, generator=g).sign() / 64
        noise = torch.randn(1, 8, 8, generator=g)
        self.weight = noise + (images().strange.float().mean(0) - images().known.float().mean(0)) / 40
        self.middle = self.score(images().known / 255).quantile(0.9).item()

    # scores

    def score(self, x):
        return energy(self.net((x - MEAN) / SD))

    def base_score(self, x):
        return energy(self.base((x - MEAN) / SD))

    def linear(self, x):
        return (x * self.weight).sum((1, 2, 3))

    def logit(self, x):
        return 40 * (self.score(x) - self.middle)

    def saturated(self, x):
        return torch.sigmoid(self.logit(x))

    def msp(self, x):
        return 1 - self.net((x - MEAN) / SD).softmax(1).amax(1)

    def msp_logit(self, x):
        return log_msp(self.net((x - MEAN) / SD))

    def wavy(self, x):
        "With many minima along one direction"
        phase = 120 * (self.direction * x).sum((1, 2, 3))
        return self.score(x) + 4 * (phase.cos() + (0.31 * phase).cos())

    def random(self, x):
        return self.score(x) + 0.5 * torch.sin(4 * x.flatten(1) @ torch.randn(64))

    # attacks

    def on_normalised(self, x):
        def loss(z):
            return energy(self.net(z))

        z = pgd((x - MEAN) / SD, loss, EPS, 10, lo=-MEAN / SD, hi=(1 - MEAN) / SD)
        return (z * SD + MEAN).clamp(0, 1)

    def cut(self, x):
        z = (x - MEAN) / SD
        z = z - EPS / SD * gradient(lambda z: energy(self.net(z)), z).sign()
        return z.clamp(0, 1) * SD + MEAN

    def cross_entropy(self, x):
        y = self.net((x - MEAN) / SD).argmax(1)
        return pgd(x, lambda x: -F.cross_entropy(self.net((x - MEAN) / SD), y, reduction='none'), EPS, 10)

    def best_mean(self, x):
        best = adv = x
        for _ in range(30):
            adv = adv - EPS / 3 * gradient(self.wavy, adv).sign()
            adv = adv.clamp(x - EPS, x + EPS).clamp(0, 1)
            if self.wavy(adv).mean() < self.wavy(best).mean():
                best = adv
        return best

    def search_mean(self, x):
        "Random search that accepts what is good for the batch"
        best = x
        for _ in range(100):
            new = best + 2 * EPS * (torch.rand(x.shape) < 0.03) * (2 * torch.randint(0, 2, x.shape) - 1)
            new = new.clamp(x - EPS, x + EPS).clamp(0, 1)
            if self.score(new).mean() < self.score(best).mean():
                best = new
        return best


@cache
def world(seed):
    return World(seed)


def found(w, attack, f=None, surrogate=None, **kw):
    "Which faults are named, and the table"
    df = attack_audit(f or w.score, images().known, images().strange, EPS, attack, surrogate=surrogate, **(quick | kw))
    return [check for check in df.index[df.suspicious] if 'truth' not in check], df


# Faults

INVALID = {
    'bytes': ('wrong units', lambda w, x: pgd(255 * x, lambda x: w.score(x / 255), EPS, 10, lo=0.0, hi=255.0) / 255),
    'normalised': ('wrong units', lambda w, x: w.on_normalised(x)),
    'whole number': ('wrong units', lambda w, x: pgd(x, w.score, 1.0, 10)),
    'unclipped': ('outside [0,1]', lambda w, x: x - EPS * gradient(w.score, x).sign()),
    'larger ball': ('larger than eps', lambda w, x: pgd(x, w.score, 1.5 * EPS, 10)),
    'clipped early': ('clipped after normalising', lambda w, x: w.cut(x)),
}
WEAK = {
    'cross-entropy': ('another score', lambda w, x: w.cross_entropy(x), 'score'),
    'base energy': ('another score', lambda w, x: pgd(x, w.base_score, EPS, 10), 'score'),
    'small step': ('step too small', lambda w, x: pgd(x, w.score, EPS, 5, EPS / 30, random_start=False), 'score'),
    'two steps': ('too few steps', lambda w, x: pgd(x, w.score, EPS, 2, EPS / 30), 'score'),
    'one start': ('one start', lambda w, x: pgd(x, w.wavy, EPS, 60, EPS / 40, random_start=False), 'wavy'),
    'best mean': ('best of the batch', lambda w, x: w.best_mean(x), 'wavy'),
    'search mean': ('best of the batch', lambda w, x: w.search_mean(x), 'score'),
    'saturated': ('no gradient', lambda w, x: pgd(x, w.saturated, EPS, 10), 'saturated'),
    'one draw': ('one draw', lambda w, x: pgd(x, w.random, EPS, 5), 'random'),
}


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('fault', INVALID)
def test_an_invalid_attack_is_named(fault, seed):
    name, attack = INVALID[fault]
    w = world(seed)
    names, df = found(w, lambda x: attack(w, x))
    assert names == [name], df


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('fault', WEAK)
def test_a_weak_attack_is_named(fault, seed):
    name, attack, score = WEAK[fault]
    w = world(seed)
    surrogate = w.logit if score == 'saturated' else None
    names, df = found(w, lambda x: attack(w, x), getattr(w, score), surrogate)
    assert names == [name], df
    assert df.suspicious['AUROC above the truth']
    assert df.attrs['given']['AUROC'] > df.attrs['truth']['AUROC'] + 0.03


def test_a_score_that_is_turned_round_is_named():
    w = world(0)
    names, df = found(w, None, lambda x: -w.score(x))
    assert names == ['turned round'] and 'is a high score an outlier?' in df.says['turned round']


def test_whole_numbers_that_are_not_clipped_are_two_faults():
    names, _ = found(world(0), lambda x: x - 255 * EPS * gradient(world(0).score, x).sign())
    assert names == ['outside [0,1]', 'wrong units']


@pytest.mark.parametrize('seed', SEEDS)
def test_an_attack_that_takes_the_score_is_followed(seed):
    "A third of eps might be a deviation, but it was still on its way; and it may be handed the mean over draws"
    w = world(seed)
    names, df = found(w, lambda x, score: pgd(x, score, EPS, 10, SD * EPS / 10, random_start=False))
    assert names == ['step too small'], df
    names, df = found(w, lambda x, score: fgsm(x, score, EPS), w.random)
    assert names == ['one draw'], df


def test_a_flat_score_is_named_without_attack_and_without_surrogate():
    w = world(0)
    assert found(w, None, w.saturated)[0] == ['no gradient']
    assert found(w, None, w.saturated, w.logit)[0] == []
    with torch.no_grad():
        assert found(w, None, lambda x: w.score((x * 4).round() / 4))[0] == ['no gradient']
    names, df = found(w, None, w.saturated, w.logit, claimed=0.95)
    assert names == ['no gradient'] and df.suspicious['AUROC above the truth']


@pytest.mark.parametrize('sd', [[0.247, 0.2435, 0.2616], [0.229, 0.224, 0.225], [0.1, 0.3, 0.2]], ids=str)
def test_units_of_colour_images(sd):
    x = torch.rand(20, 3, 8, 8)
    step = 0.03 * torch.tensor(sd).view(3, 1, 1)
    case = SimpleNamespace(x=x, theirs=(x + step * torch.randn_like(x).sign()).clamp(0, 1), known=x, eps=0.03)
    assert torch.allclose(_moved(case), torch.tensor(sd), rtol=1e-3)
    assert 'deviation' in _slip(case)


# Honest claims

HONEST = {
    'plain energy': lambda w: (PGD(EPS, 10), w.base_score),
    'exposed': lambda w: (PGD(EPS, 10),),
    'apgd': lambda w: (APGD(EPS, 20),),
    'momentum': lambda w: (MIFGSM(EPS, 10), w.base_score),
    'fgsm, nearly as good': lambda w: (lambda x: fgsm(x, w.score, EPS), w.score),
    'square': lambda w: (Square(EPS, 1500), w.score),
    'linear': lambda w: (lambda x: (x - EPS * w.weight.sign()).clamp(0, 1), w.linear),
    'msp by its logits': lambda w: (lambda x: pgd(x, w.msp_logit, EPS, 10), w.msp, w.msp_logit),
    'msp without surrogate': lambda w: (lambda x: pgd(x, w.msp_logit, EPS, 10), w.msp),
    'saturated by its logit': lambda w: (lambda x: pgd(x, w.logit, EPS, 10), w.saturated, w.logit),
    'mean of draws': lambda w: (
        lambda x: pgd(x, lambda x: sum(w.random(x) for _ in range(16)) / 16, EPS, 10),
        w.random,
    ),
    '8-bit images': lambda w: (lambda x: (255 * pgd(x, w.score, EPS, 10)).round().byte(), w.score),
    'stops early': lambda w: (lambda x: stopped(w, x), w.base_score),
}


def stopped(w, x):
    "PGD that leaves an image alone once hardly an inlier looks more familiar"
    familiar = w.base_score(images().known / 255).quantile(0.02)
    adv = x
    for _ in range(10):
        new = (adv - EPS / 4 * gradient(w.base_score, adv).sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
        done = (w.base_score(adv) < familiar)[:, None, None, None]
        adv = torch.where(done, adv, new).detach()
    return adv


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('claim', HONEST)
def test_an_honest_claim_is_not_accused(claim, seed):
    w = world(seed)
    names, df = found(w, *HONEST[claim](w))
    assert not df.suspicious.any(), df


def test_robust_and_honest():
    "Patches of a photograph, against which the network was trained: the truth stays high, and so does the claim"
    w = world(0)
    far = unseen('far', id='digits7')['flower'].x[:150]
    df = attack_audit(w.score, images().known, far, EPS, PGD(EPS, 10), claimed=dict(AUROC=1.0, FPR95=0.0), **quick)
    assert df.attrs['truth']['AUROC'] > 0.98
    assert not df.suspicious.any(), df


# Truth


@pytest.mark.parametrize('seed', SEEDS)
def test_the_truth_of_a_linear_score_is_known(seed):
    w = world(seed)
    known, x = images().known / 255, images().strange / 255
    optimum = (x - EPS * w.weight.sign()).clamp(0, 1)
    exact = ood_metrics(w.linear(known), w.linear(optimum))
    for attack in (None, PGD(EPS, 1)):
        truth = found(w, attack, w.linear)[1].attrs['truth']
        assert truth['AUROC'] == pytest.approx(exact['AUROC'], abs=1e-4)
        assert truth['FPR95'] == pytest.approx(exact['FPR95'], abs=1e-4)
        assert truth['AUROC_lo'] < truth['AUROC'] < truth['AUROC_hi']


def test_their_images_count_where_they_are_valid_and_better():
    "A score that only one image of all hides from: no search finds it, and a candidate is all it takes"
    known, x = images().known / 255, images().strange / 255
    secret = (x + EPS * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 1)).clamp(0, 1)

    def score(x):
        away = torch.cdist(x.flatten(1), secret.flatten(1), compute_mode='donot_use_mm_for_euclid_dist')
        return x[:, 0, 1].mean(1) - 100.0 * (away.amin(1) < 1e-4)

    df = attack_audit(score, known, x, EPS, secret, **quick)
    assert df.attrs['truth']['AUROC'] == 0 and not df.suspicious.any()
    assert ood_metrics(score(known), score(x))['AUROC'] > 0.2


def test_saved_images_are_as_good_as_the_attack():
    w = world(0)
    x = images().strange / 255
    assert found(w, pgd(x, w.score, EPS, 10))[0] == []
    assert found(w, (255 * pgd(x, w.score, EPS, 10)).round().byte().numpy())[0] == []
    for name in 'normalised', 'unclipped':
        fault, attack = INVALID[name]
        assert found(w, attack(w, x))[0] == [fault]
    assert found(w, w.cross_entropy(x).detach())[0] == ['another score']
    with pytest.raises(ValueError, match='must return images of shape'):
        found(w, x[:9])


def test_claims_are_compared():
    w = world(0)
    names, df = found(w, PGD(EPS, 10), claimed=dict(AUROC=0.99, FPR95=0.01))
    assert names == ['AUROC not reproduced', 'FPR95 not reproduced']
    assert df.attrs['claimed'] == dict(AUROC=0.99, FPR95=0.01)
    truth = df.attrs['truth']['AUROC']
    assert found(w, PGD(EPS, 10), claimed=truth)[0] == []
    for claimed, wrong in ((truth + 0.01, False), (0.99, True), (0.1, False)):
        df = found(w, None, claimed=claimed)[1]
        assert df.suspicious['AUROC above the truth'] == wrong
        assert (df.says[df.needs == 'attack'] == 'needs their attack').all()


def test_the_same_again_and_the_random_state_is_left_alone():
    w = world(0)
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one = found(w, PGD(EPS, 10), w.random)[1]
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    two = found(w, PGD(EPS, 10), w.random)[1]
    pd.testing.assert_frame_equal(one, two)
    assert one.attrs == two.attrs and one.attrs['random']


# What a stranger brings


@pytest.mark.parametrize('bs', [1, 7])
def test_a_surrogate_that_is_none_is_refused(bs):
    w = world(0)
    for surrogate, words in (
        (lambda x: x, 'one number an image'),
        (lambda x: w.score(x) * torch.nan, 'surrogate is NaN'),
    ):
        with pytest.raises(ValueError, match=words):
            found(w, PGD(EPS, 2), surrogate=surrogate, bs=bs)


def test_an_attack_may_write_on_its_input():
    w = world(0)

    def in_place(x):
        return x.sub_(EPS * gradient(w.score, x).sign()).clamp_(0, 1)

    strange = images().strange.clone()
    df = attack_audit(w.score, images().known, strange, EPS, in_place, **quick)
    assert torch.equal(strange, images().strange)
    assert not df.suspicious.any() and df.value['larger than eps'] == pytest.approx(1, abs=1e-4)


def test_batches_are_no_matter():
    w = world(0)
    known, x = images().known[:40], images().strange[:21]
    df = attack_audit(w.score, known, x, EPS, PGD(EPS, 10), bs=4, **quick)
    assert not df.suspicious.any()


def test_a_network_on_arrays_of_three_channels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (30, 3, 8, 8), dtype=np.uint8)

    def score(x):
        return energy(net(x))

    with pytest.raises(ValueError, match='training mode.*eval'):
        attack_audit(score, x, x, 8 / 255, **quick)
    assert net.training and net[1].num_batches_tracked == 0  # nothing was called
    net.eval()
    df = attack_audit(score, x, x[::-1], 8 / 255, PGD(8 / 255, 10, restarts=2), **quick)
    assert not df.suspicious.any()
    with torch.inference_mode():
        attack_audit(score, x, x, 8 / 255, **(quick | dict(steps=2)))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    'kw', ['eps', 'eps2', 'claim', 'claim2', 'claim3', 'setting', 'setting2', 'setting3', 'attack']
)
def test_settings_are_refused_by_name(kw):
    given, words = dict(
        eps=(dict(eps=8), 'divide by 255'),
        eps2=(dict(eps=0), 'such as 8/255'),
        claim=(dict(claimed=85), 'divide percent by 100'),
        claim2=(dict(claimed=dict(AUPR=0.5)), "'AUPR' is neither"),
        setting=(dict(step=5), 'step is no setting: choose from seed'),
        claim3=(dict(claimed=[0.9]), 'must be a fraction'),
        setting2=(dict(steps=0), 'steps must be a whole number of at least 1'),
        setting3=(dict(restarts='3'), 'whole number'),
        attack=(dict(attack=PGD), 'attack must be a function'),
    )[kw]
    call = dict(score=world(0).score, inliers=images().known, outliers=images().strange, eps=EPS) | given
    with pytest.raises((ValueError, TypeError), match=words):
        attack_audit(**call)


SCORES = {
    'column': (lambda x: x.mean((1, 2, 3))[:, None], 'squeeze it'),
    'scalar': (lambda x: x.mean(), 'one number an image'),
    'NaN': (lambda x: x.mean((1, 2, 3)).log() * torch.nan, 'the score is NaN: look at'),
    'some NaN': (lambda x: (x.mean((1, 2, 3)) - 0.3).sqrt(), 'the score is NaN on [0-9]+ of 150'),
    'channels': (nn.Conv2d(3, 1, 8), 'the score fails on images of shape .2, 1, 8, 8. in .0,1. .RuntimeError'),
    'by batch': (lambda x: x.mean((1, 2, 3)) - x.mean(), 'others in its batch'),
    'none': (None, 'score must be a function'),
}


@pytest.mark.parametrize('name', SCORES)
def test_a_score_that_is_none_is_refused(name):
    score, words = SCORES[name]
    with pytest.raises((ValueError, TypeError), match=words):
        attack_audit(score, images().known, images().strange, EPS, PGD(EPS, 2), **quick)


ATTACKS = {
    'tuple': (lambda x: (x, 0), 'images alone, a tensor like its input, not a tuple'),
    'shape': (lambda x: x[:, :, :4], 'must return images of shape'),
    'int': (lambda x: (255 * x).long(), 'returned torch.int64'),
    'NaN': (lambda x: x * torch.nan, 'NaN or infinity'),
    'none': (lambda x: None, 'not a NoneType'),
}


@pytest.mark.parametrize('name', ATTACKS)
def test_an_attack_that_gives_no_images_is_refused(name):
    attack, words = ATTACKS[name]
    with pytest.raises((ValueError, TypeError), match=words):
        attack_audit(world(0).score, images().known, images().strange, EPS, attack, **quick)


def test_an_attack_that_changes_the_detector_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

    def attack(x):
        with torch.no_grad():
            net[1].weight.add_(1)
        return x

    with pytest.raises(ValueError, match='the attack changed the detector'):
        attack_audit(lambda x: energy(net(x)), images().known, images().strange, EPS, attack, **quick)


@pytest.mark.parametrize('n', [0, 1])
def test_too_few_images_are_refused(n):
    with pytest.raises(ValueError, match='no images in the outliers|at least two'):
        attack_audit(world(0).score, images().known, images().strange[:n], EPS, **quick)


def test_two_sizes_are_refused():
    with pytest.raises(ValueError, match='the outliers are 1x8x7, the inliers 1x8x8'):
        attack_audit(world(0).score, images().known, images().strange[..., :7], EPS, **quick)
    with pytest.raises(ValueError, match='not .0,1.'):
        attack_audit(world(0).score, images().known, images().strange.float(), EPS, **quick)
