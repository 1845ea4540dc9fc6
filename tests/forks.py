# SPDX-License-Identifier: MIT
"""Runs of a script in processes of their own, forked from one that has imported everything."""
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENV = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80"}

SERVER = r"""
import atexit, importlib, json, os, sys, time, traceback
root, script, *more = sys.argv[1:]
sys.path[:0] = [root, os.path.join(root, os.path.dirname(script))]
module = importlib.import_module(os.path.basename(script))
for code in more:
    exec(code)
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        code, end = None, time.time() + request["seconds"]
        while code is None and time.time() < end:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.01)
        print(json.dumps(code), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        break
    print(pid, flush=True)
else:
    os._exit(0)
os.setsid()
for fd, name in enumerate((os.devnull, request["out"], request["err"])):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), fd)
os.environ.clear()
os.environ.update(request["env"])
sys.argv = [f"{script}.py", *request["flags"]]
code, whole_exit = 0, False
exec(request["before"])
try:
    module.main()
except SystemExit as e:
    code = e.code or 0
except BaseException:
    traceback.print_exc()
    code = 1
if whole_exit:
    sys.exit(code)
atexit._run_exitfuncs()  # all of an exit but the second that Python takes to free what it has imported
sys.stdout.flush()
os._exit(code)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Forks:
    """Processes that run a script: forked from one that has imported everything, so that a test of real
    signals and exit codes takes no imports. more: code that the one executes, with the script as `module`."""

    def __init__(self, script, folder, *more):
        self.server = subprocess.Popen([sys.executable, "-c", SERVER, str(ROOT), script, *more], cwd=ROOT, text=True,
                                       env={**os.environ, **ENV}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.folder, self.number, self.living = Path(folder), itertools.count(), set()

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *flags, procs=1, before="", env={}):
        """A Job for each of `procs` processes. before: Python code that each of them executes first;
        "whole_exit = True" is part of it where what Python does at last matters."""
        port, jobs = str(free_port()), []
        for rank in range(procs):
            group = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(procs),
                         LOCAL_WORLD_SIZE=str(procs), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            group = group if procs > 1 else {}
            jobs.append(Job(self, [str(f) for f in flags], before, {**os.environ, **ENV, **group, **env}))
        return jobs

    def run(self, *flags, code=0, **options):
        """The same, waited for; all must end with `code`. Returns the first."""
        jobs = self.start(*flags, **options)
        codes = [job.wait() for job in jobs]
        assert codes == [code] * len(jobs), (codes, *(job.out[-1500:] + job.err[-3000:] for job in jobs))
        return jobs[0]

    def close(self):
        for pid in list(self.living):
            os.killpg(pid, signal.SIGKILL)
        self.server.stdin.close()
        self.server.wait()


class Job:
    def __init__(self, forks, flags, before, env):
        self.forks, name = forks, forks.folder / str(next(forks.number))
        self.files = [name.with_suffix(s) for s in (".out", ".err")]
        self.pid = forks.ask(flags=flags, out=str(self.files[0]), err=str(self.files[1]), before=before,
                             env=env)
        forks.living.add(self.pid)

    def wait(self, seconds=120):
        """Its exit code; minus the number of the signal that ended it."""
        code = self.forks.ask(wait=self.pid, seconds=seconds)
        assert code is not None, f"still running after {seconds} s: " + self.err[-3000:]
        self.forks.living.discard(self.pid)
        return code

    def kill(self, number):
        os.kill(self.pid, number)

    out, err = (property(lambda self, k=k: self.files[k].read_text() if self.files[k].exists() else "")
                for k in (0, 1))
