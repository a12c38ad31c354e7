"""Free memory is what is available, within what the control groups allow."""

from pathlib import Path

import psutil
import pytest

from pruning.kit.memory import free_memory

GB = 1 << 30
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
V2 = ("memory.max", "memory.current", "")


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """20 GB are available on it."""
    machine = psutil.virtual_memory()._replace(available=20 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)


def group(folder: Path, version, limit, used: float, files: float = 0.0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    most, usage, prefix = version
    (folder / most).write_text(f"{limit if limit == 'max' else int(limit * GB)}\n")
    (folder / usage).write_text(f"{int(used * GB)}\n")
    half = int(files * GB / 2)
    stat = f"anon 17\n{prefix}inactive_file {half}\n{prefix}active_file {half}\nshmem 4096\n"
    (folder / "memory.stat").write_text(stat)


def system(folder: Path, groups: str) -> Path:
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(groups)
    return folder


def test_without_control_groups_it_is_what_the_machine_has_available(tmp_path):
    assert free_memory(tmp_path) == 20 * GB  # no /proc at all
    place = system(tmp_path, "0::/a/b\n")
    assert free_memory(place) == 20 * GB  # no group is mounted
    group(tmp_path / "sys/fs/cgroup/a/b", V2, "max", 3)
    assert free_memory(place) == 20 * GB


def test_a_group_of_version_two_bounds_it_and_files_in_memory_give_way(tmp_path):
    place = system(tmp_path, "0::/a/b\n")
    group(tmp_path / "sys/fs/cgroup/a/b", V2, 8, 5, files=2)
    assert free_memory(place) == 5 * GB
    group(tmp_path / "sys/fs/cgroup/a", V2, 4, 3, files=1)  # its parent has less left
    assert free_memory(place) == 2 * GB
    group(tmp_path / "sys/fs/cgroup/a", V2, 4, 4.5)  # over its limit, as the kernel allows
    assert free_memory(place) == 0
    group(tmp_path / "sys/fs/cgroup/a", V2, 64, 1)
    group(tmp_path / "sys/fs/cgroup/a/b", V2, 64, 1)
    assert free_memory(place) == 20 * GB


def test_a_group_of_version_one_bounds_it_alike(tmp_path):
    lines = "9:name=systemd:/x\n7:cpu,cpuacct:/job\n4:hugetlb,memory:/job\n0::/\n"
    place = system(tmp_path, lines)
    group(tmp_path / "sys/fs/cgroup/cpu/job", V1, 1, 1)  # of another controller
    group(tmp_path / "sys/fs/cgroup/memory/job", V1, 6, 4, files=1)
    assert free_memory(place) == 3 * GB


def test_in_a_container_the_group_at_the_root_is_the_own_one(tmp_path):
    """The path is that of the host, and is not mounted."""
    place = system(tmp_path, "4:memory:/docker/0a1b2c\n")
    group(tmp_path / "sys/fs/cgroup/memory", V1, 2, 1)
    assert free_memory(place) == 1 * GB


def test_here_it_is_some_but_not_more_than_there_is():
    assert 0 < free_memory() <= 20 * GB
