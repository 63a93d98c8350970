"""A whole Slurm on this one machine, for tests and for trying things: `python tools/one_slurm.py COMMAND ...`.

It lives in a temporary folder, with a key, a socket and ports of its own, runs as whoever starts it, and is gone at
the end. Debian and Ubuntu have the programs: slurmctld slurmd slurm-client munge.
"""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

PROGRAMS = 'munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'squeue', 'scancel', 'scontrol'
CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=1
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs():
    "What would have to be installed; the daemons lie where a user's PATH may not lead"
    return [o for o in PROGRAMS if not program(o)]


def program(name):
    return shutil.which(name, path=f'{os.environ["PATH"]}:/usr/sbin:/sbin')


def free_ports(n):
    "Ports that nobody listens on now"
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(n)]
        for o in found:
            o.bind(('127.0.0.1', 0))
        return [o.getsockname()[1] for o in found]


def wait_for(what, said, seconds=120):
    "Until `what()` is true, else an error with what is `said`, words or what gives them"
    end = time.time() + seconds
    while not what():
        if time.time() > end:
            raise TimeoutError(said() if callable(said) else said)
        time.sleep(0.1)


@contextmanager
def daemon(name, *args, env=None):
    "A server in the foreground of its own process, stopped at the end"
    command = [program(name), *map(str, args)]
    quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, env=env, start_new_session=True, **quiet)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def idle():
    "Whether the node has reported"
    said = subprocess.run(['sinfo', '-h', '-o', '%T'], capture_output=True, text=True)
    return said.stdout.strip() == 'idle'


def jobs():
    "State by job, of all that have not ended"
    said = subprocess.run(['squeue', '-h', '-r', '--me', '-o', '%i %T'], capture_output=True, text=True, check=True)
    return dict(line.split() for line in said.stdout.splitlines())


@contextmanager
def one_slurm(cpus=2):
    "A running Slurm with one node of `cpus` processors; SLURM_CONF leads to it until the end"
    with TemporaryDirectory(prefix='slurm') as folder, ExitStack() as stack:
        folder = Path(folder)
        for name in 'state', 'spool':
            (folder / name).mkdir()
        key = folder / 'munge.key'
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        about = dict(host=socket.gethostname().split('.')[0], user=getpass.getuser(), cpus=cpus)
        conf = folder / 'slurm.conf'
        conf.write_text(CONF.format(folder=folder, ports=free_ports(2), **about))
        places = [f'--{o}={folder}/munge.{o}' for o in ('socket', 'pid-file', 'log-file', 'seed-file')]
        stack.enter_context(daemon('munged', '-F', '--force', f'--key-file={key}', *places))
        wait_for((folder / 'munge.socket').exists, 'munged does not start')
        before = os.environ.get('SLURM_CONF')
        os.environ['SLURM_CONF'] = str(conf)
        try:
            stack.enter_context(daemon('slurmctld', '-D', '-f', conf))
            stack.enter_context(daemon('slurmd', '-D', '-f', conf, '-N', about['host']))
            try:
                wait_for(idle, '')
            except TimeoutError:
                logs = '\n'.join((folder / f'{o}.log').read_text()[-1500:] for o in ('slurmctld', 'slurmd'))
                raise TimeoutError(f'Slurm does not start:\n{logs}') from None
            try:
                yield folder
            finally:
                subprocess.run(['scancel', '--me'], capture_output=True)
                wait_for(lambda: not jobs(), 'jobs do not end')
        finally:
            stack.close()
            os.environ.pop('SLURM_CONF')
            if before is not None:
                os.environ['SLURM_CONF'] = before


if __name__ == '__main__':
    if lacking := missing_programs():
        sys.exit(f'Slurm is not installed ({", ".join(lacking)}): apt-get install slurmctld slurmd slurm-client munge')
    with one_slurm():
        code = subprocess.run(sys.argv[1:]).returncode
    sys.exit(code)
