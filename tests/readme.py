"README.md from nbs/index.ipynb: `python tests/readme.py` writes it, test_repo.py compares."
import re
from pathlib import Path
from nbconvert import MarkdownExporter
import nbformat

ROOT = Path(__file__).resolve().parent.parent
FILES = 'README_files'

def render():
    "The text of README.md and the files (name -> bytes) that it shows"
    nb = nbformat.read(ROOT/'nbs/index.ipynb', 4)
    nb.metadata['language_info'] = dict(name='python')
    nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*(hide|default_exp)\b', c.source)]
    for c in nb.cells:
        if c.cell_type == 'code' and re.match(r'#\|\s*echo:\s*false', c.source): c.source = ''
    text,res = MarkdownExporter().from_notebook_node(nb, dict(unique_key='README', output_files_dir=FILES))
    text = re.sub(r'\]\(([\w/]+\.ipynb)', r'](nbs/\1', text)
    text = re.sub(r'```python\s*```\n', '', text).replace('![png](', '![Generated outliers before and after the step, and their energies beside those of test images](')
    text = re.sub(r'<style.*?</style>\n?', '', text, flags=re.S)
    return re.sub(r'\n{3,}', '\n\n', '<!-- from nbs/index.ipynb: edit that, then `make readme` -->\n' + text).strip() + '\n',res['outputs']

if __name__ == '__main__':
    text,files = render()
    (ROOT/'README.md').write_text(text, encoding='utf-8')
    for f in (ROOT/FILES).glob('*'): f.unlink()
    for name,data in files.items(): (ROOT/name).parent.mkdir(exist_ok=True); (ROOT/name).write_bytes(data)
