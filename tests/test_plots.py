"Pictures leave nothing out without a word: many sets, infinite scores, NaN, names and groups that are missing."

import numpy as np, pandas as pd, pytest
import matplotlib.pyplot as plt
from aoe_nb.metrics import ood_metrics
from aoe_nb.plots import plot_gains, plot_reliability, plot_robustness, plot_roc, plot_scores, plot_step, plot_transfer

SETS = [f'set{i}' for i in range(16)]  # more than CIFAR-10 has, and than there are colours, styles or markers
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


@pytest.fixture
def frame():
    parts = [pd.DataFrame(dict(population=k, group='g', score=RNG.normal(size=30))) for k in ['inliers', *SETS]]
    return pd.concat(parts, ignore_index=True)


def curve():
    return pd.DataFrame([dict(set=k, eps_255=e, AUROC=0.9 - 0.1 * e) for k in SETS for e in (0, 1, 2)])


def gains(n=1):
    row = dict(metric='AUROC', diff=0.1, lo=0.05, hi=np.nan)  # one run has no interval
    return pd.DataFrame([dict(set=k, against=f'm{i}', **row) for k in SETS for i in range(n)])


def names(ax):
    return [t.get_text() for t in ax.get_legend().get_texts()]


@pytest.mark.parametrize('plot', [plot_scores, plot_roc, plot_step])
def test_every_population_is_named(plot, frame):
    text = names(plot(frame))
    for k in SETS:
        assert any(o.split(',')[0] == k for o in text), k


def test_every_line_is_drawn_and_no_two_are_alike():
    ax = plot_robustness(curve())
    assert names(ax) == SETS
    assert len({(o.get_color(), o.get_linestyle(), o.get_marker()) for o in ax.lines[:16]}) == 16


def test_many_names_do_not_cover_the_picture(frame):
    ax = plot_roc(frame)
    ax.figure.canvas.draw()
    box = ax.get_legend().get_window_extent()
    assert box.x0 >= ax.get_window_extent().x1 - 1 and box.x1 <= ax.figure.bbox.x1 + 1


@pytest.mark.parametrize('n', [1, 9])
def test_gains_of_many_sets_and_methods(n):
    ax = plot_gains(gains(n))
    assert [t.get_text() for t in ax.get_yticklabels()] == SETS and len(ax.lines) == n + 1
    ax.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.get_yticklabels()]
    assert all(b.y1 <= a.y0 for a, b in zip(boxes, boxes[1:])), 'labels overlap'


def test_numbers_of_a_large_heatmap_do_not_overlap():
    ax = plot_transfer(pd.DataFrame(RNG.random((16, 15)), index=SETS, columns=SETS[1:]))
    ax.figure.canvas.draw()
    assert len(ax.texts) == 240
    boxes = [t.get_window_extent() for t in ax.texts]
    assert all(a.x1 <= b.x0 for a, b in zip(boxes[:14], boxes[1:15]))


@pytest.mark.parametrize('value', [np.inf, -np.inf])
def test_infinite_scores_are_ranked_or_counted(value, frame):
    frame.loc[frame.index[-3:], 'score'] = value
    out = frame.score[frame.population == SETS[-1]]
    auroc = ood_metrics(frame.score[frame.population == 'inliers'], out)['AUROC']
    assert f'{SETS[-1]}, {auroc:.3f}' in names(plot_roc(frame))
    assert f'{SETS[-1]} (3 infinite)' in names(plot_scores(frame)) and SETS[0] in names(plot_scores(frame))
    with pytest.raises(ValueError, match='set15 in g has infinite scores'):
        plot_step(frame)


def test_infinite_inliers(frame):
    frame.loc[:1, 'score'] = [np.inf, -np.inf]
    assert 'inliers (2 infinite)' in names(plot_scores(frame)) and len(names(plot_roc(frame))) == 16
    frame.loc[frame.population == 'set3', 'score'] = np.inf
    assert 'set3 (30 infinite)' in names(plot_scores(frame)) and 'set3, 0.983' in names(plot_roc(frame))


BINS = pd.DataFrame(dict(confidence=[0.5, 0.9], accuracy=[0.6, 0.8], n=[3, 4]))
HOLES = [
    (plot_scores, 'score'),
    (plot_roc, 'score'),
    (plot_roc, 'population'),
    (plot_step, 'score'),
    (plot_step, 'group'),
    (plot_robustness, 'AUROC'),
    (plot_robustness, 'set'),
    (plot_gains, 'diff'),
    (plot_reliability, 'confidence'),
]


@pytest.mark.parametrize('plot,column', HOLES)
def test_holes_are_refused(plot, column, frame):
    tables = {plot_robustness: curve(), plot_gains: gains(), plot_reliability: BINS}
    df = tables.get(plot, frame).copy()
    df.loc[1, column] = None
    with pytest.raises(ValueError, match=f'{column} holds NaN \\(1 of {len(df)} rows'):
        plot(df)


def test_words_for_what_is_not_there(frame):
    with pytest.raises(ValueError, match="no population is called 'known': there are inliers, set0"):
        plot_roc(frame, inliers='known')
    with pytest.raises(ValueError, match='has no FPR'):
        plot_gains(gains(), 'FPR')
    alone = names(plot_scores(frame[frame.population == 'set0']))
    assert alone == ['set0'], 'no inliers in the table, none in the legend'
