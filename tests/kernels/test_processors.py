"""The number of processors of a process, and quotas of control groups of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitnet_kernels import processors


def settings(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root / "mount"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n", "a/cpu.max": "max 100000\n"}, 1.5),
        (
            "0::/a/b\n",
            {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"},
            2.0,
        ),  # of the group above
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),  # in a container
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
        (
            "1:cpu:/a\n0::/\n",
            {"cpu/a/cpu.cfs_quota_us": "300000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            3.0,
        ),
        (
            "4:cpu,cpuacct:/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("4:memory:/a\n", {"memory/a/cpu.max": "50000 100000"}, None),  # another controller
        ("0::/a\n", {"a/cpu.max": "nonsense"}, None),
        ("", {}, None),
    ],
)
def test_the_quota_is_the_lowest_of_a_group_and_those_above(
    tmp_path: Path, groups: str, files: dict[str, str], expected: float | None
) -> None:
    (tmp_path / "cgroup").write_text(groups)
    assert processors.quota(tmp_path / "cgroup", settings(tmp_path, files)) == expected


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert processors.quota(tmp_path / "absent", tmp_path) is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 4), (0.5, 1), (1.5, 2), (3.0, 3), (64.0, 4)])
def test_threads_are_the_lower_of_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int
) -> None:
    monkeypatch.setattr(processors, "affinity", lambda: 4)
    monkeypatch.setattr(processors, "quota", lambda: quota)
    assert processors.threads() == expected
