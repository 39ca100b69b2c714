"""Installs this repository, editable, into the environment of the Python that runs this.

    .venv/bin/python requirements/install.py plots tokenizers        with these extras of pyproject.toml

Like `pip install --editable ".[plots,tokenizers]"`, but faster: the C++ library is compiled while pip, which uses one
core, installs packages, and bytecode is left to the first import. With PYTHONDONTWRITEBYTECODE, as in many containers,
no import would write it, and every start would compile JAX again; it is written here then. CONSTRAINTS=FILE
pins versions.
"""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = ROOT / "build"
TOOLS = BUILD / "tools"  # setuptools and the headers of the library, apart from the environment's jaxlib
LIBRARY = BUILD / "library" / "bitnet_kernels" / "_cpu.so"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-compile"]


def main(extras: list[str]) -> None:
    project = PROJECT["project"]
    packages = project["dependencies"] + [
        p for extra in extras for p in project["optional-dependencies"][extra]
    ]
    constraints = ["--constraint", os.environ["CONSTRAINTS"]] if os.environ.get("CONSTRAINTS") else []
    tools = PROJECT["build-system"]["requires"]
    with_tools = {**os.environ, "PYTHONPATH": str(TOOLS)}

    LIBRARY.unlink(missing_ok=True)
    subprocess.run([*PIP, "--quiet", "--no-deps", "--upgrade", "--target", str(TOOLS), *tools], check=True)
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(BUILD / "library")]
    with subprocess.Popen(build, cwd=ROOT, env=with_tools) as compiler:
        try:
            subprocess.run([*PIP, *constraints, *packages], cwd=ROOT, check=True)
        except BaseException:
            compiler.terminate()
            raise
        print("waiting for the C++ compiler", flush=True)
    if LIBRARY.exists():  # otherwise setup.py has said why
        with_tools["BITNET_KERNELS_PREBUILT"] = str(LIBRARY)
    editable = ["--no-deps", "--no-build-isolation", "--editable", "."]
    subprocess.run([*PIP, *editable], cwd=ROOT, env=with_tools, check=True)
    write_bytecode("bitnet_jax.inference.streaming", "bitnet_jax.model_folders", "bitnet_jax.training.loop")


def write_bytecode(*modules: str) -> None:
    """Compiles modules and all that they import, if imports are not to write bytecode."""
    if sys.dont_write_bytecode:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        subprocess.run([sys.executable, "-c", f"import {', '.join(modules)}"], env=environment, check=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except subprocess.CalledProcessError as error:  # the command has said why
        sys.exit(error.returncode)
    except KeyboardInterrupt:
        sys.exit(130)
