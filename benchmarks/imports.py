"""What an import costs: scores and attacks beside PyTorch alone, everything beside fastai.

python benchmarks/imports.py        # two minutes on one core

Every import has a process of its own, and they take turns. The file, results/benchmarks/imports.json, holds
seconds of the processor and the median ratio to what stands beside it.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from aoe_nb.record import provenance, write_whole

OUT = Path(__file__).resolve().parent.parent / 'results/benchmarks/imports.json'
REPEATS = 9
BESIDE = {
    'import aoe_nb.energy, aoe_nb.attack': 'import torch',
    'from aoe_nb.all import *': 'from fastai.vision.all import *',
}


def seconds_of(line):
    code = f'import time; start = time.process_time()\n{line}\nprint(time.process_time() - start)'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main():
    started = time.time()
    runs = {line: [] for pair in BESIDE.items() for line in pair}
    for repeat in range(REPEATS + 1):
        for line, seconds in runs.items():
            found = seconds_of(line)
            if repeat:  # the first reads the files from the disk
                seconds.append(round(found, 3))
    ratios = {a: round(median(x / y for x, y in zip(runs[a], runs[b])), 3) for a, b in BESIDE.items()}
    res = dict(experiment='benchmarks', benchmark='imports', config=dict(repeats=REPEATS, beside=BESIDE), seed=0)
    res |= dict(**provenance(), runs=runs, ratios=ratios, seconds=round(time.time() - started, 1))
    write_whole(OUT, json.dumps(res, indent=1) + '\n')
    print(ratios)


if __name__ == '__main__':
    main()
