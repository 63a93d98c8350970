"""Render the site from nbs/ into _docs/: with Quarto where it is on PATH, else with smalldocs."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from collapse import notebooks, only_imports
from fastcore.script import call_parse, store_true
from fastcore.xtras import working_directory
from nbdev import processors
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, _nbpath2html
from nbdev.serve import proc_nbs

from aoe_nb._modidx import d as index

ROOT = Path(__file__).resolve().parent.parent
OLD = 'old'  # the folder of names that are kept for one release: no page of the site
WIDGET = 'application/vnd.jupyter.widget-view+json'

# Quarto puts these on each page with a table in HTML, in case that a program drew it. Only widgets need them.
WIDGET_SCRIPTS = re.compile(
    r'<script\b[^>]*\bsrc="https://[^"]*/(?:require|jquery)(?:\.min)?\.js"[^>]*></script>\s*'
    r'|<script\b[^>]*\bsrc="https://[^"]*/embed-amd\.js"[^>]*></script>\s*'
    r"|<script\b[^>]*>define\('jquery'.*?</script>\s*"
)

link_line = NbdevLookup.link_line


def link_prose(self, line):
    "As nbdev links names, but not inside signatures, which are code"
    return line if line.startswith(('    ', ')')) else link_line(self, line)


NbdevLookup.link_line = link_prose
do_eval = processors._do_eval


def defines_names(cell):
    "As nbdev runs cells before it documents them, but not one that goes on to use what it imports"
    if cell.cell_type != 'code':
        return False
    exported = {'export', 'exports', 'exporti', 'exec_doc'} & cell.directives_.keys()
    return (exported or only_imports(cell.source) or 'show_doc(' in cell.source) and do_eval(cell)


processors._do_eval = defines_names

# A name in backticks leads to the page of its room, not to an old name of the same.
for module, names in list(index['syms'].items()):
    if any(page.startswith(f'{OLD}/') for page, _ in names.values()):
        del index['syms'][module]


def pages():
    "The notebooks that are pages of the site"
    return [p for p in notebooks() if OLD not in p.relative_to(ROOT / 'nbs').parts]


def with_addresses(text, config):
    "The text of _quarto.yml with what stands there in braces from settings.ini"
    return re.sub(r'\{(\w+)\}', lambda m: config[m[1]], text)


def shows_widget(nb):
    "Whether an output of the notebook `nb` is a widget"
    return any(WIDGET in o.get('data', {}) for c in nb['cells'] for o in c.get('outputs', []))


def strip(path):
    "Remove what the site has no use for: a widgets' state without a widget, which nbdev adds, and marks for JupyterLab"
    nb = json.loads(path.read_text(encoding='utf-8'))
    if not shows_widget(nb):
        nb['metadata'].pop('widgets', None)
    for cell in nb['cells']:
        cell['metadata'].pop('jupyter', None)
    path.write_text(json.dumps(nb), encoding='utf-8')


def tidy(html, page, site):
    "The text of one page without scripts that it has no use for, its links to `site` relative to `page`"
    if WIDGET not in html:
        html = WIDGET_SCRIPTS.sub('', html)

    def relative(m):
        path, hash_, anchor = m[2].partition('#')
        return m[1] + os.path.relpath(path or 'index.html', page.parent) + hash_ + anchor + '"'

    return re.sub(rf'(<a\b[^>]*\bhref="){re.escape(site)}/([^"]*)"', relative, html)


def smalldocs(proc):
    "What Quarto would make of `proc`, near enough to read and to check"
    from smalldocs.site import build

    # smalldocs does not know `output-file`, by which nbdev names a page: the notebooks get these names first
    names = {p.name: _nbpath2html(p).with_suffix('.ipynb').name for p in proc.rglob('*.ipynb')}
    link = re.compile(rf'(?<=[(/ ])({"|".join(map(re.escape, names))})(?=[)#\s])')
    for path in [*proc.rglob('*.ipynb'), *proc.glob('*.yml')]:
        text = link.sub(lambda m: names[m[1]], path.read_text(encoding='utf-8'))
        path.unlink()
        path.with_name(names.get(path.name, path.name)).write_text(text, encoding='utf-8')
    build(proc, quiet=True)


def render(folder, quarto):
    "Render the copy of the repository in `folder`; return the folder of the pages"
    with working_directory(folder):
        config = get_config(path=folder)
        conf = folder / 'nbs/_quarto.yml'
        conf.write_text(with_addresses(conf.read_text(encoding='utf-8'), config), encoding='utf-8')
        proc = proc_nbs(n_workers=0)
    for path in proc.rglob('*.ipynb'):
        strip(path)
    if quarto:
        subprocess.run([quarto, 'render', proc, '--no-cache'], check=True)
    else:
        smalldocs(proc)
    docs = proc / '_docs'
    for path in docs.rglob('*.html'):
        html = path.read_text(encoding='utf-8')
        html = tidy(html, path.relative_to(docs), config.doc_host + config.doc_baseurl)
        path.write_text(html, encoding='utf-8')
    return docs


@call_parse
def main(
    out: Path = ROOT / '_docs',  # folder of the site, made anew if it is the default
    plain: store_true = False,  # smalldocs even where Quarto is
):
    "Render the site"
    quarto = None if plain else shutil.which('quarto')
    with TemporaryDirectory() as tmp:
        folder = Path(tmp)
        shutil.copy(ROOT / 'settings.ini', folder)
        shutil.copytree(ROOT / 'nbs', folder / 'nbs', ignore=shutil.ignore_patterns(OLD, '.ipynb_checkpoints'))
        docs = render(folder, quarto)
        if out == ROOT / '_docs':
            shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(docs, out, dirs_exist_ok=True)
    print(f'{out}/index.html, by {"Quarto" if quarto else "smalldocs"}')
