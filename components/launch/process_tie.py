"""Run a module in a process that ends when its parent does.

    python -m components.launch.process_tie MODULE ARGUMENTS

torchrun puts each worker into a session of its own, out of reach of a signal to the group, and a killed parent tells
nobody. So every process on the way asks the kernel for its own SIGKILL at its parent's death. KFP starts a step under
``sh``, which outlives a killed runner: there, ``--watch-output`` takes the closing of the standard output's other end
for the runner's death. Such a step is first asked to end, for it may have a cluster's job to take away.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

LAST_S = 30.0
"""For a step's own end."""

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int = 0) -> None:
    """Ask the kernel, where it is Linux, to kill this process when its parent ends.

    Args:
        parent: who started this process, by its own word; 0: who is its parent now. Python takes a while to come
            here, in which the parent may have ended and another taken its place.
    """
    parent = parent or os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have ended before the request, which then never fires.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_reader() -> None:
    """End this process once nobody reads its standard output."""
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)

    def wait() -> None:
        watched.poll()
        # To the main thread, which alone acts on it, and which may wait for the cluster's answer.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        time.sleep(LAST_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True, name="reader").start()


@contextmanager
def told_to_end() -> Iterator[None]:
    """SIGTERM raises SystemExit inside the block, as SIGINT raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """Tie this process, then become the module."""
    arguments = sys.argv[1:]
    if arguments[0] == "--watch-output":
        arguments = arguments[1:]
        die_with_reader()
    else:
        named = arguments[0].partition("--parent=")[2]
        arguments = arguments[1:] if named else arguments
        # torchrun's workers have it from torchrun, whose first own act was to be tied.
        die_with_parent(int(named or os.environ.get("DES_LAUNCHER_PID", "0")))
        os.environ["DES_LAUNCHER_PID"] = str(os.getpid())
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
