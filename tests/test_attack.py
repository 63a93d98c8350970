"What the attacks promise for any image (range, distance, dtype, random state), and what they refuse."

import subprocess, sys
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from sklearn.datasets import load_digits
from torch import nn
from aoe_nb.attack import (
    Later,
    APGD,
    FGSM,
    MIFGSM,
    PGD,
    Gaussian,
    RandomSign,
    Square,
    apgd,
    eval_mode,
    fgsm,
    gaussian,
    mifgsm,
    no_gradient,
    pgd,
    square,
)
from aoe_nb.energy import entropy
from aoe_nb.models import small_cnn

ATTACKS = [
    FGSM(0.1),
    PGD(0.1, 3),
    PGD(0.1, 3, restarts=2, keep_best=True),
    MIFGSM(0.1, 3),
    APGD(0.1, 5),
    Square(0.1, 4),
    RandomSign(0.1),
    Gaussian(0.1),
    FGSM(0.5, norm='l2'),
    PGD(0.5, 3, norm='l2'),
    APGD(0.5, 5, restarts=2, norm='l2'),
    MIFGSM(0.5, 3, norm='l2'),
    Square(0.5, 20, norm='l2'),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = dict(
    plain=lambda x: x,
    channels_last=lambda x: x.to(memory_format=torch.channels_last),
    strided=lambda x: x.transpose(2, 3),
)


@pytest.fixture(scope='module')
def digits():
    return torch.tensor(load_digits().images[:64] / 16, dtype=torch.float32)[:, None]


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)).eval()


@pytest.fixture(scope='module')
def energy(net):
    return lambda x: -net(x).logsumexp(1)


@pytest.fixture(scope='module')
def by_hand(digits, energy):
    x = digits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(energy(x).sum(), x)
    return (digits - 16 / 255 * grad.sign()).clamp(0, 1)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.sampled_from(ATTACKS),
    st.sampled_from(DTYPES),
    st.sampled_from([*LAYOUTS]),
    st.integers(0, 3),
    st.integers(0, 1000),
)
def test_keeps_its_promises(attack, dtype, layout, n, seed):
    gen = torch.Generator().manual_seed(seed)
    pixels = (1.4 * torch.rand(n, 3, 6, 6, generator=gen) - 0.2).clamp(0, 1)
    x = LAYOUTS[layout](pixels.to(dtype))
    w = torch.randn(3, 6, 6, generator=gen).to(dtype)
    before = x.clone()
    state = torch.get_rng_state()
    adv = attack(x, lambda x: torch.tanh(w * x).flatten(1).sum(1), generator=gen)
    assert adv.dtype == dtype and adv.shape == x.shape and adv.isfinite().all() and not adv.requires_grad
    assert (adv >= 0).all() and (adv <= 1).all()
    assert torch.equal(x, before) and torch.equal(state, torch.get_rng_state())
    if not n or isinstance(attack, Gaussian):
        return
    d = (adv.double() - x.double()).flatten(1)
    rounding = torch.finfo(dtype).eps
    if getattr(attack, 'norm', 'linf') == 'linf':
        assert d.abs().max() <= 0.1 + rounding
    else:
        assert d.norm(dim=1).max() <= 0.5 + 8 * rounding  # the rounding of 108 pixels adds up


def test_no_grad_and_inference_mode_do_not_matter(digits, energy, by_hand):
    with torch.no_grad():
        a = fgsm(digits, energy, 16 / 255)
    with torch.inference_mode():
        b = fgsm(digits * 1, energy, 16 / 255)
    assert torch.equal(a, by_hand) and torch.equal(b, by_hand)


def test_parameters_get_no_gradient(digits, net, energy):
    for attack in ATTACKS:
        attack(digits, energy)
    assert all(p.grad is None for p in net.parameters())


