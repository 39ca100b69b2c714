"""Writes ci-py<version>.txt: every version that pip chooses for an empty environment, nothing installed.

    python3.11 requirements/lock.py          # or: make lock PYTHON=python3.11

The file belongs to the Python that runs this. Continuous integration passes it to pip as constraints.
"""

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "plots,test,lint,docs"  # what `make test`, `make lint` and `make docs` install
HEADER = "# Written by requirements/lock.py with Python {}; do not edit.\n"


def main() -> None:
    version = "{}.{}".format(*sys.version_info[:2])
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        report = Path(folder) / "report.json"
        pip = [f"{folder}/bin/python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        wanted = ["--dry-run", "--ignore-installed", "--report", str(report), f".[{EXTRAS}]"]
        subprocess.run([*pip, *wanted], cwd=ROOT, check=True)
        chosen = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    pins = sorted(f"{data['name'].lower()}=={data['version']}" for data in chosen)
    lines = "".join(f"{pin}\n" for pin in pins if not pin.startswith("bitnet-jax=="))
    target = ROOT / "requirements" / f"ci-py{version.replace('.', '')}.txt"
    target.write_text(HEADER.format(version) + lines)
    print(f"wrote {target.relative_to(ROOT)}: {len(lines.splitlines())} packages")


if __name__ == "__main__":
    main()
