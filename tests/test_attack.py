"What the attacks promise for any image (range, distance, dtype, random state), and what they refuse."

import pytest, torch
from hypothesis import given, settings, strategies as st
from sklearn.datasets import load_digits
from torch import nn
from aoe_nb.attack import APGD, FGSM, MIFGSM, PGD, Gaussian, RandomSign, Square, apgd, fgsm, mifgsm, pgd, square

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
