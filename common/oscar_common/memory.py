"""How much memory there is to fill."""


def free_memory() -> int:
    """Return the bytes of memory that are free on this machine, within what this process is still allowed."""
    import psutil
    from distributed.system import MEMORY_LIMIT  # a cgroup's, too

    allowed = MEMORY_LIMIT - psutil.Process().memory_info().rss
    return int(max(0, min(psutil.virtual_memory().available, allowed)))
