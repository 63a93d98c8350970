"The site from nbs/: `python tests/website.py` renders it into _docs/, with Quarto where it is on PATH, else with smalldocs."
import re, shutil, subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from fastcore.script import call_parse, store_true
from fastcore.xtras import working_directory
from nbdev.doclinks import NbdevLookup, _nbpath2html
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent
link_line = NbdevLookup.link_line
NbdevLookup.link_line = lambda self, l: l if l.startswith(('    ',')')) else link_line(self, l) # nbdev links names inside signatures, which are code

def smalldocs(proc):
    "What Quarto would make of `proc`, near enough to read and to check; nbdev's `output-file` names are given to the notebooks first"
    from smalldocs.site import build
    names = {p.name: _nbpath2html(p).with_suffix('.ipynb').name for p in proc.rglob('*.ipynb')}
    link = re.compile(rf'(?<=[(/ ])({"|".join(map(re.escape, names))})(?=[)#\s])')
    for p in [*proc.rglob('*.ipynb'), *proc.glob('*.yml')]:
        text = link.sub(lambda m: names[m[1]], p.read_text(encoding='utf-8'))
        p.unlink(); p.with_name(names.get(p.name, p.name)).write_text(text, encoding='utf-8')
    build(proc, quiet=True)

@call_parse
def main(out:Path=ROOT/'_docs', # folder of the site, made anew if it is the default
         plain:store_true=False): # smalldocs even where Quarto is
    "Render the site"
    quarto = None if plain else shutil.which('quarto')
    with TemporaryDirectory() as d:
        for o in 'settings.ini','nbs': (shutil.copytree if (ROOT/o).is_dir() else shutil.copy)(ROOT/o, f'{d}/{o}')
        with working_directory(d): proc = proc_nbs(n_workers=0)
        if quarto: subprocess.run([quarto, 'render', proc, '--no-cache'], check=True)
        else: smalldocs(proc)
        if out == ROOT/'_docs': shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(proc/'_docs', out, dirs_exist_ok=True)
    print(f'{out}/index.html, by {"Quarto" if quarto else "smalldocs"}')
