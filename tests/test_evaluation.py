"The bench and its cache: what makes a new file, what has no name, how often the model is called."

import importlib, sys, warnings
from functools import partial, wraps
import numpy as np, pandas as pd, pytest, torch
import fastai.callback.all  # noqa: F401 (brings `no_bar`)
from aoe_nb.attack import FGSM, PGD
from aoe_nb.cache import Unnamed, fingerprint, kept
from aoe_nb.data import Images, inliers, unseen
from aoe_nb.energy import energy, msp
from aoe_nb.evaluation import Bench, on_input
from aoe_nb.loaders import Pixels
from aoe_nb.models import small_cnn
from fastai.learner import Learner
from fastai.torch_core import TensorImage
from fasttransform import Transform


@pytest.fixture(scope='module')
def learn():
    torch.manual_seed(0)
    dls = inliers('digits7').dls(64, valid=inliers('digits7', 'test'), normalize=([0.3], [0.37]))
    learn = Learner(dls, small_cnn(1, dls.c))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(5, 5e-3)
    return learn


@pytest.fixture(scope='module')
def sets():
    return {name: o.take(slice(0, 100)) for name, o in unseen('all', id='digits7').items()}


@pytest.fixture
def some(sets):
    return sets['flower']


# the cache


def files(folder):
    return sorted(folder.glob('*.npy'))


@pytest.fixture
def known(learn, some, tmp_path):
    "A folder with the scores of one attack, the arguments that gave them, and the scores"
    args = dict(attack=PGD(8 / 255, 3), cache=tmp_path)
    return tmp_path, args, learn.ood_scores(some, **args)


def is_new(learn, known, source, **changed):
    "Whether a call with something `changed` makes one new file"
    folder, args, _ = known
    n = len(files(folder))
    learn.ood_scores(source, **(args | changed))
    return len(files(folder)) == n + 1


def test_the_same_call_reads(learn, some, known):
    folder, args, scores = known
    assert len(files(folder)) == 1 and not is_new(learn, known, some)
    assert torch.equal(learn.ood_scores(some, **args), scores)
    assert torch.equal(learn.ood_scores(some, attack=args['attack']), scores)
    assert [o.suffix for o in folder.iterdir()] == ['.npy'], 'nothing half written is left'


def test_a_report_is_read_again(learn, sets, tmp_path):
    first, again = (learn.ood_report(sets, attack=PGD(8 / 255, 3), cache=tmp_path) for _ in range(2))
    n = len(files(tmp_path))
    assert first.equals(again) and first.attrs == again.attrs
    learn.ood_scores(sets['flower'], attack=PGD(8 / 255, 3), cache=tmp_path)
    assert len(files(tmp_path)) == n, 'its parts are the same files'


changes = dict(
    attack=dict(attack=PGD(8 / 255, 4)),
    step=dict(attack=PGD(8 / 255, 3, alpha=0.01)),
    seed=dict(seed=1),
    direction=dict(sign=-1),
    score=dict(score='msp'),
    T=dict(score=partial(energy, T=2.0)),
    batch=dict(bs=50),
)


@pytest.mark.parametrize('what', changes)
def test_every_argument_makes_a_new_file(learn, some, known, what):
    assert is_new(learn, known, some, **changes[what])
    assert not is_new(learn, known, some, **changes[what])


def test_two_temperatures_are_two_scores(learn, some, known):
    assert all(is_new(learn, known, some, score=partial(energy, T=t)) for t in (2.0, 3.0))


def test_one_grey_level_makes_a_new_file(learn, some, known):
    x = some.x.clone()
    x[0, 0, 0, 0] += 1
    assert is_new(learn, known, x)


def test_precision_makes_a_new_file(learn, some, known):
    assert is_new(learn, known, some.x[:4], attack=FGSM(8 / 255))
    with torch.autocast('cpu', torch.bfloat16):
        assert is_new(learn, known, some.x[:4], attack=FGSM(8 / 255))


@pytest.mark.parametrize('what', ['weight', 'buffer'])
def test_weights_and_buffers_make_a_new_file(learn, some, known, what):
    o = learn.model[0].weight if what == 'weight' else learn.model[1].running_mean
    old = o.detach().clone()
    try:
        with torch.no_grad():
            o.mul_(1.001)
        assert is_new(learn, known, some)
    finally:
        with torch.no_grad():
            o.copy_(old)
    assert not is_new(learn, known, some), 'all is as it was, and known'


