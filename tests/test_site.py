"The site without Quarto: its inputs, every page and link of it, and what a browser says where there is one."
import html, json, os, re, shutil, subprocess, sys, threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit
from nbdev.doclinks import _nbpath2html
import pytest, yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = sorted(p.relative_to(ROOT/'nbs') for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
CONF = {o: yaml.safe_load((ROOT/'nbs'/o).read_text()) for o in ('_quarto.yml','sidebar.yml')}
HOME,BLOB = CONF['_quarto.yml']['website']['site-url'] + '/',CONF['_quarto.yml']['website']['repo-url'] + '/blob/main/'
each_nb = pytest.mark.parametrize('nb', NBS, ids=[o.with_suffix('').as_posix() for o in NBS])

def html_name(nb): return _nbpath2html(Path(nb)).as_posix()
def letters(s): return re.sub(r'\W+', '', s)
def cells(nb, kind=None): return [(c['cell_type'], ''.join(c['source'])) for c in json.loads((ROOT/'nbs'/nb).read_text())['cells'] if kind in (None, c['cell_type'])]
def options(src): return yaml.safe_load('\n'.join(re.findall(r'^#\|\s*([\w-]+:.*)$', src, re.M))) or {}

def files(o):
    "The files that a piece of YAML names"
    if isinstance(o, (dict,list)): return [f for v in (o.values() if isinstance(o, dict) else o) for f in files(v)]
    return [o] if isinstance(o, str) and re.fullmatch(r'[\w./-]+\.(ipynb|qmd|md|s?css|ya?ml|html|png|svg|ico)', o) else []

LISTED = [o for o in files(CONF['sidebar.yml']) if o.endswith(('.ipynb','.qmd','.md'))]

def test_quarto_finds_every_file_it_is_told_of():
    assert LISTED and not [o for o in files(CONF) if not (ROOT/'nbs'/o).is_file()]

@each_nb
def test_quarto_can_read_the_options(nb):
    for kind,src in cells(nb):
        if kind == 'raw': assert isinstance(yaml.safe_load(re.fullmatch(r'---\n(.*)\n---\s*', src, re.S)[1]), dict)
        if kind == 'code': assert isinstance(options(src), dict), src
    title = cells(nb)[0][1]
    assert isinstance(yaml.safe_load('\n'.join(re.findall(r'^- (.+:.*)$', title, re.M))) or {}, dict), title

class Page(HTMLParser):
    "What the checks need of a page: ids, links, images, the text of its body, and that without code and mathematics"
    def __init__(self, path):
        super().__init__()
        self.html = path.read_text(); self.ids,self.links,self.imgs,self.text,self.prose,self.open = set(),[],[],'','',[]
        self.feed(re.sub(r'<(span|div) class="math.*?</\1>', '', self.html, flags=re.S))
    def handle_starttag(self, tag, attrs):
        a = dict(attrs); self.ids |= {a.get('id')}
        self.links += [a[k] or '' for k in ('href','src') if k in a and not (a[k] or '').startswith('data:')]
        if tag == 'img': self.imgs.append(a)
        if tag in ('main','pre','code','script','style'): self.open.append(tag)
    def handle_endtag(self, tag):
        if tag in self.open: self.open.remove(tag)
    def handle_data(self, s):
        if 'main' not in self.open or {'script','style'} & {*self.open}: return
        self.text += s
        if self.open == ['main']: self.prose += s

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    pytest.importorskip('smalldocs', reason='no smalldocs, which needs Python 3.11: the site was not rendered')
    out = tmp_path_factory.mktemp('site')
    r = subprocess.run([sys.executable, ROOT/'tests/website.py', '--plain', '--out', out], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    if r.returncode: pytest.fail('python tests/website.py --plain: ' + r.stderr[r.stderr.rfind('\nException'):][-2000:], pytrace=False)
    return out

@pytest.fixture(scope='session')
def pages(site): return {p.relative_to(site).as_posix(): Page(p) for p in sorted(site.rglob('*.html'))}

def test_sidebar_and_search_know_every_page(site, pages):
    found = {o['href'].partition('#')[0] for o in json.loads((site/'search.json').read_text())}
    assert sorted(map(html_name, LISTED)) == sorted(found) == sorted(pages)

UNRENDERED = {'a directive': r'#\|', 'a traceback': r'Traceback \(most recent', 'a path of one machine': r'(?<![\w.])/(?:home|root|work|tmp)/\w', 'a link': r'\]\(https?:'}
IN_PROSE = {'mathematics': r'\$|\\[()\[\]]', 'a div': r'(?m)^\s*:::', 'a heading': r'(?m)^#+ ', 'a row of a table': r'(?m)^\|.*\|$'}

@each_nb
def test_page_reads_as_meant(nb, pages):
    p,(title,summary) = pages[html_name(nb)],re.match(r'# (.+)\n+> (.+)', cells(nb)[0][1]).groups()
    assert letters(title) in letters(re.search('<title>(.*?)</title>', p.html)[1]) and letters(title+summary) in letters(p.text)
    assert len(letters(p.prose)) > len(letters(title+summary)) + 100 and 'quarto-sidebar' in p.ids
    for where,shown in (p.text,UNRENDERED),(p.prose,IN_PROSE):
        for what,pat in shown.items():
            if m := re.search(pat, where): pytest.fail(f'{what} is shown as it is written: {where[max(0, m.start()-80):m.end()+80]!r}')

def why_dead(name, url, site, pages):
    "What is wrong with a link of the page `name`, if anything"
    if url.startswith(BLOB):
        path,_,line = url[len(BLOB):].partition('#L')
        return None if (f := ROOT/path).is_file() and int(line or 0) <= len(f.read_text().splitlines()) else 'no such file or line in the repository'
    full = urljoin(HOME + name, url); u = urlsplit(full)
    if not full.startswith(HOME):
        return None if urlsplit(url).scheme and (u.scheme == 'mailto' or u.scheme in ('http','https') and re.fullmatch(r'[\w-]+(\.[\w-]+)+', u.netloc) and not re.search(r'\s', full)) else 'not an address'
    path,anchor = unquote(full[len(HOME):].partition('#')[0]) or 'index.html',unquote(u.fragment)
    if not (site/path).is_file(): return 'no such file'
    if anchor and path in pages and anchor not in pages[path].ids: return 'no such anchor'

def test_every_link_goes_somewhere(site, pages):
    dead = {}
    for name,p in pages.items():
        for url in p.links:
            if why := why_dead(name, url, site, pages): dead.setdefault(f'{urljoin("/"+name, url)}: {why}', {})[name] = 1
    assert not dead, '\n' + '\n'.join(f'{k}: linked from {", ".join(v)}' for k,v in dead.items())

def test_pictures_have_words(pages):
    silent = []
    for nb in NBS:
        alts = [letters(o.get('alt') or '') for o in pages[html_name(nb)].imgs]
        for kind,src in cells(nb):
            for alt in re.findall(r'!\[([^\]]+)\]\(', src) if kind == 'markdown' else [options(src)['fig-alt']] if kind == 'code' and 'fig-alt' in options(src) else []:
                assert letters(alt) in alts, f'{nb}: {alt}'
        if '' in alts: silent.append(f'{nb} ({alts.count("")} of {len(alts)})')
    if silent: pytest.skip('figures without `#| fig-alt`: ' + ', '.join(silent))

@pytest.fixture(scope='session')
def browse(site, tmp_path_factory):
    "Open a page of the site, served to this machine alone; return the page after its scripts, and the console but for what needs the network"
    exe = next(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome','google-chrome-stable'))), None)
    if not exe: pytest.skip('no chromium or google-chrome on PATH: the pages were not opened in a browser')
    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Silent, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = '--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars --enable-logging=stderr --v=0'.split()
    def go(page, *args):
        r = subprocess.run([exe, *flags, '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1', f'--user-data-dir={tmp_path_factory.mktemp("chromium")}', *args,
                            f'http://127.0.0.1:{server.server_port}/{page}'], capture_output=True, text=True, timeout=120)
        return r.stdout,[o for o in r.stderr.splitlines() if ':CONSOLE' in o and 'cdn.jsdelivr.net' not in o]
    yield go
    server.shutdown()

FRAMES = """<!doctype html><meta charset="utf-8"><pre></pre>%s<script>
const scrolls = e => e.tagName != 'MAIN' && (/auto|scroll|hidden/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement))
const wide = f => { const d = f.contentDocument, w = d.documentElement.clientWidth
  const out = [...d.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > w+1 && !scrolls(e.parentElement)).map(e => e.outerHTML.slice(0, 120))
  return d.documentElement.scrollWidth > w || out.length || !d.querySelector('main') ? [[f.name, d.documentElement.scrollWidth, ...out.slice(0, 3)]] : [] }
onload = () => document.querySelector('pre').textContent = JSON.stringify([...document.querySelectorAll('iframe')].flatMap(wide))
</script>"""

def test_no_page_is_wider_than_its_window(browse, site, pages):
    (site/'frames.htm').write_text(FRAMES % ''.join(f'<iframe name="{o} at {w}" src="{o}" width="{w}" height="{h}" style="border:0"></iframe>' for o in pages for w,h in ((390,844),(1280,900))))
    dom,console = browse('frames.htm', '--dump-dom')
    assert json.loads(html.unescape(re.search('<pre>(.*?)</pre>', dom, re.S)[1])) == [] and not console

@pytest.mark.parametrize('page', ['index.html','exposure.html','evaluation.html','experiments/p1.html'])
@pytest.mark.parametrize('look,args', [('desktop',['--window-size=1280,900']), ('phone',['--window-size=390,844']), ('dark',['--window-size=1280,900','--blink-settings=preferredColorScheme=0'])], ids=lambda o: o if isinstance(o, str) else '')
def test_a_browser_shows_it(browse, page, look, args, tmp_path):
    "AOE_SHOTS=folder keeps the screenshots"
    shot = Path(os.environ.get('AOE_SHOTS', tmp_path)).absolute()/f'{page}-{look}.png'; shot.parent.mkdir(parents=True, exist_ok=True)
    _,console = browse(page, *args, f'--screenshot={shot}')
    assert shot.stat().st_size > 10_000 and not console
