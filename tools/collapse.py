"""Collapse in JupyterLab what a reader of a notebook can do without: `python tools/collapse.py [NOTEBOOK ...]`.

These are cells of imports alone, and cells that the site hides or folds (`hide`, `exporti`, `code-fold`).
"""

import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDED = re.compile(r'^#\|\s*(hide\b|exporti\b|code-fold:\s*true)', re.M)


def notebooks(folder=ROOT / 'nbs'):
    return sorted(p for p in folder.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def only_imports(source):
    "Whether `source` is imports and nothing else"
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a line of IPython's
        return False
    imports = (ast.Import, ast.ImportFrom)
    return any(isinstance(o, imports) for o in body) and all(isinstance(o, imports) for o in body)


def is_aside(cell):
    "Whether a reader can do without this cell"
    source = ''.join(cell['source'])
    return cell['cell_type'] == 'code' and bool(FOLDED.search(source) or only_imports(source))


def collapse(nb):
    "Mark the cells of `nb`, in place; return whether anything changed"
    before = json.dumps(nb)
    for cell in nb['cells']:
        jupyter = {k: v for k, v in cell['metadata'].pop('jupyter', {}).items() if k != 'source_hidden'}
        if is_aside(cell):
            jupyter['source_hidden'] = True
        if jupyter:
            cell['metadata']['jupyter'] = jupyter
    return json.dumps(nb) != before


def main(paths):
    for path in paths or notebooks():
        nb = json.loads(Path(path).read_text(encoding='utf-8'))
        if collapse(nb):
            text = json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False)
            Path(path).write_text(text + '\n', encoding='utf-8')
            print(path)


if __name__ == '__main__':
    main(sys.argv[1:])
