"""What only POSIX systems have, so that nothing else imports it: Windows has neither module.

    lock(handle)      an exclusive lock on an open file or folder, until it is closed
    page_faults()     how often this process waited for a page from a disk
    resident_peak()   the most memory it held (ru_maxrss)

Without them nothing is locked and nothing counted; `MISSING` says so in `qlora doctor`. The alternative, a lock file,
stays behind when a run is killed.
"""

from __future__ import annotations

from types import ModuleType

fcntl: ModuleType | None
resource: ModuleType | None
try:
    import fcntl
except ImportError:
    fcntl = None
try:
    import resource
except ImportError:
    resource = None

MISSING = {  # module -> what its absence costs
    name: cost
    for name, module, cost in (
        ("fcntl", fcntl, "folders are not locked: two runs can write to one"),
        ("resource", resource, "a chat template has no limit on its memory, and waits for the disk are not counted"),
    )
    if module is None
}


def lock(handle: int) -> None:
    """Lock an open file or folder, without waiting.

    Raises:
        BlockingIOError: somebody else holds it.
        OSError: its file system has no locks.
    """
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def page_faults() -> int:
    """Major page faults of this process so far."""
    return 0 if resource is None else int(resource.getrusage(resource.RUSAGE_SELF).ru_majflt)


def resident_peak() -> int:
    """The most memory that this process held, in the unit of its system; 0 where it does not say."""
    return 0 if resource is None else int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
