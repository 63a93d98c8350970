"A quiet stream seldom alarms, whatever its scores; a change is found, early or late; a monitor survives a restart."

import itertools
import json
import math
import time
import numpy as np, pytest, torch
from scipy import integrate, stats
from aoe_nb import drift
from aoe_nb.drift import Monitor

DISTRIBUTIONS = dict(
    normal=lambda r, n: r.normal(size=n),
    heavy=lambda r, n: r.standard_cauchy(n),
    ties=lambda r, n: r.poisson(1, n),
    constant=lambda r, n: np.full(n, 3.0),
    broken=lambda r, n: np.where(r.random(n) < 0.2, np.nan, r.normal(size=n)),
)


@pytest.fixture
def plain(monkeypatch):
    "All gamblers begin with the first input: the product without the mixture over beginnings"
    monkeypatch.setattr(drift, '_waiting', lambda t: np.where(t == 0, 1.0, 1e-200 / (t + 1)))


def one_stream(sample, n, length, seed, alarm=0.01):
    r = np.random.default_rng(seed)
    m = Monitor(sample(r, n), alarm, seed=seed)
    m.update(sample(r, length))
    return m


# The promise


@pytest.mark.parametrize('n', [50, 1000])
@pytest.mark.parametrize('name', DISTRIBUTIONS)
def test_false_alarms_stay_within_the_bound(name, n):
    "300 streams of 2,000 inputs; at an alarm of 5% at most 15 on average, more than 26 once in 300 tests"
    alarms = sum(one_stream(DISTRIBUTIONS[name], n, 2000, seed, 0.05).alarmed for seed in range(300))
    assert alarms <= stats.binom.ppf(0.997, 300, 0.05)


def test_a_strict_alarm_is_kept_too():
    alarms = sum(one_stream(DISTRIBUTIONS['normal'], 100, 2000, 1000 + seed).alarmed for seed in range(400))
    assert alarms <= stats.binom.ppf(0.997, 400, 0.01)


@pytest.mark.parametrize('name', DISTRIBUTIONS)
@pytest.mark.parametrize('n', [1, 50])
def test_p_values_are_uniform_and_independent(name, n):
    "Of many short streams, so that the same place in each is tested too"
    p_above, p_below = [], []
    for seed in range(400):
        r = np.random.default_rng(seed)
        above, below, _ = drift._rank(DISTRIBUTIONS[name](r, 20).astype(float), np.sort(DISTRIBUTIONS[name](r, n)), r)
        p_above.append(above)
        p_below.append(below)
    p = np.array(p_above)
    for values in (p.ravel(), np.ravel(p_below), p[:, 0], p[:, -1], p.max(1) ** 20):
        assert stats.kstest(values, 'uniform').pvalue > 1e-3
    assert abs(stats.spearmanr(p[:, :-1].ravel(), p[:, 1:].ravel())[0]) < 4 / p[:, 1:].size ** 0.5


def test_every_bet_is_fair():
    for i in range(18):
        # p = u**20 takes the pole at 0 away, and its mirror image the one at 1
        def low(u, i=i):
            p = np.array([u**20 / 2])
            return np.exp(drift._log_bets(p, 1 - p)[0, i]) * 10 * u**19

        def high(u, i=i):
            p = np.array([u**20 / 2])
            return np.exp(drift._log_bets(1 - p, p)[0, i]) * 10 * u**19

        gain = integrate.quad(low, 1e-9, 1)[0] + integrate.quad(high, 1e-9, 1)[0]
        assert gain == pytest.approx(1, abs=1e-6)


def test_the_martingale_has_mean_one_over_all_orders(monkeypatch):
    "Exactly: each bet is replaced by its mean over the random number, which the place among all scores gives"
    n, length = 2, 4

    def mean_bets(p_above, p_below):
        total = n + 1 + np.arange(len(p_above))
        rows = []
        for place, k in zip(np.floor(p_above * total), total):
            strange = k * (((place + 1) / k) ** drift._eps - (place / k) ** drift._eps)
            familiar = k * ((1 - place / k) ** drift._eps - (1 - (place + 1) / k) ** drift._eps)
            rows.append(np.r_[strange, familiar])
        return np.log(rows)

    monkeypatch.setattr(drift, '_log_bets', mean_bets)
    money = []
    for order in itertools.permutations(range(n + length)):
        m = Monitor(order[:n])
        m.update(order[n:])
        money.append(10 ** np.array(m.history))
    assert np.mean(money, 0) == pytest.approx(np.ones(length), abs=1e-12)
    assert np.std(money, 0).min() > 0.01


# The use


def delay(quiet, share, shift, seed, n=1000, length=3000):
    r = np.random.default_rng(seed)
    m = Monitor(r.normal(size=n), seed=seed)
    m.update(r.normal(size=quiet))
    m.update(r.normal(size=length) + shift * (r.random(length) < share))
    return m.alarmed_at - quiet if m.alarmed else math.inf


def median_delay(*args, **kwargs):
    return np.median([delay(*args, seed, **kwargs) for seed in range(100, 115)])


@pytest.mark.parametrize(
    'share, shift, soon',
    [(1, 2, 20), (1, -2, 20), (0.1, 3, 400), (0.1, 6, 250), (1, 0.3, 1000)],
)
def test_a_change_is_found_late_nearly_as_soon_as_early(share, shift, soon):
    early, late = median_delay(100, share, shift), median_delay(5000, share, shift)
    assert 0 < early < soon and 0 < late < soon
    assert late < 3 * early


