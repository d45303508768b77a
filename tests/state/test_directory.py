"""A state directory: one worker each, an instance id that stays, and never on a network file system."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from state.directory import StateDirectory, file_system_of, refuse_network_file_system
from state.errors import StateDirectoryInUse, UnsuitableFileSystem
from state.partition_store import PartitionStore

MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
40 27 0:50 / /data rw,relatime shared:7 master:2 - nfs4 server:/data rw
41 40 0:51 / /data/local\\040disk rw - xfs /dev/vdb rw
42 27 0:52 / /home rw - ext4 /dev/vdc rw
43 27 0:53 / /home rw - fuse.sshfs me@there: rw
a line of another kernel
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/data", "nfs4"),
        ("/data/state/worker-1", "nfs4"),
        ("/database", "ext4"),
        ("/data/local disk/state", "xfs"),
        ("/home/me", "fuse.sshfs"),
    ],
)
def test_the_file_system_of_a_path_is_that_of_its_deepest_latest_mount(path: str, kind: str) -> None:
    assert file_system_of(Path(path), MOUNTS) == kind


def test_a_network_file_system_is_refused_and_named(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 0:1 / {tmp_path} rw - nfs4 server:/x rw\n")

    with pytest.raises(UnsuitableFileSystem, match=r"network file system \(nfs4\)") as refused:
        refuse_network_file_system(tmp_path / "state" / "not there yet", mounts)

    assert "\n" not in str(refused.value)
    refuse_network_file_system(tmp_path, tmp_path / "no such file")


def test_a_directory_has_one_worker_at_a_time(tmp_path: Path) -> None:
    with StateDirectory(tmp_path / "state") as held:
        with pytest.raises(StateDirectoryInUse, match=r"held by another worker \(process \d+\)") as refused:
            StateDirectory(tmp_path / "state")
        assert "\n" not in str(refused.value)

    with StateDirectory(tmp_path / "state") as again:
        assert again.instance_id == held.instance_id


def test_a_killed_worker_leaves_its_directory_free(tmp_path: Path) -> None:
    code = "import sys, time; from state.directory import *; d = StateDirectory(Path(sys.argv[1]))\n"
    code += "print(d.instance_id, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        instance = worker.stdout.readline().strip()
        with pytest.raises(StateDirectoryInUse, match=f"process {worker.pid}"):
            StateDirectory(tmp_path)
        worker.send_signal(signal.SIGKILL)

    with StateDirectory(tmp_path) as successor:
        assert successor.instance_id == instance


def test_a_second_default_worker_takes_the_next_free_directory(tmp_path: Path) -> None:
    with StateDirectory.next_free(tmp_path) as first, StateDirectory.next_free(tmp_path) as second:
        assert [first.path.name, second.path.name] == ["worker-1", "worker-2"]
        assert first.instance_id != second.instance_id
        first.close()
        with StateDirectory.next_free(tmp_path) as third:
            assert third.instance_id == first.instance_id


def test_an_instance_id_that_is_given_stays_with_the_directory(tmp_path: Path) -> None:
    with StateDirectory(tmp_path, "gpu-7") as given:
        assert given.instance_id == "gpu-7"
    with StateDirectory(tmp_path) as kept:
        assert kept.instance_id == "gpu-7"


def test_a_path_that_cannot_be_a_directory_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnsuitableFileSystem, match="choose another one with --state-dir"):
        StateDirectory(tmp_path / "file")


def test_stores_are_found_and_removed_by_partition(tmp_path: Path) -> None:
    with StateDirectory(tmp_path) as directory:
        for partition in (10, 2):
            PartitionStore(directory.store_path(partition)).close()
        (tmp_path / "partition-x").mkdir()
        assert directory.stored_partitions() == [2, 10]

        directory.remove_store(2)
        directory.remove_store(3)

        assert directory.stored_partitions() == [10]
