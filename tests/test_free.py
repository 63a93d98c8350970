"Outliers that stay, moved by the gradients of training: the right step, resumed, and out of nobody's way."

import copy, gc, re
from pathlib import Path
import pytest
import torch
from fastai.callback.schedule import SchedLin, ParamScheduler
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner
from fastai.vision.all import Callback, set_seed
from fastcore.test import test_eq as eq, test_fail as fails
from test_callbacks import CHINA, TRAIN, fit, new_learner
from test_resume import EPOCHS, fit as fit_epochs, new, whole_run
from aoe_nb.attack import FGSM, PGD
from aoe_nb.batchnorm import bn_ways
from aoe_nb.energy import uniform_ce
from aoe_nb.free import FreeFGSM, FreePGD

EPS = 16 / 255
ATTACKS = FreeFGSM(EPS), FreePGD(EPS, replays=3)


class Steps(Callback):
    "What the model was given of outliers, and how it was then"

    order = 1000
    run_valid = False

    def before_fit(self):
        self.seen = []

    def before_batch(self):
        cb = self.learn.outlier_exposure
        x = self.xb[0][cb.n :].detach().clone()
        self.seen.append((x, cb.staying.drawn.clone(), copy.deepcopy(self.model.state_dict())))


@pytest.mark.parametrize('bn', ['frozen', 'inliers'])
def test_each_step_goes_up_the_loss_of_the_one_before(bn):
    learn = new_learner(cbs=Steps())
    fit(learn.expose(CHINA, attack=FreeFGSM(EPS), bn=bn), 1, 0.05)
    seen = learn.steps.seen
    norm = learn.outlier_exposure.pixels
    for (x, drawn, state), (later, drawn_later, _) in zip(seen[:4], seen[1:5]):
        n_new = -(-len(x) // 4)
        assert torch.equal(drawn_later[n_new:], drawn[: len(x) - n_new])
        if bn == 'frozen':
            model = copy.deepcopy(learn.model)
            model.load_state_dict(state)
            given = x.clone().requires_grad_()
            grad = torch.autograd.grad(uniform_ce(model.eval()(given)).mean(), given)[0]
            want = (drawn + EPS * grad.sign()).clamp(0, 1)[: len(x) - n_new]
            alike = (norm.encode(want) - later[n_new:]).abs() < 1e-5
            assert alike.float().mean() > 0.999  # but for gradients that are zero within rounding


@pytest.mark.parametrize('attack', ATTACKS, ids=['fgsm', 'pgd'])
@pytest.mark.parametrize('bn', ['aux', 'frozen'])
def test_resumed_as_if_nothing_had_happened(attack, bn, tmp_path):
    want = whole_run(tmp_path / 'whole', attack=attack, bn=bn)
    set_seed(3)
    fit_epochs(new(tmp_path / 'cut', attack=attack, bn=bn), n=EPOCHS)
    set_seed(7)
    again = new(tmp_path / 'cut', attack=attack, bn=bn)
    again.load('m_1', with_opt=True)
    assert torch.equal(fit_epochs(again, start=2), want)


def test_settings_that_it_has_no_use_for():
    learn = new_learner()
    fails(lambda: learn.expose(CHINA, attack=FreeFGSM(EPS), frac=0.5), contains='set replays for another share')
    fails(lambda: learn.expose(CHINA, attack=FreePGD(EPS), score='msp'), contains='leave out score=')
    fails(lambda: FreePGD(EPS, replays=2.5), contains='whole number')


@pytest.mark.parametrize('attack', ATTACKS, ids=['fgsm', 'pgd'])
def test_it_stays_out_of_the_way(attack):
    learn = fit(new_learner().expose(CHINA, attack=attack), 1)
    queue = learn.outlier_exposure.staying
    before = queue.state_dict()
    learn.exposed(4)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(show_plot=False)
        learn.validate()
    for k, v in learn.outlier_exposure.staying.state_dict().items():
        assert torch.equal(v, before[k])
    assert not any(p.grad is not None and p.grad.isnan().any() for p in learn.model.parameters())


def test_beside_other_callbacks(tmp_path):
    schedule = ParamScheduler(dict(eps=SchedLin(0, EPS), lam=SchedLin(0, 1)))
    learn = new_learner(cbs=GradientAccumulation(64), path=tmp_path).to_bf16()
    fit(learn.expose(CHINA, attack=FreeFGSM(EPS)), 2, cbs=schedule)
    assert {'out_loss', 'energy_gap', 'moved', 'lam', 'eps'} <= set(learn.recorder.metric_names)
    learn.export('it.pkl')
    eq(load_learner(tmp_path / 'it.pkl').outlier_exposure.attack, FreeFGSM(EPS))
    again = copy.deepcopy(learn.outlier_exposure)
    eq(len(again.staying), 0)


def test_images_of_another_size_later():
    sizes = [8]
    learn = new_learner().expose(lambda n: torch.rand(n, 1, sizes[-1], sizes[-1]), attack=FreeFGSM(EPS))
    fit(learn, 1)
    sizes.append(16)
    x = torch.nn.functional.interpolate(TRAIN.x.float() / 255, 16)
    ds = torch.utils.data.TensorDataset(x[:64], TRAIN.y[:64])
    learn.dls = type(learn.dls)(*[torch.utils.data.DataLoader(ds, 32)] * 2)
    fit(learn, 1)
    eq(learn.outlier_exposure.staying.drawn.shape[1:], (1, 16, 16))


def test_one_step_costs_no_pass_of_the_model():
    "The network sees each batch once, where FGSM shows it the outliers once more"
    passes = {}
    for attack in FreeFGSM(EPS), FGSM(EPS):
        learn = new_learner().expose(CHINA, attack=attack)
        count = []
        learn.model.register_forward_hook(lambda *args: count.append(1))
        n = len(learn.dls.train)
        fit(learn, 1)
        passes[type(attack).__name__] = len(count) - len(learn.dls.valid) - n
    eq(passes['FGSM'] - passes['FreeFGSM'], n)


def resident():
    "Megabytes of this process, on Linux"
    status = Path('/proc/self/status').read_text()
    return int(re.search(r'VmRSS:\s+(\d+)', status)[1]) / 1024


class Memory(Callback):
    "Megabytes after a hundred steps, when all is warm, and after the last"

    order = 1000
    run_valid = False

    def before_fit(self):
        self.seen = []

    def after_batch(self):
        if self.train_iter in (100, 300):
            gc.collect()
            self.seen.append(resident())


WAYS = [(bn, attack) for bn in bn_ways for attack in (FGSM(EPS), FreeFGSM(EPS), PGD(EPS, 2), None)]


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs Linux')
@pytest.mark.parametrize(
    'bn,attack',
    [
        pytest.param(bn, attack, marks=[] if (bn, attack) == ('aux', FreeFGSM(EPS)) else pytest.mark.slow)
        for bn, attack in WAYS
    ],
    ids=[f'{bn}, {type(attack).__name__}' for bn, attack in WAYS],
)
def test_memory_stays_flat_over_300_steps(bn, attack):
    learn = new_learner(bs=8, cbs=Memory()).expose(CHINA, bn=bn, attack=attack)
    fit(learn, -(-300 // len(learn.dls.train)))
    warm, last = learn.memory.seen
    assert last < warm + 20
