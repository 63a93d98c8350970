"Write README.md from nbs/index.ipynb: `python tools/readme.py`. A test compares the two."

import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
FILES = 'README_files'
NOTE = '<!-- from nbs/index.ipynb: edit that, then `make readme` -->\n'


def has(cell, directive):
    "Whether `cell` opens with `#| directive`"
    return cell.cell_type == 'code' and re.match(rf'#\|\s*{directive}\b', cell.source)


def described(nb):
    "The words for each picture of `nb`, in order: its cell's `fig-alt`"
    words = []
    for cell in nb.cells:
        alt = re.search(r'^#\|\s*fig-alt:\s*"?(.+?)"?$', cell.source, re.M)
        pictures = [o for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]
        words += [alt[1] if alt else ''] * len(pictures)
    return words


def render():
    "The text of README.md and the files (name -> bytes) that it shows"
    nb = nbformat.read(ROOT / 'nbs/index.ipynb', 4)
    nb.metadata['language_info'] = dict(name='python')
    nb.cells = [c for c in nb.cells if not has(c, 'hide') and not has(c, 'default_exp')]
    words = iter(described(nb))
    for cell in nb.cells:
        if has(cell, 'echo: false'):
            cell.source = ''
    text, resources = MarkdownExporter().from_notebook_node(nb, dict(unique_key='README', output_files_dir=FILES))
    text = re.sub(r'\]\(([\w/]+\.ipynb)', r'](nbs/\1', text)
    text = re.sub(r'```python\s*```\n', '', text)
    text = re.sub(r'!\[png\]\(', lambda m: f'![{next(words)}](', text)
    text = re.sub(r'<style.*?</style>\n?', '', text, flags=re.S)
    text = re.sub(r'\n{3,}', '\n\n', NOTE + text)
    return text.strip() + '\n', resources['outputs']


if __name__ == '__main__':
    text, files = render()
    (ROOT / 'README.md').write_text(text, encoding='utf-8')
    (ROOT / FILES).mkdir(exist_ok=True)
    for file in (ROOT / FILES).glob('*'):
        file.unlink()
    for name, data in files.items():
        (ROOT / name).write_bytes(data)
