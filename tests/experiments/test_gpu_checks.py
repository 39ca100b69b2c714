"""The list of GPU checks: complete, short enough, and not stopped by a failure."""

from __future__ import annotations

from pathlib import Path

from experiments import gpu_attention, gpu_checks

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_in_the_readme_has_every_check() -> None:
    readme = (ROOT / "kernels" / "README.md").read_text()
    for check in gpu_checks.CHECKS:
        assert check.command.replace("{out}/", "") in readme, check.command
    assert sum(check.seconds for check in gpu_checks.CHECKS) <= 12 * 60


def test_a_failed_check_is_recorded(tmp_path: Path) -> None:
    good, bad, slow = (
        gpu_checks.run(gpu_checks.Check("x", command, 5 if "sleep" not in command else 1), tmp_path)
        for command in ("python -c 'print(1)'", "python -c '1/0'", "python -c 'import time; time.sleep(9)'")
    )
    assert [row["passed"] for row in (good, bad, slow)] == [True, False, False]
    assert "ZeroDivisionError" in bad["message"]
    assert slow["message"] == "not finished after 1 s"


def test_attention_agrees_with_that_of_jax() -> None:
    row = gpu_attention.compare("xla", batch=1, length=16)
    assert max(row["relative_differences"].values()) < 0.02  # bfloat16 keeps 8 bits
