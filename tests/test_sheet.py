"A folder of files as it lies on a disk, from aoe_detect to a page in a browser; a learner whose files are resized."

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from base64 import b64decode
from contextlib import suppress
from functools import partial
from http.server import ThreadingHTTPServer
from io import BytesIO
from urllib.parse import unquote

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from browser import FLAGS, LIMIT, Silent, program
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai.vision.augment import Resize
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from test_cli import run, started

from aoe_nb import detector, sheet  # noqa: F401 (the first patches Learner)
from aoe_nb.models import small_cnn

STRANGE = '<b>&"ü.png'
COLOURS = dict(red=(1, 0.3, 0.3), blue=(0.3, 0.3, 1), green=(0.2, 1, 0.2))


def photo(colour, seed, size=(24, 20)):
    "Noise of one colour, in any size"
    pixels = np.random.default_rng(seed).random((*size[::-1], 3)) * 255 * COLOURS[colour]
    return Image.fromarray(pixels.astype(np.uint8))


def photos(folder, colour, n, seed=0, kind='png', **kwargs):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        photo(colour, seed + i, **kwargs).save(folder / f'{i}.{kind}')


@pytest.fixture(scope='module')
def home(tmp_path_factory, fastai_exports):
    "A folder with a trained learner of photos in export.pkl, and its detector"
    home = tmp_path_factory.mktemp('sheet')
    for k, colour in enumerate(('red', 'blue')):
        photos(home / 'train' / colour, colour, 40, 100 * k)
    set_seed(0, reproducible=True)
    dls = ImageDataLoaders.from_folder(home / 'train', valid_pct=0.5, seed=0, bs=8, item_tfms=Resize(16), device='cpu')
    learn = Learner(dls, small_cnn(3, 2))
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 5e-3)
        Learner(dls, small_cnn(3, 2)).export(home / 'plain.pkl')
        learn.ood_detector(fpr=0.2, seed=1)
        learn.export(home / 'export.pkl')
    return home


@pytest.fixture(scope='module')
def det(home):
    return sheet.open_detector(home / 'export.pkl')