@pytest.mark.parametrize('what', ['a setting of a layer', 'normalisation'])
def test_settings_make_a_new_file(learn, some, known, what):
    o, name = (learn.model[1], 'eps') if what.startswith('a') else (Pixels(learn.dls.train).norm, 'std')
    old = getattr(o, name)
    try:
        setattr(o, name, old * 2)
        assert is_new(learn, known, some)
    finally:
        setattr(o, name, old)
    assert not is_new(learn, known, some)


class Method:
    def score(self, logits):
        return energy(logits)


@pytest.mark.parametrize('score', [lambda o: energy(o), Method().score, on_input(lambda m, x: energy(m(x)))])
def test_what_has_no_name_is_computed_with_a_warning(learn, some, tmp_path, score):
    with pytest.warns(UserWarning, match='not cached') as said:
        learn.ood_scores(some, score=score, cache=tmp_path)
    assert not list(tmp_path.iterdir())
    assert said[0].filename == __file__, 'the warning points at the call'


def test_a_model_with_a_hook_has_no_name(learn, some, tmp_path):
    hook = learn.model.register_forward_hook(lambda m, i, o: o)
    try:
        with pytest.warns(UserWarning, match='not cached'):
            learn.ood_scores(some, cache=tmp_path)
    finally:
        hook.remove()
    assert not list(tmp_path.iterdir())


def test_an_identity_names_a_score_of_inputs(learn, some, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for name in 'a', 'b', 'a':
            score = on_input(lambda m, x: energy(m(x)), identity=name)
            learn.ood_scores(some, score, cache=tmp_path)
    assert len(files(tmp_path)) == 2


def test_a_loader_that_shuffles_is_filed_under_what_was_seen(learn, tmp_path):
    shuffled = inliers('digits7', 'test').dl(64, shuffle=True)
    a, b = (learn.ood_scores(shuffled, cache=tmp_path) for _ in range(2))
    assert not torch.equal(a, b) and torch.allclose(a.sort()[0], b.sort()[0], atol=1e-4)


def test_a_killed_run_leaves_no_file(tmp_path):
    def batches():
        return [(torch.zeros(2),)]

    def killed(batches):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path, 'killed', batches, killed)
    assert not list(tmp_path.iterdir())


def test_a_part_called_identity_does_not_stand_for_its_layer(monkeypatch):
    class Block(torch.nn.Module):
        def __init__(self, identity):
            super().__init__()
            self.identity = identity
            self.layer = torch.nn.Linear(2, 2)

    Block.__module__ = 'torch.nn.modules.linear'
    Block.__qualname__ = 'Block'
    monkeypatch.setattr(torch.nn.modules.linear, 'Block', Block, raising=False)
    assert len({fingerprint(Block(o)) for o in (None, None, torch.nn.BatchNorm1d(2))}) == 3


CODE = dict(
    deep='def f(x): return x.sum(1)',
    helper='from deep import f\nclass Base:\n    scale = 1.0\n    def at(self, x): return x*self.scale',
    mine="""
import torch
from functools import wraps
import deep, helper
from torch import logsumexp
from torch.nn import Module
T = 1.0
def twice(f):
    @wraps(f)
    def g(x, n=2): return n*f(x)
    return g
def score(x): return T*helper.f(x[..., 0:2])
def inside(x):
    from deep import f
    return [f(o) for o in x]
@torch.no_grad()
@twice
def decorated(x): return T*logsumexp(x, 1)
class Net(helper.Base, Module):
    @property
    def half(self): return T/2
    def forward(self, x): return self.at(x)*self.half
""",
)


@pytest.fixture
def own(tmp_path, monkeypatch):
    "A user's own modules: `own(name, old, new)` edits one, `own(name)` loads it again, and both return `mine`"
    folder = tmp_path / 'own'
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)

    def edit(name, old=None, new=None):
        if old is None:
            importlib.reload(sys.modules[name])
        else:
            path = folder / f'{name}.py'
            text = path.read_text()
            assert old in text
            path.write_text(text.replace(old, new))
        return sys.modules['mine']

    for name, code in CODE.items():
        (folder / f'{name}.py').write_text(code)
    importlib.import_module('mine')
    yield edit
    for name in CODE:
        del sys.modules[name]


READ = dict(
    score=lambda o: o.score,
    inside=lambda o: o.inside,
    decorated=lambda o: o.decorated,
    model=lambda o: o.Net(),
    partial=lambda o: partial(o.score),
)


