"The site without Quarto: its inputs, every page and link of it, and what a browser says where there is one."

import html
import json
import os
import re
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import yaml
from browser import FLAGS, LIMIT, Silent, program
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html
from website import WIDGET, tidy
from website import pages as notebooks

ROOT = Path(__file__).resolve().parent.parent
NBS = [p.relative_to(ROOT / 'nbs') for p in notebooks()]
CONFIG = get_config(path=ROOT)
CONF = {name: yaml.safe_load((ROOT / 'nbs' / name).read_text()) for name in ('_quarto.yml', 'sidebar.yml')}
HOME = CONFIG.doc_host + CONFIG.doc_baseurl + '/'
BLOB = CONFIG.git_url + '/blob/main/'
each_nb = pytest.mark.parametrize('nb', NBS, ids=[o.with_suffix('').as_posix() for o in NBS])


def html_name(nb):
    return _nbpath2html(Path(nb)).as_posix()


def letters(text):
    return re.sub(r'\W+', '', text)


def cells(nb):
    "Kind and text of each cell"
    return [(c['cell_type'], ''.join(c['source'])) for c in json.loads((ROOT / 'nbs' / nb).read_text())['cells']]


def options(source):
    "What the `#| key: value` lines of a cell say"
    return yaml.safe_load('\n'.join(re.findall(r'^#\|\s*([\w-]+:.*)$', source, re.M))) or {}


# What Quarto is told

FILE = r'[\w./-]+\.(ipynb|qmd|md|s?css|ya?ml|html|png|svg|ico)'


def files(o):
    "The files that a piece of YAML names"
    if isinstance(o, dict):
        o = list(o.values())
    if isinstance(o, list):
        return [f for v in o for f in files(v)]
    return [o] if isinstance(o, str) and re.fullmatch(FILE, o) else []


LISTED = [o for o in files(CONF['sidebar.yml']) if o.endswith(('.ipynb', '.qmd', '.md'))]


def test_quarto_finds_every_file_it_is_told_of():
    assert LISTED
    assert not [o for o in files(CONF) if not (ROOT / 'nbs' / o).is_file()]


@each_nb
def test_quarto_can_read_the_options(nb):
    for kind, source in cells(nb):
        if kind == 'raw':
            front = re.fullmatch(r'---\n(.*)\n---\s*', source, re.S)[1]
            assert isinstance(yaml.safe_load(front), dict)
        if kind == 'code':
            assert isinstance(options(source), dict), source
    title = cells(nb)[0][1]
    keys = re.findall(r'^- (.+:.*)$', title, re.M)
    assert isinstance(yaml.safe_load('\n'.join(keys)) or {}, dict), title


# Pages


