"""What keeping freed memory saves: seconds of forward and backward of a ResNet-20.

python benchmarks/memory.py         # no data; about two minutes on 2 idle cores, Linux

It writes results/benchmarks/memory.json.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from aoe_nb.record import provenance

OUT = Path(__file__).resolve().parent.parent / 'results/benchmarks/memory.json'
REPEATS = 7

STEP = """
import json, sys, time, torch, torch.nn.functional as F
from aoe_nb.models import resnet20
from aoe_nb.device import keep_memory
if sys.argv[1] == 'kept':
    assert keep_memory()
net = resnet20().to(memory_format=torch.channels_last).train()
seconds = {}
for n in 128, 256, 512:
    x = torch.rand(n, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (n,))
    for k in range(4):
        start = time.time()
        F.cross_entropy(net(x), y).backward()
        seconds[n] = time.time() - start  # the last counts
print(json.dumps(seconds))
"""


def seconds_of(side):
    "Seconds of a step for each batch size, in a process of its own"
    done = subprocess.run([sys.executable, '-c', STEP, side], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main():
    began = time.time()
    seconds = {'as it is': [], 'kept': []}
    for _ in range(REPEATS):  # alternating, so that a slow minute falls on both
        for side, runs in seconds.items():
            runs.append(seconds_of(side))
    res = {side: {n: round(median(o[n] for o in runs), 3) for n in runs[0]} for side, runs in seconds.items()}
    config = dict(model='resnet20', unit='s', repeats=REPEATS)
    about = dict(config=config, seed=0, **provenance(), seconds=round(time.time() - began, 1))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(about | dict(seconds_a_step=res), indent=1))
    print(res)


if __name__ == '__main__':
    main()
