"""The folder in which a worker keeps its stores: whose it is, that nobody else uses it, that its disk is local.

Knows neither Kafka nor what lies in the stores. The lock is flock's: it ends with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from pathlib import Path
from types import TracebackType

from state.errors import StateDirectoryInUse, StateError, StoreFull, UnsuitableFileSystem

# LMDB maps its file and locks pages in shared memory: on these, two machines would see two truths.
NETWORK_FILE_SYSTEMS = frozenset(
    {"afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "smb3", "smbfs"}
    | {"fuse.ceph", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs"}
)
# A worker takes the next free folder; more on one machine than this is taken for a mistake.
WORKERS_MAX = 256


def file_system_of(path: Path, mountinfo: str) -> str | None:
    """The type of the file system that `path` (absolute, no links) lies on, as /proc/self/mountinfo tells.

    None: no line of it fits.
    """
    best, kind = "", None
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) < 5 or not right:
            continue
        # blanks in names are written as octal
        mount = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
        # of two mounts on one point the later one lies on top
        if len(mount) >= len(best) and path.is_relative_to(mount):
            best, kind = mount, right.split()[0]
    return kind


def refuse_network_file_system(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> None:
    """Raises UnsuitableFileSystem if `path` lies on a network file system; without /proc nothing is checked."""
    try:
        table = mountinfo.read_text()
    except OSError:
        return
    kind = file_system_of(path.resolve(), table)
    if kind in NETWORK_FILE_SYSTEMS:
        raise UnsuitableFileSystem(
            f"the state directory {path} is on a network file system ({kind}), where the store's locks and memory map "
            "do not hold; choose a local disk with --state-dir (the store is rebuilt from the changelog)"
        )


class StateDirectory:
    """A worker's folder, locked until `close`.

    instance_id  kept in the folder, so that a restarted worker is the same one to Kafka
    """

    def __init__(self, path: Path, instance_id: str | None = None) -> None:
        """Lock the folder (it is made if it is not there).

        instance_id  from now on this folder's; None: the kept one, or a new one.
        Raises StateDirectoryInUse, UnsuitableFileSystem, StoreFull.
        """
        self.path = path
        refuse_network_file_system(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _explained(error, path) from error
        try:
            self._hold()
            self.instance_id = self._instance(instance_id)
        except OSError as error:
            os.close(self._lock)
            raise _explained(error, path) from error
        except BaseException:
            os.close(self._lock)
            raise

    @classmethod
    def next_free(cls, root: Path) -> StateDirectory:
        """The first folder worker-1, worker-2, … under `root` that no running worker holds.

        Raises UnsuitableFileSystem, StoreFull, and StateDirectoryInUse when all 256 are held.
        """
        for number in range(1, WORKERS_MAX + 1):
            try:
                return cls(root / f"worker-{number}")
            except StateDirectoryInUse:
                continue
        raise StateDirectoryInUse(
            f"all {WORKERS_MAX} state directories under {root} are in use; name one with --state-dir"
        )

    def store_path(self, partition: int) -> Path:
        """Where the store of a partition lies; whether it is there is the store's business."""
        return self.path / f"partition-{partition}"

    def stored_partitions(self) -> list[int]:
        """The partitions that have a store here, in order."""
        found = (re.fullmatch(r"partition-(\d+)", entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def remove_store(self, partition: int) -> None:
        """Remove the store of a partition, which must be closed; it is rebuilt from the changelog."""
        path = self.store_path(partition)
        if path.exists():
            shutil.rmtree(path)

    @property
    def fencings(self) -> int:
        """How often a worker on this folder was fenced: `note_fencing`."""
        try:
            return int((self.path / "fencings").read_text())
        except (OSError, ValueError):  # never, or a file cut short by a crash: a count to watch, not a truth
            return 0

    def note_fencing(self) -> None:
        """Count that the worker on this folder was fenced."""
        count = self.fencings + 1
        with contextlib.suppress(OSError):  # a full disk is no reason to hide the fencing itself
            (self.path / "fencings").write_text(f"{count}\n")

    def close(self) -> None:
        """Let another worker have the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> StateDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hold(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip()
            raise StateDirectoryInUse(
                f"the state directory {self.path} is held by another worker (process {holder or 'unknown'}); "
                "stop that one or give this one its own with --state-dir"
            ) from None
        except OSError as error:
            raise UnsuitableFileSystem(
                f"the state directory {self.path} cannot be locked ({error.strerror}); choose another with --state-dir"
            ) from error
        os.pwrite(self._lock, f"{os.getpid():<20}\n".encode(), 0)

    def _instance(self, given: str | None) -> str:
        file = self.path / "instance"
        kept = file.read_text().strip() if file.exists() else ""
        instance = given or kept or secrets.token_hex(6)
        if instance != kept:
            # renamed into place: a crash leaves the old id or the new one, never half of one
            new = file.with_suffix(".new")
            new.write_text(instance + "\n")
            new.replace(file)
        return instance


def _explained(error: OSError, path: Path) -> StateError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(f"the disk of the state directory {path} is full; make room and start the worker again")
    return UnsuitableFileSystem(
        f"the state directory {path} cannot be used ({error.strerror}); choose another one with --state-dir"
    )