def test_each_image_may_have_its_own_eps(digits, energy, by_hand):
    moved = fgsm(digits[:2], energy, torch.tensor([0, 16 / 255]).view(2, 1, 1, 1))
    assert torch.equal(moved[0], digits[0])
    torch.testing.assert_close(moved[1], by_hand[1], atol=1e-5, rtol=0)


def test_no_images_is_no_image():
    empty = torch.rand(0, 1, 8, 8, requires_grad=True)
    assert not fgsm(empty, lambda x: x.flatten(1).sum(1), 0.1).requires_grad


def test_refuses_a_broken_loss(digits, energy):
    with pytest.raises(FloatingPointError, match='NaN in the gradient'):
        fgsm(digits, lambda x: (x * float('nan')).sum(), 0.1)
    with pytest.raises(FloatingPointError, match='in the gradient'):
        mifgsm(digits, lambda x: x.sqrt().sum(), 0.1, 2)
    with pytest.raises(ValueError, match='does not depend on x'):
        fgsm(digits, lambda x: energy(x.detach().round()).detach(), 0.1)
    body_without_gradients = torch.nn.Linear(64, 10)
    with pytest.raises(ValueError, match='does not depend on x'):
        pgd(digits, lambda x: body_without_gradients(x.detach().flatten(1)).sum(1), 0.1, 2)
    assert no_gradient(digits, lambda x: body_without_gradients(x.detach().flatten(1)).sum(1)).all()
    for attack in apgd, square:
        with pytest.raises(FloatingPointError, match='NaN'):
            attack(digits, lambda x: energy(x) * float('nan'), 0.1, 5)


@pytest.mark.parametrize('alpha', [-0.1, float('nan')])
@pytest.mark.parametrize('attack', [pgd, mifgsm])
def test_refuses_a_step_size(attack, alpha, digits, energy):
    with pytest.raises(ValueError, match='alpha must be'):
        attack(digits, energy, 0.1, 2, alpha=alpha)


@pytest.mark.parametrize('eps', [-0.1, float('nan'), 8.0])
def test_refuses_an_eps(eps, digits, energy):
    with pytest.raises(ValueError, match='eps'):
        fgsm(digits, energy, eps)


def test_refuses_images(digits, energy):
    with pytest.raises(ValueError, match='normalise inside the loss'):
        fgsm(digits * 2 - 1, energy, 0.1)
    with pytest.raises(TypeError, match='divide uint8'):
        fgsm((digits * 255).byte(), energy, 0.1)
    with pytest.raises(ValueError, match='linf, l2'):
        fgsm(digits, energy, 0.1, norm='l1')
    with pytest.raises(ValueError, match=r'\(N,C,H,W\)'):
        square(digits[:, 0], energy, 0.1)


# lengths in L2

GRADIENT = [
    FGSM(0.5, norm='l2'),
    PGD(0.5, 3, norm='l2', random_start=False),
    MIFGSM(0.5, 3, norm='l2'),
    APGD(0.5, 4, norm='l2', random_start=False),
]

SIZES = [(o, s) for o in (torch.float32, torch.float64) for s in (1e-44, 1e-30, 1e-12, 1.0, 1e12, 1e30, 1e36)]


@pytest.mark.parametrize('dtype,size', [(torch.float16, 1e-5), (torch.float16, 1.0), *SIZES])
@pytest.mark.parametrize('attack', GRADIENT)
def test_l2_steps_neither_vanish_nor_explode(attack, size, dtype):
    w = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    x = torch.full((2, 3, 8, 8), 0.5, dtype=dtype)
    adv = attack(x, lambda x: (size * w * x.double()).flatten(1).sum(1))
    moved = (adv.double() - 0.5).flatten(1).norm(dim=1)
    rounding = 30 * torch.finfo(dtype).eps
    assert adv.dtype == dtype and (moved <= 0.5 + rounding).all()
    assert (moved >= 0.5 - rounding).all(), 'there is a gradient, so the whole of eps is used'


