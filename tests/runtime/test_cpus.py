"""The number of CPUs that a process may use: control groups as Linux shows them to a container."""

import math

import pytest

from binaryvit_runtime import cpus


@pytest.fixture
def groups(tmp_path):
    """Write the files of control groups: `groups(own, {"folder/file": content})`. Returns both arguments to read them."""

    def write(own: str, files: dict[str, str]):
        (tmp_path / "cgroup").write_text(own)
        for name, content in files.items():
            file = tmp_path / "mounted" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        return tmp_path / "cgroup", tmp_path / "mounted"

    return write


@pytest.mark.parametrize(
    "own, files, expected",
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {}, math.inf),
        ("0::/pod/app\n", {"pod/app/cpu.max": "max 100000\n", "pod/cpu.max": "200000 100000\n"}, 2),
        ("0::/path/of/the/host\n", {"cpu.max": "50000 100000\n"}, 0.5),
        (
            "4:memory:/x\n1:cpu,cpuacct:/x\n",
            {"cpu/x/cpu.cfs_quota_us": "300000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("1:cpuset:/\n0::/\n", {"cpu.max": "damaged"}, math.inf),
    ],
)
def test_the_limit_of_a_container_is_read(groups, own, files, expected):
    assert cpus.container_cpus(*groups(own, files)) == expected


def test_a_limit_below_the_affinity_counts_and_a_share_of_a_cpu_is_one(groups, monkeypatch):
    monkeypatch.setattr(cpus.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for quota, expected in (("150000", 2), ("20000", 1), ("max", 64), ("9900000", 64)):
        own, mounted = groups("0::/\n", {"cpu.max": f"{quota} 100000\n"})
        monkeypatch.setattr(cpus, "OF_PROCESS", own)
        monkeypatch.setattr(cpus, "CGROUPS", mounted)
        assert cpus.available_cpus() == expected


def test_systems_without_control_groups_have_no_limit(tmp_path):
    assert cpus.container_cpus(tmp_path / "missing", tmp_path) == math.inf
