"""Work on strangers' files in a process of its own, with bounds: `saebench submit --isolate`.

What is bounded                 how
memory                          address space of the process (RLIMIT_AS); not with a GPU, whose driver reserves more
                                addresses than any bound would allow
time                            wall clock, by the process that waits; CPU time (RLIMIT_CPU)
network                         an own network namespace without interfaces, where the kernel gives one; everywhere,
                                Python's own sockets are refused
secrets                         an environment of a few harmless variables, and no token of the Hub

It is a second wall and no sandbox: nothing in a checkpoint is run as code in the first place, and files that the user
can read can be read by the process. Only the standard library is imported here, because a process that has threads
can no longer leave its network.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from saebench.errors import UserError

_GIB = 1024**3
_NEW_USER, _NEW_NET = 0x10000000, 0x40000000
_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES = 1, 38
_NETWORK = {
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyaddr",
    "socket.gethostbyname",
    "socket.sendmsg",
    "socket.sendto",
}
_KEPT = {
    "COLUMNS",
    "CUDA_VISIBLE_DEVICES",
    "HF_DATASETS_CACHE",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "MKL_NUM_THREADS",
    "MPLCONFIGDIR",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "PATH",
    "PYTHONPATH",
    "TERM",
    "TMPDIR",
    "XDG_CACHE_HOME",
}
_SET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_TOKEN_PATH": os.devnull,
    "MALLOC_ARENA_MAX": "4",  # each arena reserves addresses, and there is one for every thread
}
_CHILD = (
    "import sys; from saebench import isolation; isolation.enter(sys.argv.pop(1)); "
    "sys.argv[0] = 'saebench'; from saebench.cli import main; sys.exit(isolation.guarded(main))"
)
_OWN_CODES = (0, 1, 2, 130)
"""Of the command line; the C library ends a process that has no memory for a thread with another."""
_NO_ROOM = ("allocate memory", "start new thread", "failed to map", "std::bad_alloc")


class Bounds(NamedTuple):
    """What the process may use."""

    memory: int | None
    """Bytes of address space; None where it is not bounded."""
    seconds: float


class Killed(UserError):
    """The process was ended before it was done."""


def run(arguments: Sequence[str], bounds: Bounds) -> int:
    """The same command in a process of its own: its exit code. Raises `Killed` where it did not end by itself."""
    command = [sys.executable, "-P", "-c", _CHILD, json.dumps(bounds), *arguments]
    environment = clean_environment(os.environ)
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            code = process.wait(timeout=bounds.seconds)
        except subprocess.TimeoutExpired:
            _kill(process)
            raise Killed(
                f"stopped after {bounds.seconds / 60:g} minutes (--isolate-minutes); what was finished is kept, and "
                "the same command with more of them goes on from there"
            ) from None
        except BaseException:
            _kill(process)
            raise
    if code not in _OWN_CODES:
        ended = signal.Signals(-code).name if code < 0 else f"the code {code}"
        raise Killed(
            f"the isolated process ended with {ended}, most likely for want of memory "
            f"({_of_memory(bounds.memory)}); give it more with --isolate-memory"
        )
    return code


def clean_environment(given: Mapping[str, str]) -> dict[str, str]:
    """A few variables that are no secrets, and the Hub's libraries offline and without a token."""
    return {name: value for name, value in given.items() if name in _KEPT} | _SET


def enter(bounds: str) -> None:
    """In the new process, before anything heavy is imported: from here on it is bounded, and says how."""
    memory, seconds = json.loads(bounds)
    with suppress(OSError, AttributeError):  # Linux alone has these
        libc = ctypes.CDLL(None)
        libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    network = "own network namespace" if own_network() else "no namespace to be had"
    sys.addaudithook(_refuse_network)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_CPU, int(seconds * (os.cpu_count() or 1)) + 1)
    if memory is not None:
        _lower(resource.RLIMIT_AS, memory)
    sys.stderr.write(
        f"isolated: {_of_memory(memory)}, {seconds / 60:g} minutes, no network ({network}, Python's sockets refused), "
        "an environment without secrets\n"
    )


def guarded(main: Callable[[], int]) -> int:
    """`main`, with one message where memory ends."""
    try:
        return main()
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        if not ran_out(error):
            raise
        sys.stderr.write(f"saebench: {no_memory()}\n")
        return 2


def ran_out(error: BaseException) -> bool:
    """Whether an allocation failed in a process whose address space is bounded."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return False
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, MemoryError) or any(part in str(error) for part in _NO_ROOM)


def no_memory() -> UserError:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return UserError(
        f"out of memory: this process may use {limit / _GIB:.3g} GiB. Give it more (--isolate-memory, or ulimit -v "
        "where that was set); what was finished is kept"
    )


def own_network() -> bool:
    """Leaves the network for a namespace that has none. False where the kernel does not allow it."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NET) == 0:
        return True
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_USER | _NEW_NET) != 0:
        return False
    with suppress(OSError):  # without these one is nobody there, and still has no network
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return True


def _refuse_network(event: str, _arguments: tuple[object, ...]) -> None:
    if event in _NETWORK:
        raise PermissionError(errno.EPERM, f"no network in an isolated process ({event})")


def _lower(limit: int, most: int) -> None:
    _, hard = resource.getrlimit(limit)
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(limit, (wanted, wanted))


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _of_memory(memory: int | None) -> str:
    return "memory without a bound" if memory is None else f"{memory / _GIB:.3g} GiB of memory"