@pytest.mark.parametrize('gap', [20, 50, 60, 80])
def test_l2_fgsm_on_a_very_sure_classifier(gap):
    gen = torch.Generator().manual_seed(0)
    x = torch.full((6, 3, 32, 32), 0.5)
    w = torch.randn(10, 3072, generator=gen)
    first = torch.eye(10)[0]

    def logits(x):
        return 0.01 * x.flatten(1) @ w.T + gap * first

    for loss in (lambda x: logits(x).softmax(1)[:, 1:].sum(1)), (lambda x: entropy(logits(x))):
        moved = (fgsm(x, loss, 0.5, norm='l2') - x).flatten(1).norm(dim=1)
        silent = no_gradient(x, loss)
        assert torch.allclose(moved[~silent], torch.tensor(0.5), atol=1e-4) and (moved[silent] == 0).all()


# dtypes, modes, networks that write on their input

EVERY = [*ATTACKS, PGD(0.5, 3, restarts=2, norm='l2')]


@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_images_keep_their_dtype_whatever_the_loss_has(dtype, kind):
    x = torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    for attack in EVERY:
        adv = attack(x, lambda x: (x.to(kind) - 0.3).square().flatten(1).sum(1))
        assert adv.dtype == dtype and adv.isfinite().all(), attack


