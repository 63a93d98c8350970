"One thread for small images, as the notebooks have it; the last thing a run says is what it did not do."

import os
import sys
from pathlib import Path

# Two threads on an image of 8x8 pixels wait for each other, and where another program wants the cores they wait long.
os.environ['OMP_NUM_THREADS'] = '1'
os.environ.setdefault('MPLBACKEND', 'agg')

import torch  # noqa: E402

torch.set_num_threads(1)
sys.path.append(str(Path(__file__).resolve().parent.parent / 'tools'))


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get('skipped', [])
    terminalreporter.section('skipped, and why')
    for report in skipped:
        why = report.longrepr[2].removeprefix('Skipped: ')
        terminalreporter.line(f'{report.nodeid}: {why}')
    if not skipped:
        terminalreporter.line('nothing')
