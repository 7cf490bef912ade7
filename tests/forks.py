"""Programs that start at once: ``Popen`` forks them from a process that has the 11 s of Composer's imports behind it.

A program is the child of whoever starts it, as the ranks of a launcher and the cells of a comparison that were started
so are theirs: ids, groups, signals, exit statuses and pipes are those of ``subprocess.Popen``. Each has one thread, and
what is read while importing is that of the tests, see ``FIXED``. A server ends with the process that it serves.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import io
import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from setproctitle import setproctitle

COMPOSER = os.path.join(os.path.dirname(sys.executable), 'composer')
PRELOADED = ('composer.cli.launcher', 'dhrd_plugin.comparison.cells', 'dhrd_plugin.evaluate', 'peft', 'streaming')
THREADS = {'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'passive'}
FIXED = ('HF_HOME', 'HF_HUB_OFFLINE')
START = {**os.environ, **THREADS}
OPTIONS = {'cwd', 'env', 'start_new_session', 'stdin', 'stdout', 'stderr', 'text'}
PR_SET_CHILD_SUBREAPER = 36


class Popen(subprocess.Popen):
    """``python FILE``, ``python -m MODULE`` or the ``composer`` command, forked; any other command as ever."""

    def __init__(self, args, **options):
        words = [os.fspath(word) for word in args] if isinstance(args, (list, tuple)) else [args]
        python = words[0] == sys.executable and not words[1].startswith('-c')
        self.program = None
        if (python or words[0] == COMPOSER) and options.keys() <= OPTIONS:
            self.program = {
                'words': words[1:] if python else words,
                'parent': os.getpid(),
                'cwd': os.path.abspath(options.get('cwd') or '.'),
                'env': {**(options.get('env') or os.environ), **THREADS},
                'session': options.get('start_new_session', False),
            }
            if changed := [name for name in FIXED if self.program['env'].get(name) != START.get(name)]:
                raise ValueError(f'{changed}: is read while importing; start a plain process')
        super().__init__(args, **options)

    def _execute_child(self, *plan):
        if self.program is None:
            return super()._execute_child(*plan)
        pipes = plan[10:16]  # both ends of stdin, stdout and stderr; -1: the caller's
        ends = [number if end == -1 else end for number, end in enumerate((pipes[0], pipes[3], pipes[5]))]
        server = _server()
        _adopt(True)
        try:
            socket.send_fds(server, [pickle.dumps(self.program)], ends)
            self.pid = int(server.recv(32) or 0)
        finally:
            _adopt(False)
        if not self.pid:
            raise ChildProcessError('the server that forks programs has ended')
        self._child_created = True
        self._close_pipe_fds(*pipes)


def run_ranks(ranks, *arguments, timeout=600.0, start=Popen, status=0, **options) -> subprocess.CompletedProcess:
    """Run ``composer -n RANKS ...`` to its end, which comes in ``timeout`` seconds; its output is text.

    It has to end with ``status``; with None it may end with any.
    """
    command = [COMPOSER, '-n', str(ranks), *map(str, arguments)]
    with start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            output = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    assert status in (None, process.returncode), ''.join(output)[-3000:]
    return subprocess.CompletedProcess(command, process.returncode, *output)


def _adopt(on: bool) -> None:
    """Whether this process becomes the parent of what its descendants leave behind."""
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0):
        raise OSError('PR_SET_CHILD_SUBREAPER')


@functools.cache
def _server() -> socket.socket:
    """Of a process that nothing has been forked for yet: its server, in a new Python."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        command = [sys.executable, __file__, str(its.fileno())]
        files = {'stdin': subprocess.DEVNULL, 'stdout': subprocess.DEVNULL, 'pass_fds': [its.fileno()]}
        subprocess.Popen(command, env=START, **files)
    return ours


# ------------------------------------------------------------------------------------ the server's side


def _serve(server: socket.socket) -> tuple[dict, list[int]]:
    """Fork what is asked for; returns in the programs only, each a child of the process that asked."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    os.chdir('/')
    while True:
        message, files, *_ = socket.recv_fds(server, 1 << 20, 3)
        if not message:
            os._exit(0)
        if child := os.fork():
            os.waitpid(child, 0)
            for file in files:
                os.close(file)
            continue
        between = os.getpid()
        if os.fork():
            os._exit(0)  # orphans the program, which the asking process then adopts
        program = pickle.loads(message)
        while os.getppid() == between:
            time.sleep(0.0002)
        if os.getppid() != program['parent']:  # it has ended
            os._exit(1)
        if program['session']:
            os.setsid()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.chdir(program['cwd'])
        server.send(b'%d' % os.getpid())
        server.close()
        return program, files


def _become(program: dict, files: list[int]) -> None:
    """Take on what Python takes from the process that starts it."""
    import numpy

    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(program['env'])
    numpy.random.seed()
    checkpoint = sys.modules['composer.utils.checkpoint']  # which makes this name, of a rank's shard, while importing
    checkpoint._TORCH_DISTRIBUTED_CHECKPOINTS_FILENAME = f'__{os.environ.get("RANK", 0)}_0.distcp'
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()
    more = os.environ.get('PYTHONPATH', '').split(os.pathsep)
    sys.path[1:1] = [folder for folder in more if folder and folder not in sys.path]
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    if os.environ.get('PYTHONUNBUFFERED'):
        for name, number in (('stdout', 1), ('stderr', 2)):
            before = getattr(sys, name)
            file = io.FileIO(number, 'w', closefd=False)
            setattr(sys, name, io.TextIOWrapper(file, before.encoding, before.errors, write_through=True))
    setproctitle(' '.join([sys.executable, *program['words']]))


def main() -> None:
    """Import, serve, and in each program run it."""
    setproctitle(f'{sys.executable} {__file__}')  # as long as the environment is where it finds it
    server = socket.socket(fileno=int(sys.argv[1]))
    gc.disable()
    for module in PRELOADED:
        __import__(module)
    transformers, composer = sys.modules['transformers'], sys.modules['composer']
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.CONFIG_MAPPING):
        list(mapping.values())  # imports them all, as a run does
    composer.utils.collect_env.get_cpu_model()  # once: it starts a process
    gc.collect()
    gc.freeze()
    gc.enable()
    others = [task for task in Path('/proc/self/task').iterdir() if task.name != str(os.getpid())]
    assert {(task / 'comm').read_text() for task in others} <= {
        'jemalloc_bg_thd\n'
    }  # it knows that forks leave it behind
    program, files = _serve(server)
    while True:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork():
            break
        for file in files:  # the server of what this program starts
            os.close(file)
        ours.close()
        program, files = _serve(its)
    its.close()
    _become(program, files)
    global _server
    _server = functools.cache(lambda: ours)
    subprocess.Popen = Popen
    _end(_status_of(program['words']))


def _run(words: list[str]) -> None:
    first, *sys.argv[1:] = words
    if first == '-m':
        sys.argv.pop(0)
        sys.path[0] = os.getcwd()
        runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
    else:
        sys.argv[0] = first
        sys.path[0] = os.path.dirname(os.path.realpath(first))
        runpy.run_path(first, run_name='__main__')


def _status_of(words: list[str]) -> int:
    """Run a program; its exit status, and on stderr what Python says of an error that it does not catch."""
    try:
        _run(words)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _end(status: int) -> None:
    """As Python ends, but for taking down what was imported, which takes seconds where other processes run."""
    threading._shutdown()
    atexit._run_exitfuncs()
    gc.collect()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status & 0xFF)


if __name__ == '__main__':
    main()