@pytest.mark.parametrize('mode', [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_grad_mode_does_not_matter(mode, digits, energy):
    gen = torch.Generator()
    for attack in [*EVERY, FGSM(0.1, vary=True)]:
        want = attack(digits, energy, generator=gen.manual_seed(0))
        with mode():
            x = digits * 1  # an inference tensor in inference mode
            got = attack(x, energy, generator=gen.manual_seed(0))
        assert torch.equal(got, want) and not got.is_inference() and not got.requires_grad, attack


def test_a_network_may_write_on_its_input(digits, net):
    def plain(x):
        return -net((x - 0.4).div(0.3).relu()).logsumexp(1)

    def writes(x):
        return -net(x.sub_(0.4).div_(0.3).relu_()).logsumexp(1)

    before = digits.clone()
    gen = torch.Generator()
    for attack in EVERY:
        want = attack(digits, plain, generator=gen.manual_seed(0))
        assert torch.equal(attack(digits, writes, generator=gen.manual_seed(0)), want), attack
    assert torch.equal(no_gradient(digits, writes), no_gradient(digits, plain))
    assert torch.equal(digits, before)


# one eps an image


@pytest.mark.parametrize('n', [4, 6, 8])
def test_eps_of_one_number_an_image(n):
    "also where N equals the width (8), the height (6) or the channels (4)"
    x = torch.full((n, 4, 6, 8), 0.5)

    def loss(x):
        return x.flatten(1).sum(1)

    share = torch.linspace(0, 1, n)
    gen = torch.Generator()
    for norm in 'linf', 'l2':
        for attack in (
            lambda e: fgsm(x, loss, e, norm=norm),
            lambda e: pgd(x, loss, e, 3, norm=norm),
            lambda e: mifgsm(x, loss, e, 3, norm=norm),
            lambda e: apgd(x, loss, e, 4, norm=norm),
            lambda e: square(x, loss, e, 30, norm=norm, generator=gen.manual_seed(0)),
            lambda e: square(x, loss, e, 30, norm=norm, generator=gen.manual_seed(0), stop=90.0),
        ):
            d = (attack(0.2 * share) - x).flatten(1)
            far = d.abs().amax(1) if norm == 'linf' else d.norm(dim=1)
            assert (far <= 0.2 * share + 1e-6).all() and far[0] == 0 and (far[1:] > 0).all()
    assert (gaussian(x, 0.1 * share)[0] == x[0]).all()
    assert (FGSM(0.2 * share, vary=True)(x, loss)[0] == x[0]).all()
    slow = pgd(x, loss, 0.2, 3, alpha=0.01 * share, random_start=False)
    assert torch.allclose((slow - x).abs().amax((1, 2, 3)), 0.03 * share, atol=1e-6)


@pytest.mark.parametrize('shape', [(8,), (6,), (5, 1), (6, 8), (5, 5, 1, 1), (2, 5, 4, 6, 8)])
def test_refuses_an_eps_of_no_clear_shape(shape):
    x = torch.full((5, 4, 6, 8), 0.5)

    def loss(x):
        return x.flatten(1).sum(1)

    for kw in (
        dict(eps=torch.full(shape, 0.1)),
        dict(eps=0.1, lo=torch.zeros(shape)),
        dict(eps=0.1, hi=torch.ones(shape)),
    ):
        with pytest.raises(ValueError, match='no clear meaning.*one an image'):
            fgsm(x, loss, **kw)
    with pytest.raises(ValueError, match='alpha of shape'):
        pgd(x, loss, 0.1, 2, alpha=torch.full(shape, 0.1))


def test_an_eps_a_channel_and_a_radius():
    x = torch.full((3, 3, 4, 4), 0.5)  # as many images as channels

    def loss(x):
        return x.flatten(1).sum(1)

    for shape in (3, 1, 1), (1, 3, 1, 1):
        d = (fgsm(x, loss, torch.tensor([0, 0.1, 0.2]).view(shape)) - x).abs().amax((0, 2, 3))
        assert torch.allclose(d, torch.tensor([0, 0.1, 0.2]))
        with pytest.raises(ValueError, match='a radius'):
            fgsm(x, loss, torch.rand(shape), norm='l2')
    with pytest.raises(ValueError, match='no clear meaning'):
        fgsm(torch.rand(5, 5), loss, torch.rand(5))
    assert fgsm(torch.full((4, 5), 0.5), loss, torch.full((5,), 0.1)).shape == (4, 5)


# Square


@pytest.mark.parametrize('shape', [(1, 1), (2, 2), (3, 3), (4, 9), (9, 5), (12, 12)])
@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_square_on_images_of_any_shape(norm, shape):
    x = torch.rand(3, 2, *shape, generator=torch.Generator().manual_seed(0))

    def loss(x):
        return x.flatten(1).sum(1)

    adv = square(x, loss, 0.2, 60, norm=norm, generator=torch.Generator().manual_seed(0))
    d = (adv - x).flatten(1)
    assert (d.abs().amax(1) if norm == 'linf' else d.norm(dim=1)).max() <= 0.2 + 1e-5
    assert (loss(adv) < loss(x)).all()


def test_square_stops_image_by_image(digits, energy):
    start, asked = energy(digits).detach(), []
    stop = start.quantile(0.3).item()

    def counted(x):
        asked.append(len(x))
        return energy(x).detach()

    for norm, eps in ('linf', 0.15), ('l2', 1.5):
        asked.clear()
        adv = square(digits, counted, eps, 150, norm=norm, stop=stop)
        value = energy(adv)
        done = start < stop
        assert torch.equal(adv[done], digits[done]), 'what is below from the start is left alone'
        assert (value <= start).all() and sum(asked) < 151 * len(digits) / 2
        assert asked == sorted(asked, reverse=True)
    assert Square(0.1, stop=1.0) != Square(0.1) and repr(Square(0.1, stop=1.0)) == repr(Square(0.1))


def trained(net, x, y, steps=200):
    torch.manual_seed(0)
    for layer in net.modules():
        if hasattr(layer, 'reset_parameters'):
            layer.reset_parameters()
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(steps):
        i = torch.randint(len(x), (64,))
        opt.zero_grad()
        F.cross_entropy(net(x[i]), y[i]).backward()
        opt.step()
    return net.eval()


@pytest.fixture(scope='module')
def networks():
    "Two small networks that tell digits of 16x16 apart, and forty digits that they have not seen"
    data = load_digits()
    x = F.interpolate(torch.tensor(data.images / 16, dtype=torch.float32)[:, None], scale_factor=2)
    y = torch.tensor(data.target)
    layers = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 10)]
    plain = nn.Sequential(*layers)
    nets = [trained(o, x[:1500], y[:1500]) for o in (plain, small_cnn(1, 10))]
    return nets, x[1500:1540], y[1500:1540]


