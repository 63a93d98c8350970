"Normalising inliers and outliers in one go is the same as one after the other, in every layer that PyTorch has."

import copy
from contextlib import nullcontext
import pytest
import torch
from torch import nn
from aoe_nb.batchnorm import _apart, bn_inliers, norm_like

LAYERS = {
    '2d': (lambda: nn.BatchNorm2d(3), (10, 3, 5, 5)),
    'channels last': (lambda: nn.BatchNorm2d(3), (10, 3, 5, 5)),
    'no weights': (lambda: nn.BatchNorm2d(3, affine=False), (10, 3, 5, 5)),
    'features': (lambda: nn.BatchNorm1d(3), (10, 3)),
    '1d': (lambda: nn.BatchNorm1d(3), (10, 3, 7)),
    '3d, no averages': (lambda: nn.BatchNorm3d(3, track_running_stats=False), (10, 3, 2, 2, 2)),
    'cumulative': (lambda: nn.BatchNorm2d(3, momentum=None), (10, 3, 5, 5)),
}


def apart(layer, x, n, total, aux):
    return _apart(layer, x, n, total, lambda asked, outliers, inliers: norm_like(asked, outliers, inliers))


def numbers(way, layer, x, weights, cast=nullcontext):
    "What two training steps give: the output, all gradients, and the layer's averages"
    layer = copy.deepcopy(layer)
    for _ in range(2):
        given = x.clone().requires_grad_()
        with cast():
            y = way(layer, given, 4, 10, {})
        (y * weights).sum().backward()
    return y, [given.grad, *(p.grad for p in layer.parameters())], [b.clone() for b in layer.buffers()]


def agree(got, want, **kw):
    for a, b in zip([got[0], *got[1], *got[2]], [want[0], *want[1], *want[2]]):
        torch.testing.assert_close(a, b, **kw)


def layer_and_images(kind, dtype):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer, x, weights = make().to(dtype), torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    for p in layer.parameters():
        nn.init.normal_(p)
    if kind == 'channels last':
        x = x.contiguous(memory_format=torch.channels_last)
    return layer, x, weights


@pytest.mark.parametrize('kind', LAYERS)
def test_one_go_is_both_halves(kind):
    layer, x, weights = layer_and_images(kind, torch.float64)
    got = numbers(bn_inliers, layer, x, weights)
    agree(got, numbers(apart, layer, x, weights))


@pytest.mark.parametrize('kind', LAYERS)
def test_inliers_are_as_if_alone(kind):
    layer, x, _ = layer_and_images(kind, torch.float32)
    alone = copy.deepcopy(layer)
    want = alone(x[:4])
    got = bn_inliers(layer, x, 4, 10, {})[:4]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(layer.buffers(), alone.buffers()):
        assert torch.equal(a, b)


def test_layers_without_gradients_of_their_own():
    layer, x, weights = layer_and_images('2d', torch.float64)
    layer.requires_grad_(False)
    agree(numbers(bn_inliers, layer, x, weights)[:1] + ([], []), numbers(apart, layer, x, weights)[:1] + ([], []))
    given = [x.clone().requires_grad_() for _ in range(2)]
    for way, o in zip((bn_inliers, apart), given):
        first = torch.autograd.grad((way(layer, o, 4, 10, {}) ** 3 * weights).sum(), o, create_graph=True)[0]
        first.square().sum().backward()
    torch.testing.assert_close(given[0].grad, given[1].grad)


def test_half_precision_goes_the_long_way():
    layer, x, weights = layer_and_images('2d', torch.float32)

    def cast():
        return torch.autocast('cpu', torch.bfloat16)

    agree(numbers(bn_inliers, layer, x, weights, cast), numbers(apart, layer, x, weights, cast), rtol=0, atol=0)


def test_a_single_value_has_no_variance():
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        bn_inliers(nn.BatchNorm1d(3), torch.randn(4, 3), 1, 4, {})
