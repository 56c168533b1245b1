"""The number of CPUs that a process may use, from control groups as Linux shows them to a container; spinning threads."""

import math
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, {"GOMP_SPINCOUNT": cpus.SPINS}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_spinning_is_limited_unless_the_user_says_how_threads_wait(given, expected):
    cpus.limit_spinning(given)
    assert given == expected


def test_the_package_limits_spinning_before_it_imports_pytorch(tmp_path):
    # Stands for the first heavy library that is imported, whichever it is.
    for library in ("torch", "transformers", "huggingface_hub", "safetensors", "numpy"):
        (tmp_path / f"{library}.py").write_text("import os; raise SystemExit(os.environ['GOMP_SPINCOUNT'])")
    variables = {name: value for name, value in os.environ.items() if name not in cpus.WAIT_VARIABLES}
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", "import binaryvit_hf"],
        env=variables | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.stderr.strip() == cpus.SPINS