def margin(net, y):
    "By how much the logit of class `y` leads: what Square makes smaller"

    def loss(x):
        logits = net(x)
        own = logits.gather(1, y[:, None])[:, 0]
        return own - logits.scatter(1, y[:, None], -1e9).max(1).values

    return loss


@pytest.mark.parametrize('which', [0, 1])
def test_square_in_l2_is_level_with_the_published_one(networks, which):
    torchattacks = pytest.importorskip('torchattacks')
    nets, x, y = networks
    net, n_queries = nets[which], 200
    loss = margin(net, y)
    ours = square(x, loss, 1.0, n_queries, norm='l2', generator=torch.Generator().manual_seed(0))
    peer = torchattacks.Square(net, norm='L2', eps=1.0, n_queries=n_queries)
    peer.init_hyperparam(x)
    peer.margin_and_loss = lambda x, y: (torch.ones(len(x)), loss(x).detach())  # never done, as ours
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = peer.attack_single_run(x, y)[1]
    with torch.no_grad():
        gap = loss(ours) - loss(theirs)
    assert gap.mean() < 3 * gap.std() / len(x) ** 0.5
    assert (ours - x).flatten(1).norm(dim=1).max() <= 1 + 1e-5


@pytest.mark.parametrize('steps', [5, 20])
def test_pgd_in_l2_starts_no_worse_than_at_the_image(networks, steps):
    nets, x, y = networks
    for net in nets:
        for sign in 1, -1:

            def loss(x):
                return sign * net(x).logsumexp(1)

            def end(**kw):
                return loss(pgd(x, loss, 1.0, steps, norm='l2', **kw)).mean().item()

            at_image = end(random_start=False)
            won = loss(x).mean().item() - at_image
            started = [end(generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
            assert sum(started) / 2 < at_image + 0.005 * won


def test_scores_and_attacks_come_without_fastai():
    code = 'import aoe_nb.energy, aoe_nb.attack, sys; sys.exit("fastai" in sys.modules or "pandas" in sys.modules)'
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)


class Merges(nn.Linear):
    "Adds a part to its weights in eval mode and takes it out again for training, as LoRA does"

    merged = False

    def train(self, mode=True):
        if mode == self.merged:
            self.weight.data += -1 if mode else 1
            self.merged = not mode
        return super().train(mode)


@pytest.mark.parametrize('frozen', [(), (1,), (1, 2), (0, 3)])
def test_modules_that_change_in_eval_mode_change_back(frozen):
    net = nn.Sequential(Merges(2, 2), nn.Sequential(Merges(2, 2), nn.Dropout()), nn.Dropout(), nn.Linear(2, 2))
    for i in frozen:
        net[i].eval()
    net[1][1].training = True
    layers = net[0], net[1][0]

    def state():
        return [m.training for m in net.modules()], [m.merged for m in layers]

    before = state()
    with pytest.raises(KeyboardInterrupt), eval_mode(net):
        assert not any(m.training for m in net.modules()) and all(m.merged for m in layers)
        raise KeyboardInterrupt
    assert state() == before


def test_checks_that_are_put_off_keep_no_image():
    later = Later()
    x = torch.rand(4, 1, 8, 8)
    with later:
        pgd(x, lambda x: x.square().sum((1, 2, 3)), 0.1, 3, keep_best=True)
    kept = [detail for _, _, details in later.noted for detail in details]
    assert len(later.noted) == len(later.fine) == 6 and all(o.numel() == 1 for o in kept)
    held = [cell.cell_contents for _, error, _ in later.noted for cell in error.__closure__ or ()]
    assert not any(isinstance(o, torch.Tensor) for o in held)
    later.look()
    with pytest.raises(ValueError, match='outside'), later:
        fgsm(x, lambda x: (_ for _ in ()).throw(ValueError('outside')), 0.1)
    assert later.noted == []
