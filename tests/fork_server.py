"""multiprocessing's fork server as one of :mod:`forks`: its processes have Composer's imports behind them.

``composer -n 2 tests/fork_server.py YAML [key=value ...]`` is ``scripts/train.py`` whose ranks' uploads are forked.
"""

import multiprocessing
import os
import subprocess
import sys
from multiprocessing import forkserver, util


def use_forks(patch=setattr, start=None) -> None:
    """Let processes that multiprocessing would spawn be forked, by a server that is forked.

    Args:
        patch: as ``setattr``, for what lasts as long as a test.
        start: :class:`forks.Popen`. Default: that of this program, which is forked itself.
    """
    contexts, forks, plain = multiprocessing.get_context, multiprocessing.get_context('forkserver'), util.spawnv_passfds
    forks.set_forkserver_preload([])

    def spawn(path, args, files):
        if 'multiprocessing.forkserver' not in args[-1]:
            return plain(path, args, files)
        listener, alive = files
        use_forks.server = (start or subprocess.Popen)([sys.executable, __file__], stdin=listener, stdout=alive)
        return use_forks.server.pid

    patch(util, 'spawnv_passfds', spawn)
    patch(multiprocessing, 'get_context', lambda how=None: forks if how == 'spawn' else contexts(how))


def serve() -> None:
    """The server: its listener is stdin, and stdout the pipe that closes when nobody needs it any more."""
    ends = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    forkserver.main(*ends, [])


if __name__ == '__main__':
    if len(sys.argv) == 1:
        serve()
    from dhrd_plugin.training.run import main

    use_forks()
    sys.exit(main())
