"""What machine a measurement was made on."""

import os
import platform
from datetime import datetime, timezone
from pathlib import Path


def machine() -> dict[str, str | float]:
    """Return the processor, the cores this process may use, memory, load, Python's version and the date."""
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "?:?")
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