@pytest.fixture(scope='module')
def mess(home):
    "Photos in nested folders, one with a name like a tag, among files that are no photos any more"
    mess = home / 'mess'
    photos(mess / 'a', 'red', 12, 500)
    photos(mess / 'b/c', 'green', 8, 600, 'jpg', size=(300, 200))
    photo('blue', 700).save(mess / STRANGE)
    whole = (mess / 'b/c/0.jpg').read_bytes()
    (mess / 'cut.jpg').write_bytes(whole[: len(whole) // 2])
    (mess / 'b/empty.png').touch()
    (mess / 'letter.png').write_text('Dear Sir or Madam')
    (mess / 'notes.txt').write_text('June')
    (mess / '.hidden').mkdir()
    (mess / '.hidden/0.png').write_bytes(whole)
    return mess


BAD = {
    'cut.jpg': 'image file is truncated',
    'b/empty.png': 'empty',
    'letter.png': 'damaged, or no image',
    'notes.txt': 'no image by its name',
}


@pytest.fixture(scope='module')
def report(home, mess):
    "What the command wrote and said"
    out = home / 'out/report.html'
    done = run('aoe_detect', home / 'export.pkl', mess, '--out', out, '--n', 15)
    assert done.returncode == 0 and not re.search('Traceback|Warning', done.stderr), done.stderr
    return out, done


def good_files(mess):
    return [o for o in sheet.files_below(mess) if o.relative_to(mess).as_posix() not in BAD]


def test_rows_are_those_of_the_detector(report, mess, det):
    out, done = report
    table = pd.read_csv(out.with_suffix('.csv'))
    files = good_files(mess)
    want = det(files)
    assert len(table) == 21 and list(table) == list(want)
    assert table['file'].tolist() == [o.relative_to(mess).as_posix() for o in files]
    for column in 'probability', 'score', 'p':
        np.testing.assert_allclose(table[column], want[column], rtol=1e-5)
    for column in 'class', 'outlier':
        assert table[column].tolist() == want[column].tolist()
    n = int(want.outlier.sum())
    assert n >= 8, 'green photos are none of its business'
    assert f'{n} of 21 images were flagged as outliers, and 4 files could not be judged.' in done.stdout
    assert re.sub('HEAVY|\\s', '', done.stderr) == '', 'no bar where there is no terminal'


def test_page_tells_it_all(report, det):
    page = report[0].read_text(encoding='utf-8')
    for name, why in BAD.items():
        assert re.search(f'{re.escape(name)}</strong>: {why}', page), name
    assert page.count('<figure') == 15 == page.count('<img')
    assert '<b>' not in page and '<script' not in page and '.hidden' not in page
    assert repr(det).split('. ')[0] in page
    assert 'export.pkl' in page and det.about['versions']['torch'] in page
    assert str(report[0].parent) not in page, "the folders of one machine are nobody else's business"


LOOK = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><pre></pre>
<iframe src="report.html" width="390" height="844" style="border:0"></iframe>
<iframe src="report.html" width="1280" height="900" style="border:0"></iframe><script>
const look = frame => {
  const page = frame.contentDocument
  return {
    scroll: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    sizes: [...page.images].map(o => [o.naturalWidth, o.naturalHeight]),
    alts: [...page.images].map(o => o.alt),
    text: page.body.innerText,
    tags: page.querySelectorAll('main b').length,
    ink: getComputedStyle(page.body).color,
  }
}
const frames = () => [...document.querySelectorAll('iframe')]
onload = () => document.querySelector('pre').textContent = btoa(encodeURIComponent(JSON.stringify(frames().map(look))))
</script>"""


@pytest.fixture(scope='module')
def browse(report, tmp_path_factory):
    "What a browser says of the page: two looks at it, the console, and what it asked for"
    chrome = program()
    if not chrome:
        pytest.skip('no chromium or google-chrome on PATH: the report was not opened in a browser')
    folder = report[0].parent
    (folder / 'look.htm').write_text(LOOK)
    asked = []

    class Noting(Silent):
        def send_head(self):
            asked.append(self.path)
            return super().send_head()

    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Noting, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def go(*args):
        asked.clear()
        profile = f'--user-data-dir={tmp_path_factory.mktemp("chromium")}'
        offline = '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1'
        url = f'http://127.0.0.1:{server.server_port}/look.htm'
        command = [chrome, *FLAGS, offline, profile, *args, '--dump-dom', url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        found = re.search('<pre>(.*?)</pre>', done.stdout, re.S)[1]
        console = [o for o in done.stderr.splitlines() if ':CONSOLE' in o]
        return decoded(found), console, list(asked)

    yield go
    server.shutdown()


def decoded(text):
    return json.loads(unquote(b64decode(text).decode()))


def test_a_browser_shows_it(browse):
    looks, console, asked = browse()
    assert not console and set(asked) == {'/look.htm', '/report.html'}
    for look in looks:
        assert look['scroll'] == 0
        assert len(look['sizes']) == 15 and all(0 < w <= 128 and 0 < h <= 128 for w, h in look['sizes'])
        assert [128, 85] in look['sizes'], 'photos are made smaller'
        assert [24, 20] in look['sizes'], 'small pictures stay as they are'
        assert STRANGE in look['text'] and look['tags'] == 0
        assert 'outlier' in look['text'] and 'not flagged' in look['text']


def test_it_has_a_dark_look(browse):
    inks = [browse(f'--blink-settings=preferredColorScheme={i}')[0][0]['ink'] for i in (0, 1)]
    light, dark = (sum(map(int, re.findall(r'\d+', o)[:3])) for o in reversed(inks))
    assert light < 150 < 600 < dark


def test_lines_for_other_programs(home, mess, report):
    done = run('aoe_detect', '--model', home / 'export.pkl', '--folder', mess, '--jsonl', cwd=home)
    rows = [json.loads(o) for o in done.stdout.splitlines()]
    assert done.returncode == 0 and len(rows) == 25
    assert {o['file']: o['error'] for o in rows if 'error' in o}.keys() == BAD.keys()
    judged = pd.DataFrame([o for o in rows if 'error' not in o])
    table = pd.read_csv(report[0].with_suffix('.csv'))
    assert judged['file'].tolist() == table['file'].tolist() and judged.outlier.tolist() == table.outlier.tolist()
    np.testing.assert_allclose(judged.score, table.score, rtol=1e-5)
    assert not (home / 'report.html').exists()


@pytest.fixture(scope='module')
def many(home):
    "So many files that a command is still at work when it is stopped"
    many = home / 'many'
    many.mkdir()
    photo('red', 0).save(many / '0.png')
    for i in range(1, 2000):
        os.link(many / '0.png', many / f'{i}.png')
    return many


def test_a_pipe_may_close_early(home, many):
    p = started('aoe_detect', home / 'export.pkl', many, '--jsonl', '--bs', 1, cwd=home)
    assert json.loads(p.stdout.readline())['file'] == '0.png'
    p.stdout.close()
    said = p.stderr.read()
    p.stderr.close()
    assert p.wait(60) == 0 and said.strip() in ('', 'HEAVY')


def test_stopped_in_the_middle_it_keeps_its_rows(home, many):
    out = home / 'stopped/report.html'
    rows = out.with_suffix('.csv')
    p = started('aoe_detect', home / 'export.pkl', many, '--out', out, '--bs', 1, cwd=home)
    for _ in range(600):
        if rows.exists() and rows.read_text().count('\n') > 9:
            break
        time.sleep(0.1)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'aoe_detect: stopped; finished rows are in the .csv beside' in err
    traces = err.split('Traceback')[1:]  # a thread of Python's own in a worker may be stopped aloud
    assert all('multiprocessing/resource_sharer' in o for o in traces) and not out.exists()
    assert rows.read_text().endswith('\n')
    table = pd.read_csv(rows)
    assert 8 <= len(table) < 2000 and len(table) % 8 == 0 and table.notna().to_numpy().all()
    assert [o.name for o in out.parent.iterdir()] == ['report.csv']


def test_ctrl_c_is_heard_though_it_is_dropped(det, mess):
    def deaf(files, bs):
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return det(files, bs)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(sheet.judge_files(deaf, good_files(mess)))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def detect(monkeypatch, capsys):
    "The command in this process: its error, or what it printed"
    from aoe_nb import cli

    def go(*args, **kwargs):
        try:
            cli.aoe_detect(*map(str, args), **kwargs)
        except SystemExit as e:
            return str(e)
        return capsys.readouterr().out

    return go


def test_one_file_and_again(detect, home, mess, tmp_path):
    "An earlier report is replaced, and is none of the files"
    shutil.copy(mess / 'a/0.png', tmp_path / 'one.png')
    out = tmp_path / 'report.html'
    for _ in range(2):
        assert detect(home / 'export.pkl', tmp_path, str(out)).startswith('0 of 1 image were')
        assert sorted(o.name for o in tmp_path.iterdir()) == ['one.png', 'report.csv', 'report.html']
    assert '0 of 1 image' in detect(home / 'export.pkl', tmp_path / 'one.png', str(out))
    assert '0 of 0 images were flagged as outliers, and 1 file could' in detect(
        home / 'export.pkl', mess / 'notes.txt', str(out)
    )
    assert pd.read_csv(out.with_suffix('.csv')).empty


def test_what_cannot_be_meant(detect, home, mess, tmp_path):
    model = home / 'export.pkl'
    assert 'call learn.ood_detector() before learn.export()' in detect(home / 'plain.pkl', mess)
    assert 'cannot be opened as a learner' in detect(mess / 'letter.png', mess)
    for suffix in 'onnx', 'pt2':
        (tmp_path / f'd.{suffix}').touch()
        assert 'holds no graph of a detector' in detect(tmp_path / f'd.{suffix}', mess)
    (tmp_path / 'nothing').mkdir()
    assert f'{tmp_path / "nothing"} is empty' in detect(model, tmp_path / 'nothing')
    assert 'there is neither a folder nor a file' in detect(model, tmp_path / 'x')
    assert 'must end in .html' in detect(model, mess, out='report.csv')
    assert 'choose another output folder' in detect(model, mess, out='/proc/x/report.html')
    assert 'n must lie in [0, 1000]' in detect(model, mess, n=-1)
    assert 'bs must lie in' in detect(model, mess, bs=0)
    (tmp_path / 'text').mkdir()
    (tmp_path / 'text/a.txt').write_text('a')
    assert 'no images below' in detect(model, tmp_path / 'text', str(tmp_path / 'report.html'))
    assert not (tmp_path / 'report.html').exists() and not (tmp_path / 'report.csv').exists()


@pytest.mark.parametrize('suffix', ['onnx', 'pt2'])
def test_a_graph_judges_the_same_files(detect, home, mess, tmp_path, suffix):
    det = sheet.open_detector(home / 'export.pkl')
    model = det.export(tmp_path / f'd.{suffix}')
    detect(home / 'export.pkl', mess, str(tmp_path / 'learner.html'))
    detect(model, mess, str(tmp_path / 'graph.html'))
    ours, theirs = (pd.read_csv(tmp_path / f'{name}.csv') for name in ('learner', 'graph'))
    assert theirs.file.tolist() == ours.file.tolist()
    assert theirs.outlier.tolist() == ours.outlier.tolist()
    assert (theirs.score - ours.score).abs().max() < 1e-4


def test_the_learner_decides_how_many_at_a_time(home):
    assert sheet.open_detector(home / 'export.pkl', 3).learn.dls.valid.bs == 3


class Fussy:
    "A detector that is none of a learner, and takes no two files at once"

    def __init__(self, det):
        self.det = det
        self.about = det.about

    def __call__(self, files, bs=64):
        if len(files) > 1:
            raise RuntimeError('too large')
        return self.det(files, bs)


def test_any_function_of_files_will_do(det, mess, tmp_path):
    table, bad = sheet.write_report(Fussy(det), mess, tmp_path / 'report.html', n=2)
    want = det(good_files(mess))
    assert table.outlier.tolist() == want.outlier.tolist() and bad.keys() == BAD.keys()
    np.testing.assert_allclose(table.score, want.score, rtol=1e-4)
    assert not (tmp_path / 'report.html').read_text().count('<figure') - 2


def test_names_that_are_no_text(det, tmp_path):
    folder = tmp_path / 'odd'
    folder.mkdir()
    name = os.fsdecode(b'\xff\n"x\'.png')
    photo('red', 0).save(folder / 'a.png')
    try:
        (folder / 'a.png').rename(folder / name)
    except OSError:
        pytest.skip('this disk keeps no such names')
    table, _ = sheet.write_report(det, folder, tmp_path / 'report.html')
    assert table['file'].tolist() == ['\\udcff\n"x\'.png'] == pd.read_csv(tmp_path / 'report.csv')['file'].tolist()
    assert json.loads(next(sheet.json_lines(det, folder)))['file'] == table['file'][0]


@pytest.mark.filterwarnings('ignore:it cannot be seen')
def test_a_rule_for_each_class(home):
    det = sheet.open_detector(home / 'export.pkl')
    new = home / 'new'
    photos(new, 'red', 20, 2000)
    photos(new / 'blue', 'blue', 20, 3000)
    det = det.learn.ood_detector(sheet.files_below(new), fpr=0.3, by='class')
    lines = sheet.score_card(det, new / '0.png').axes[1].lines
    assert lines[0].get_xdata()[0] == det.threshold[det(new / '0.png')['class'][0]]
    sheet.write_report(det, new, home / 'by_class/report.html')
    assert 'threshold for each predicted class' in (home / 'by_class/report.html').read_text()
    plt.close('all')


@pytest.fixture
def card(det):
    figs = []

    def go(image):
        figs.append(sheet.score_card(det, image))
        return figs[-1]

    yield go
    plt.close('all')


def test_card(card, det, mess):
    for file, verdict in (mess / 'a/0.png', 'accepted'), (mess / 'b/c/0.jpg', 'rejected'):
        row = det(file).iloc[0]
        left, right = card(file).axes
        assert left.get_title() == f'{row["class"]}, {row.probability:.0%}'
        assert right.get_title() == f'{verdict}, p = {row.p:.2g}'
        lines = {o.get_label(): o.get_xdata()[0] for o in right.lines}
        assert lines == {'threshold': det.threshold, 'this image': row.score}
        assert left.images[0].get_array().shape == (16, 16, 3), 'as the network sees it'
    with pytest.raises(ValueError, match='one image, these are'):
        card(mess / 'a')


def test_drop_zone(det, mess):
    pytest.importorskip('ipywidgets', reason='no ipywidgets: the drop zone was not tried')
    button, said, picture = sheet.drop_zone(det).children
    assert picture.layout.display == 'none'

    def drop(path):
        about = dict(name=path.name, type='image/png', size=path.stat().st_size, last_modified=pd.Timestamp(0))
        button.value = (about | dict(content=memoryview(path.read_bytes())),)

    drop(mess / 'a/0.png')
    first = picture.value
    assert Image.open(BytesIO(first)).width > 400 and picture.layout.display is None and said.value == ''
    drop(mess / 'letter.png')
    assert 'this file cannot be judged: damaged, or no image' in said.value and picture.layout.display == 'none'
    drop(mess / 'b/c/0.jpg')
    assert picture.value != first and said.value == '' and picture.layout.display is None
    assert not plt.get_fignums()