@pytest.mark.parametrize('what', READ)
def test_what_own_code_reads_is_part_of_its_name(own, what):
    get = READ[what]
    first = fingerprint(get(sys.modules['mine']))
    for name, old, new in ('mine', 'T = 1.0', 'T = 2.0'), ('helper', '1.0', '1.5'), ('deep', 'x.sum', '-x.sum'):
        module = own(name, old, new)
        assert fingerprint(get(module)) == first, 'what was loaded is as it was'
    module.T = 2.0
    seen = [first, fingerprint(get(module))]
    for name in 'mine', 'deep', 'helper':
        own(name)
        seen.append(fingerprint(get(own('mine'))))
    new = [a != b for a, b in zip(seen, seen[1:])]
    assert new == dict(
        inside=[False, True, True, False],
        decorated=[True, True, False, False],
        model=[True, True, False, True],
    ).get(what, [True, True, False, True])


def test_what_takes_the_name_of_another_has_none(learn, some, tmp_path):
    @wraps(energy)
    def flipped(logits):
        return -energy(logits)

    learn.ood_scores(some, cache=tmp_path)
    with pytest.warns(UserWarning, match='not cached'):
        got = learn.ood_scores(some, flipped, cache=tmp_path)
    assert torch.equal(got, learn.ood_scores(some, flipped))


def test_a_score_that_reads_what_has_no_name_is_computed(own):
    module = own('mine', 'T = 1.0', 'T = object()')
    assert fingerprint(module.score)
    with pytest.raises(Unnamed, match='a object'):
        fingerprint(own('mine').score)


# the bench


def test_learner_methods_are_the_bench(learn, sets):
    attack = PGD(4 / 255, 2)
    bench = Bench(learn, sets, 'msp', seed=3, bs=50)
    kw = dict(seed=3, bs=50)
    same = pd.testing.assert_frame_equal
    report = learn.ood_report(sets, 'msp', attack, 'both', n_boot=5, **kw)
    same(bench.report(attack, 'both', 5), report)
    assert bench.report(attack, 'both', 5).attrs == report.attrs
    same(bench.curve([0, 4 / 255], attack, 'id'), learn.robustness_curve(sets, [0, 4 / 255], attack, 'msp', 'id', **kw))
    same(bench.frame(attack), learn.score_frame(sets, 'msp', attack, **kw))
    table = dict(energy=energy, msp=msp), {'none': None, 'PGD': attack}
    same(bench.table(*table, 'FPR95'), learn.attack_table(sets, *table, 'FPR95', **kw))
    o = sets['flower']
    assert torch.equal(bench.scores(o, attack, -1), learn.ood_scores(o, 'msp', attack, -1, **kw))
    assert torch.equal(bench.attacked(o, attack), learn.attacked_images(o, attack, 'msp', **kw))


def n_images(learn, f):
    "How many images pass the model during `f`"
    seen = []
    hook = learn.model.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    try:
        f()
    finally:
        hook.remove()
    return sum(seen)


def test_untouched_inliers_are_scored_once(learn, some):
    sets = dict(some=some)
    n_in, n_out = len(learn.dls.valid_ds), len(some)

    def curve(attacked):
        learn.robustness_curve(sets, [0, 0.01, 0.02], FGSM, attacked=attacked)

    assert n_images(learn, lambda: curve('ood')) == n_in + 5 * n_out, 'an attack step is a second pass'
    assert n_images(learn, lambda: curve('both')) == 5 * n_in + 5 * n_out
    attacks = {'none': None, 'FGSM': FGSM(0.01), 'again': FGSM(0.02)}

    def table():
        learn.attack_table(sets, dict(a=energy, b='msp'), attacks)

    assert n_images(learn, table) == 2 * (n_in + 5 * n_out), 'once a score'
    bench = Bench(learn, sets)
    bench.metrics()
    assert n_images(learn, lambda: bench.metrics(FGSM(0.01))) == 2 * n_out, 'the bench remembers'


def test_bench_scores_a_source_without_sets(learn, some):
    assert torch.equal(Bench(learn).scores(some), learn.ood_scores(some))
    with pytest.raises(TypeError, match='sets must be a dict'):
        Bench(learn).report()
    with pytest.raises(ValueError, match='no images'):
        Bench(learn).scores(some.x[:0])


