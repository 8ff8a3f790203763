"""What a process holds in memory, as Linux counts it."""

import ctypes


class Mallinfo2(ctypes.Structure):
    """glibc's malloc.h."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def kept_bytes():
    """Bytes that this process has freed and glibc has not given back; 0 where it cannot tell."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = Mallinfo2
    return libc.mallinfo2().fordblks


def smaps(pid="self"):
    """{field: bytes} of /proc/PID/smaps_rollup: Rss, Pss, Private_Dirty, Anonymous, …"""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        lines = [line.split() for line in file.readlines()[1:]]
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}


def private_bytes(pid="self"):
    """Bytes that nobody shares and no file backs: Rss would count a file's mapped pages too."""
    return smaps(pid)["Anonymous"]