class Page(HTMLParser):
    "What the checks need of a page: ids, links, images, scripts, the text of its body, and its prose alone"

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text()
        self.ids = set()
        self.links = []
        self.imgs = []
        self.scripts = []
        self.text = ''
        self.prose = ''
        self.open = []
        self.feed(re.sub(r'<(span|div) class="math.*?</\1>', '', self.html, flags=re.S))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get('id'))
        for key in 'href', 'src':
            if key in attrs and not (attrs[key] or '').startswith('data:'):
                self.links.append(attrs[key] or '')
        if tag == 'img':
            self.imgs.append(attrs)
        if tag == 'script':
            self.scripts.append(attrs.get('src') or '')
        if tag in ('main', 'pre', 'code', 'script', 'style'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            self.open.remove(tag)

    def handle_data(self, text):
        if 'main' not in self.open or {'script', 'style'} & {*self.open}:
            return
        self.text += text
        if self.open == ['main']:
            self.prose += text


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    pytest.importorskip('smalldocs', reason='no smalldocs, which needs Python 3.11: the site was not rendered')
    out = tmp_path_factory.mktemp('site')
    command = [sys.executable, ROOT / 'tools/website.py', '--plain', '--out', out]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = done.stderr[done.stderr.rfind('\nException') :][-2000:]
        pytest.fail('python tools/website.py --plain: ' + why, pytrace=False)
    return out


@pytest.fixture(scope='session')
def pages(site):
    return {p.relative_to(site).as_posix(): Page(p) for p in sorted(site.rglob('*.html'))}


def test_sidebar_and_search_know_every_page(site, pages):
    found = {o['href'].partition('#')[0] for o in json.loads((site / 'search.json').read_text())}
    assert sorted(map(html_name, LISTED)) == sorted(found) == sorted(pages)


UNRENDERED = {
    'a directive': r'#\|',
    'a traceback': r'Traceback \(most recent',
    'a path of one machine': r'(?<![\w.])/(?:home|root|work|tmp)/\w',
    'a link': r'\]\(https?:',
}
IN_PROSE = {
    'mathematics': r'\$|\\[()\[\]]',
    'a div': r'(?m)^\s*:::',
    'a heading': r'(?m)^#+ ',
    'a row of a table': r'(?m)^\|.*\|$',
}


@each_nb
def test_page_reads_as_meant(nb, pages):
    page = pages[html_name(nb)]
    title, summary = re.match(r'# (.+)\n+> (.+)', cells(nb)[0][1]).groups()
    assert letters(title) in letters(re.search('<title>(.*?)</title>', page.html)[1])
    assert letters(title + summary) in letters(page.text)
    assert len(letters(page.prose)) > len(letters(title + summary)) + 100
    assert 'quarto-sidebar' in page.ids
    for where, shown in (page.text, UNRENDERED), (page.prose, IN_PROSE):
        for what, pattern in shown.items():
            found = re.search(pattern, where)
            if found:
                around = where[max(0, found.start() - 80) : found.end() + 80]
                pytest.fail(f'{what} is shown as it is written: {around!r}')


QUARTO_HEAD = """<head>
<script src="https://cdn.jsdelivr.net/npm/requirejs@2.3.6/require.min.js" crossorigin="anonymous"></script>
<script src="https://cdnjs.cloudflare.com/ajax/libs/jquery/3.5.1/jquery.min.js" data-relocate-top="true"></script>
<script type="application/javascript">define('jquery', [],function() {return window.jQuery;})</script>
<script src="https://cdn.jsdelivr.net/npm/@jupyter-widgets/html-manager@*/dist/embed-amd.js"></script>
<script src="site_libs/quarto-nav/quarto-nav.js"></script>
</head>"""


def test_only_a_page_with_a_widget_fetches_scripts_for_it():
    "Quarto adds them wherever an output is HTML, as tables are"
    page = Path('page.html')
    kept = '<head>\n<script src="site_libs/quarto-nav/quarto-nav.js"></script>\n</head>'
    assert tidy(QUARTO_HEAD, page, HOME[:-1]) == kept
    with_widget = QUARTO_HEAD + f'<script type="{WIDGET}">'
    assert tidy(with_widget, page, HOME[:-1]) == with_widget


def test_links_to_the_site_become_relative():
    page = Path('experiments/p1.html')
    link = f'<a class="x" href="{HOME}energy.html#energy"><code>energy</code></a>'
    assert tidy(link, page, HOME[:-1]) == '<a class="x" href="../energy.html#energy"><code>energy</code></a>'


@each_nb
def test_this_page_fetches_no_script_without_a_use(nb, pages):
    page = pages[html_name(nb)]
    if WIDGET not in page.html:
        assert not [o for o in page.scripts if re.search('require|jquery|embed-amd', o)]


# Links


def is_address(url, full):
    "Whether a link to elsewhere looks like an address; nothing is fetched"
    parts = urlsplit(full)
    if not urlsplit(url).scheme:
        return False
    if parts.scheme == 'mailto':
        return True
    host = re.fullmatch(r'[\w-]+(\.[\w-]+)+', parts.netloc)
    return parts.scheme in ('http', 'https') and host and not re.search(r'\s', full)


def why_dead(name, url, site, pages):
    "What is wrong with a link of the page `name`, if anything"
    if url.startswith(BLOB):
        path, _, line = url[len(BLOB) :].partition('#L')
        file = ROOT / path
        known = file.is_file() and int(line or 0) <= len(file.read_text().splitlines())
        return None if known else 'no such file or line in the repository'
    full = urljoin(HOME + name, url)
    if not full.startswith(HOME):
        return None if is_address(url, full) else 'not an address'
    path = unquote(full[len(HOME) :].partition('#')[0]) or 'index.html'
    anchor = unquote(urlsplit(full).fragment)
    if not (site / path).is_file():
        return 'no such file'
    if anchor and path in pages and anchor not in pages[path].ids:
        return 'no such anchor'


def test_every_link_goes_somewhere(site, pages):
    dead = {}
    for name, page in pages.items():
        for url in page.links:
            why = why_dead(name, url, site, pages)
            if why:
                dead.setdefault(f'{urljoin("/" + name, url)}: {why}', set()).add(name)
    lines = [f'{link}: linked from {", ".join(sorted(names))}' for link, names in dead.items()]
    assert not dead, '\n' + '\n'.join(lines)


def test_the_site_needs_no_address(pages):
    "Pages link each other relatively, so that the site can be read from a checkout"
    assert not [(name, url) for name, page in pages.items() for url in page.links if url.startswith(HOME)]


# Pictures


def wanted_words(source, kind):
    "The descriptions of pictures that a cell asks for"
    if kind == 'markdown':
        return re.findall(r'!\[([^\]]+)\]\(', source)
    alt = options(source).get('fig-alt') if kind == 'code' else None
    return [alt] if alt else []


@each_nb
def test_pictures_have_words(nb, pages):
    words = [letters(o.get('alt') or '') for o in pages[html_name(nb)].imgs]
    for kind, source in cells(nb):
        for alt in wanted_words(source, kind):
            assert letters(alt) in words, alt
    if '' in words:
        pytest.skip(f'figures without `#| fig-alt`: {words.count("")} of {len(words)}')


# A browser


@pytest.fixture(scope='session')
def browse(site, tmp_path_factory):
    """Open a page of the site, served to this machine alone.

    It returns the page after its scripts, and the console but for what needs the network."""
    chrome = program()
    if not chrome:
        pytest.skip('no chromium or google-chrome on PATH: the pages were not opened in a browser')
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Silent, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    offline = '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1'

    def go(page, *args):
        profile = f'--user-data-dir={tmp_path_factory.mktemp("chromium")}'
        url = f'http://127.0.0.1:{server.server_port}/{page}'
        command = [chrome, *FLAGS, offline, profile, *args, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        lines = done.stderr.splitlines()
        return done.stdout, [o for o in lines if ':CONSOLE' in o and 'cdn.jsdelivr.net' not in o]

    yield go
    server.shutdown()


FRAMES = """<!doctype html><meta charset="utf-8"><pre></pre>%s<script>
const scrolling = e => /auto|scroll|hidden/.test(getComputedStyle(e).overflowX)
const scrolls = e => e.tagName != 'MAIN' && (scrolling(e) || scrolls(e.parentElement))
const wide = frame => {
  const page = frame.contentDocument
  const width = page.documentElement.clientWidth
  const over = e => e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement)
  const out = [...page.querySelectorAll('main *')].filter(over).map(e => e.outerHTML.slice(0, 120))
  const bad = page.documentElement.scrollWidth > width || out.length || !page.querySelector('main')
  return bad ? [[frame.name, page.documentElement.scrollWidth, ...out.slice(0, 3)]] : []
}
const frames = () => [...document.querySelectorAll('iframe')]
onload = () => document.querySelector('pre').textContent = JSON.stringify(frames().flatMap(wide))
</script>"""
FRAME = '<iframe name="{page} at {w}" src="{page}" width="{w}" height="{h}" style="border:0"></iframe>'
SIZES = (390, 844), (1280, 900)


@pytest.mark.slow
def test_no_page_is_wider_than_its_window(browse, site, pages):
    frames = [FRAME.format(page=page, w=w, h=h) for page in pages for w, h in SIZES]
    (site / 'frames.htm').write_text(FRAMES % ''.join(frames))
    dom, console = browse('frames.htm', '--dump-dom')
    found = re.search('<pre>(.*?)</pre>', dom, re.S)[1]
    assert json.loads(html.unescape(found)) == []
    assert not console


LOOKS = {
    'desktop': ['--window-size=1280,900'],
    'phone': ['--window-size=390,844'],
    'dark': ['--window-size=1280,900', '--blink-settings=preferredColorScheme=0'],
}
LOOKED_AT = [html_name(o) for o in LISTED if re.search(r'(^|/)(index|gallery|p1|\d\d_exposure|\d\d_evaluation)\.', o)]


@pytest.mark.parametrize('page', LOOKED_AT)
@pytest.mark.parametrize('look', LOOKS)
def test_a_browser_shows_it(browse, page, look, tmp_path):
    "AOE_SHOTS=folder keeps the screenshots"
    shot = Path(os.environ.get('AOE_SHOTS', tmp_path)).absolute() / f'{page}-{look}.png'
    shot.parent.mkdir(parents=True, exist_ok=True)
    _, console = browse(page, *LOOKS[look], f'--screenshot={shot}')
    assert shot.stat().st_size > 10_000
    assert not console
