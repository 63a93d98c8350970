"""How exactly a cell of the grid repeats on this machine and number of threads: results/benchmarks/repeat.json.

One cell is made again and its metrics are compared with the stored result. Rounding differs between processors and
between numbers of threads, and 195 steps of training let it grow. Each call adds or replaces its line in the file.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from aoe_nb.metrics import metric_names
from aoe_nb.record import provenance, write_whole
from aoe_nb.study.grid import run_cell

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / 'results/benchmarks/repeat.json'
CELL = ROOT / 'results/grid/aoe-cifar10-s0-16566eab.json'  # AOE from the published start, seed 0


def table(result):
    "Metrics by set, score, attack, side and eps"
    keys = ['set', 'score', 'attack', 'attacked', 'eps_255']
    return pd.DataFrame(result['ood']).fillna('').set_index(keys)[metric_names].astype(float)


def largest(then, now):
    "The largest difference of each metric, on untouched images and under each attack"
    diff = (table(now) - table(then)).abs()
    by_attack = diff.groupby('attack').max()
    return {attack: row.round(6).to_dict() for attack, row in by_attack.iterrows()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--threads', type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    then = json.loads(CELL.read_text())
    with TemporaryDirectory() as folder:
        now = run_cell(then['config'], folder)
    line = dict(seconds=now['seconds'], accuracy=abs(now['id_acc'] - then['id_acc']), largest=largest(then, now))
    line |= provenance()
    lines = json.loads(FILE.read_text())['lines'] if FILE.exists() else {}
    lines[f'{line["device"]}'] = line
    about = dict(cell=CELL.name, config=then['config'], stored={k: then[k] for k in ('commit', 'versions', 'device')})
    write_whole(FILE, json.dumps(about | dict(lines=lines), indent=1))
    print(pd.DataFrame(line['largest']).T)


if __name__ == '__main__':
    main()
