"""Limits on what a stranger's program may take: the time and memory of a chat template.

jinja2's sandbox keeps a template from files and attributes, not from `range` in `range` or from
`"a" * 10 ** 10`.
"""

import os
import signal
import threading
from contextlib import contextmanager

try:
    import resource
except ImportError:  # not on Windows
    resource = None

STATM = "/proc/self/statm"  # Linux: its first number is the pages of the address space
PAGE = resource.getpagesize() if resource and os.path.exists(STATM) else None


@contextmanager
def bounded(seconds=5.0, nbytes=2**29):
    """Raise TimeoutError after so many seconds, MemoryError for so many bytes more than before.

    Time is bounded on the main thread only (signals go there), memory on Linux only.
    """
    with _alarm(seconds), _memory(nbytes):
        yield


@contextmanager
def _alarm(seconds):
    if not hasattr(signal, "SIGALRM") or threading.current_thread() != threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise TimeoutError(f"it takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory(nbytes):
    if PAGE is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open(STATM, "rb", buffering=0) as f:  # once per rendered text: it has to be quick
        now = int(f.read().split()[0]) * PAGE
    limits = [now + nbytes, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    except MemoryError as error:
        raise MemoryError(f"it takes more than {nbytes // 2**20} MB of memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
