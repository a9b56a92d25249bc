"""Runs a program that starts others, and takes them all along when the process that asked for it
ends.

    python -I core/keeper.py PARENT PROGRAM [ARGUMENT ...]

The kernel tells only a child that its parent ended, and no child of that child: a compiler's driver
would go and leave the compiler. So this waits in between. It leads a process group, is told, and
ends the whole group.
"""

import ctypes
import os
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1


def end_all(*_: object) -> None:
    os.killpg(0, signal.SIGKILL)


def main(parent: int, command: list[str]) -> int:
    signal.signal(signal.SIGTERM, end_all)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the kernel was told
        end_all()
    try:
        status = subprocess.call(command)
    except OSError as error:
        print(error, file=sys.stderr)
        return 127
    if status < 0:  # ended by a signal, and so does this
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