def test_masking_of_the_bench_says_what_the_learner_warns_of(learn, some):
    cut = on_input(lambda m, x: energy(m(x).detach()))
    quiet = Bench(learn, None, cut).masking(some, steps=2, n_queries=5)
    with pytest.warns(UserWarning, match='masked') as said:
        loud = learn.masking_check(some, cut, steps=2, n_queries=5)
    pd.testing.assert_frame_equal(quiet, loud)
    said = [w for w in said if 'masked' in str(w.message)]
    assert len(said) == loud.suspicious.sum()
    assert said[0].filename == __file__, 'the warning points at the call'
    assert np.isclose(loud.value['images without gradient'], 1)


@pytest.mark.parametrize('name', ['inliers', 'mean near', 'mean natural'])
def test_a_set_by_the_name_of_another_row_is_refused(learn, some, name):
    for report in learn.ood_report, learn.score_frame:
        with pytest.raises(ValueError, match=f'may be called .{name}'):
            report({name: some})


def test_a_set_without_images_is_named(learn, some):
    with pytest.raises(ValueError, match='no images in nothing'):
        learn.ood_report({'some': some, 'nothing': some.take(slice(0, 0))})


# what a learner does to images in validation, it does to all


class Changed(Transform):
    "A transform of batches, not for training alone; by default before whole numbers become floats, as fastai has it"

    def __init__(self, f, order=0):
        self.f = f
        self.order = order

    def encodes(self, x: TensorImage):
        return self.f(x)


orders = dict(
    whole=Changed(lambda x: x // 2),
    pixels=Changed(torch.sqrt, 20),
    inputs=Changed(lambda x: x.clamp(max=0.5), 100),
)


def changing(step, n=40):
    "A learner with that transform, and its validation images"
    x = torch.randint(256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = Images(x, torch.arange(n) % 3, ['a', 'b', 'c'])
    torch.manual_seed(0)
    dls = images.dls(8, valid=images, batch_tfms=step, normalize=([0.5], [0.4]))
    return Learner(dls, small_cnn(1, 3, 4)), images


@pytest.mark.parametrize('when', orders)
def test_a_transform_of_validation_reaches_images_of_any_form(when):
    learn, images = changing(orders[when])
    want = learn.ood_scores(learn.dls.valid)
    loader = torch.utils.data.DataLoader(images.x, 16)
    for source in images, images.x, [o for o in images.x.float() / 255], loader:
        torch.testing.assert_close(learn.ood_scores(source), want, atol=1e-4, rtol=0)
    untouched = Learner(images.dls(8, valid=images, normalize=([0.5], [0.4])), learn.model)
    assert not torch.allclose(untouched.ood_scores(images), want, atol=1e-3)


def test_outliers_are_whole_numbers_where_inliers_are():
    learn, images = changing(Changed(lambda x: x // 2))
    pixels = Pixels(learn.dls.train)
    x = images.x[:5].float() / 255
    assert torch.equal(pixels.through(x, 0), (images.x[:5] // 2).float() / 255)


# small things that a report must not trip over


def in_place(logits):
    logits /= 1000
    return -logits.logsumexp(1)


def test_a_score_that_works_in_place_changes_nothing_else(learn, sets):
    usual = learn.id_report()
    report = learn.ood_report(sets, score=in_place)
    assert report.attrs['id'] == pytest.approx(usual)


def test_no_class_is_not_the_last_class():
    learn, images = changing(Changed(lambda x: x))
    images.y[::2] = -1
    for classes in images.classes, None:
        with pytest.raises(ValueError, match='labels from -1'):
            learn.id_report(Images(images.x, images.y, classes))


def test_a_table_asks_a_generator_once(learn, some):
    "Of the sets and of the inliers"
    known = learn.dls.valid.dataset
    batches = ((known.x[i : i + 50], known.y[i : i + 50]) for i in (0, 50))
    sets = dict(a=(x for x in some.x.split(40)))
    table = learn.attack_table(sets, dict(energy=energy, msp=msp), dict(none=None), inliers=batches)
    assert table.none.notna().all()


def test_nothing_to_attack_and_nothing_to_train(learn, some):
    with pytest.raises(ValueError, match='no images to attack'):
        learn.attacked_images(some.take(slice(0, 0)), FGSM(0.1))
    flat = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d((1, 7)), torch.nn.Flatten())
    assert len(Learner(learn.dls, flat).ood_scores(some)) == len(some)
