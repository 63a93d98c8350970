"""What keeping freed memory saves: seconds of forward and backward of a ResNet-20; writes results/benchmarks/memory.json.

    python benchmarks/memory.py         # no data; about two minutes on 2 idle cores, Linux
"""
import json, subprocess, sys, time
from statistics import median
from published import record

step = '''
import json, sys, time, torch, torch.nn.functional as F
from aoe_nb.models import resnet20
from aoe_nb.device import keep_memory
if sys.argv[1] == 'kept': assert keep_memory()
net,res = resnet20().to(memory_format=torch.channels_last).train(),{}
for n in 128,256,512:
    x,y = torch.rand(n,3,32,32).to(memory_format=torch.channels_last),torch.randint(0, 10, (n,))
    for k in range(4):
        t = time.time(); F.cross_entropy(net(x), y).backward(); res[n] = time.time()-t # the last counts
print(json.dumps(res))
'''

if __name__ == '__main__':
    t,repeats,all_ = time.time(),7,{'as it is': [], 'kept': []}
    for _ in range(repeats): # alternating, each in a process of its own
        for k in all_: all_[k].append(json.loads(subprocess.run([sys.executable, '-c', step, k], capture_output=True, text=True, check=True).stdout))
    res = {k: {n: round(median(o[n] for o in v), 3) for n in v[0]} for k,v in all_.items()}
    record('memory', dict(model='resnet20', unit='s', repeats=repeats), t, 'benchmarks', seconds_a_step=res)
    print(res)