def test_the_plain_product_finds_it_much_later(plain):
    assert median_delay(5000, 1, 2) > 75
    assert median_delay(5000, 0.1, 3) > 700


def test_few_calibration_scores_find_it_too():
    assert median_delay(100, 1, 3, n=50) < 40
    assert median_delay(5000, 0.1, 3, n=50) < 500


def test_a_stream_of_nan_alarms():
    m = Monitor(np.random.default_rng(0).normal(size=500))
    m.update(np.full(50, np.nan))
    assert m.alarmed and m.alarmed_at < 10


def test_an_alarm_stays_and_says_when():
    m = Monitor(np.random.default_rng(0).normal(size=500))
    assert m.alarmed_at is None and not m.alarmed
    states = [m.update(9.0) for _ in range(30)]
    assert states.index(True) + 1 == m.alarmed_at
    assert m.history[m.alarmed_at - 1] >= 2 > max(m.history[: m.alarmed_at - 1])
    m.update(np.random.default_rng(1).normal(size=20_000))
    assert m.alarmed and m.history[-1] < max(m.history)
    assert f'alarm at input {m.alarmed_at}' in repr(m) and '0.01' in repr(m)


# The bookkeeping


def test_blocks_and_restarts_change_nothing(tmp_path):
    r = np.random.default_rng(0)
    known, stream = r.poisson(3, 40).astype(float), r.poisson(3.5, 600).astype(float)
    stream[r.random(600) < 0.05] = np.nan
    stream[r.random(600) < 0.05] = np.inf
    known[0] = np.nan
    whole = Monitor(known)
    whole.update(stream)
    for size in (1, 7, 599):
        m = Monitor(known[r.permutation(40)])
        for i in range(0, 600, size):
            m.update(torch.tensor(stream[i : i + size]))
            if i % 50 == 0:
                m = Monitor(known).load_state_dict(json.loads(json.dumps(m.state_dict())))
        assert json.dumps(m.state_dict()) == json.dumps(whole.state_dict())
    torch.save(whole.state_dict(), tmp_path / 'state.pt')
    m = Monitor(known).load_state_dict(torch.load(tmp_path / 'state.pt', weights_only=True))
    assert json.dumps(m.state_dict()) == json.dumps(whole.state_dict())


def test_a_state_is_a_copy():
    m = Monitor([1.0, 2.0])
    m.update([3.0, 1.5])
    state = m.state_dict()
    before = json.dumps(state)
    other = Monitor([2.0, 1.0]).load_state_dict(state)
    m.update([5.0] * 9)
    other.update([0.0] * 9)
    assert json.dumps(state) == before and other.history != m.history


def test_the_order_of_the_calibration_scores_does_not_matter_but_the_seed_does():
    r = np.random.default_rng(0)
    known, stream = r.normal(size=300), r.normal(size=300)
    runs = []
    for scores, seed in ((known, 0), (known[::-1], 0), (known, 1)):
        m = Monitor(scores, seed=seed)
        m.update(stream)
        runs.append(m.history)
    assert runs[0] == runs[1] != runs[2]


def test_only_the_order_of_scores_counts():
    r = np.random.default_rng(0)
    known, stream = r.normal(size=100), r.normal(size=300)
    m, other = Monitor(known), Monitor(np.exp(known))
    m.update(stream)
    other.update(np.exp(stream))
    assert m.history == other.history


def test_half_precision_and_what_needs_a_gradient_are_taken():
    m = Monitor(torch.randn(50, dtype=torch.bfloat16))
    m.update(torch.randn(8, requires_grad=True))
    m.update(torch.tensor(1.0))
    m.update(2)
    m.update([])
    assert m.seen == 10 and m.n == 50


def test_nothing_overflows_and_long_streams_take_seconds():
    m = Monitor(np.zeros(10))
    start = time.process_time()
    m.update(np.arange(1.0, 100_001))
    assert time.process_time() - start < 30
    assert np.isfinite(m.history).all() and m.history[-1] > 1000
    ax = m.plot()
    ax.figure.canvas.draw()
    assert any('alarm at input' in t.get_text() for t in ax.get_legend().get_texts())
    assert '000' in ax.get_yticklabels()[-1].get_text()


def test_a_monitor_that_has_seen_nothing_can_be_drawn():
    ax = Monitor([1.0]).plot()
    ax.figure.canvas.draw()
    assert '0 inputs seen' in repr(Monitor([1.0])) and 'no alarm' in repr(Monitor([1.0]))


@pytest.mark.parametrize('alarm', [0, 1, -0.1, 5, math.nan])
def test_an_impossible_alarm_is_refused(alarm):
    with pytest.raises(ValueError, match='between 0 and 1'):
        Monitor([1.0], alarm)


@pytest.mark.parametrize(
    'scores, why',
    [([], 'no calibration scores'), (np.zeros((3, 2)), 'a vector'), (None, 'real numbers'), (['a'], 'real numbers')],
)
def test_what_is_no_vector_of_scores_is_refused(scores, why):
    with pytest.raises(ValueError, match=why):
        Monitor(scores)
    if why != 'no calibration scores':
        m = Monitor([1.0])
        with pytest.raises(ValueError, match=why):
            m.update(scores)
        assert m.seen == 0
