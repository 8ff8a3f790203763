"""What a process holds in memory, as Linux counts it."""


def smaps(pid="self"):
    """{field: bytes} of /proc/PID/smaps_rollup: Rss, Pss, Private_Dirty, Anonymous, …"""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        lines = [line.split() for line in file.readlines()[1:]]
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}


def private_bytes(pid="self"):
    """Bytes that nobody shares and no file backs: Rss would count a file's mapped pages too."""
    return smaps(pid)["Anonymous"]
