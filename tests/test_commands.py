"""Every command in README.md, CONTRIBUTING.md and the pages in docs/ runs: from an installed wheel, outside the
repository, and from a bare clone.

Commands are extracted from the text and shortened by SHORTER. What a test cannot run is listed in NOT_RUN, with
the reason. A command in neither is run as written.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bitnet_jax.training.config_file import named_configs

pytestmark = pytest.mark.extended

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "bitnet_jax": "bitnet_jax",
    "bitnet_kernels": "kernels/bitnet_kernels",
    "bitnet_experiments": "experiments/bitnet_experiments",
}
# With an argument: the name of a program alone is not a command.
PROGRAM = r"(?:[A-Z_]+=\S+ )?(?:bitnet-jax |make |python -m |pip |pre-commit |git |\.ci/run)"

# pattern -> replacement, all applied in this order: two updates instead of hundreds, a tiny model instead of a large
# one, a placeholder filled in.
SHORTER = (
    (r"^bitnet-jax COMMAND --help$", "bitnet-jax train --help"),
    (r"^bitnet-jax (\w+)$(?<!doctor)", r"bitnet-jax \1 --help"),  # the command is only mentioned
    (r" --config\.training\.steps=\d+", ""),
    (r"^(bitnet-jax train --config .*)", r"\1 --quiet --config.training.steps=2"),
    (r"^(bitnet-jax pack (?!--help).*)", r"\1 --tokens 8"),
    (r"^(bitnet-jax generate .*)", r"\1 --tokens 4"),
    (r"^(bitnet-jax eval .*)", r"\1 --max-tokens 256 --quiet"),
    (r"--preset \w+", "--preset tiny"),
    (r"^(bitnet-jax bench .*)", r"\1 --prompt 4 --generate 2 --repeats 1"),
    (r"<question>", "ternary_penalty"),
    (r"^(bitnet-jax sweep .*)", r"\1 --small"),  # SMALL_STUDY makes it two updates
    (r"^(python -m experiments\.training_cost.*)", r"\1 --rounds 1 --batch-size 1 --length 16"),
    (r"^(python -m experiments\.cpu_limits)$", r"\1 --report"),
    (r"^((?:PYTHON=\S+ )?make) ", r"\1 --dry-run "),
    (r"^\.ci/run$", "bash -n .ci/run"),  # it runs all of this
)
SMALL_STUDY = """
SMALL = {"training.steps": 2, "training.eval_every": 2}
SMALL_ARMS = (BASELINE,)
SMALL_SEEDS = (1337,)
"""
NOT_RUN = {
    r"git clone <this repository> && cd bitnet_jax": "the address is the reader's",
    r"pip install -e \"\.\[([\w,]+)\]\"": "asks an index; that its extras exist is a test below",
    r"pre-commit install": "pre-commit is the reader's own tool",
    r"bitnet-jax generate models/.*": "the reader downloads the model; cli/test_chat.py runs --chat on a tiny one",
    r"bitnet-jax (?:chat|serve) .*": "they wait for messages; cli/test_serve_and_chat.py runs them",
    r"python -m tests\.bitnet_jax\.serving\.screenshot .*": "needs Chromium and a server, as serving/test_page.py",
    r"pip install -e .* && pip install --no-deps [\w-]+": "asks an index",
    r"bitnet-jax .*\bminilm-.*": "the reader installs the model; interop/test_sentence_encoder.py runs a tiny one",
    r"python -m bitnet_jax\.tools\.lm_eval_model": "needs lm-eval; evaluation/test_lm_harness.py runs it",
    r"bitnet-jax sweep .*--executor slurm.*": "needs Slurm; test_slurm.py runs another sweep on one",
    r"bitnet-jax .*\bsmollm2\b.*": "134 million weights; test_bring_your_own_model.py runs these commands",
}


def documented(name: str) -> list[str]:
    """The commands of a page in order of appearance: lines of bash blocks, and inline code."""
    found = []
    for block, code in re.findall(
        r"^```bash\n(.*?)^```$|`([^`\n]+)`", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL
    ):
        lines = block.replace("\\\n", " ").splitlines() or [code]
        found += [re.sub(r"\s+#.*", "", line) for line in lines if re.match(PROGRAM, line)]
    return list(dict.fromkeys(found))


def shortened(command: str) -> str:
    for pattern, replacement in SHORTER:
        command = re.sub(pattern, replacement, command)
    return command


PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))),
)
COMMANDS = [command for name in PAGES for command in documented(name)]
RUN = list(
    dict.fromkeys(
        shortened(command)
        for command in COMMANDS
        if not any(re.fullmatch(pattern, command) for pattern in NOT_RUN)
    )
)
DOCTOR = "bitnet-jax doctor"  # a minute and a half of checks
# In order of appearance: each one continues the previous ones.
REPOSITORY = [
    command for command in RUN if not re.match(r"bitnet-jax (?!sweep |report )", command)
]  # or its studies
INSTALLED = [command for command in RUN if command not in REPOSITORY and command != DOCTOR]


# Runs commands in one process: importing JAX for each takes as long as most of them.
ALL = """
import shlex, sys
from bitnet_jax.cli.main import main
for command in sys.argv[1:]:
    program, *arguments = shlex.split(command)
    assert program == "bitnet-jax", command
    try:
        code = main(arguments)
    except SystemExit as exit:  # --help
        code = exit.code
    if code:
        sys.exit(f"{command}: exit status {code}")
"""


def run_all(commands: list[str], folder: Path, site: Path) -> None:
    """Runs commands that need no shell, as `run`; the first one is also run by itself."""
    run(commands[0], folder, site)
    run(shlex.join(["python", "-c", ALL, *commands]), folder, site)


def run(command: str, folder: Path, site: Path) -> None:
    """Runs a command in a shell, in `folder`, with the packages in `site` and no other copy of them."""
    environment = os.environ | {
        "PATH": os.pathsep.join((str(site / "bin"), str(Path(sys.executable).parent), os.environ["PATH"])),
        "PYTHONPATH": str(site),
        "JAX_PLATFORMS": "cpu",
        # Compiled faster, for one device, as users have it.
        "XLA_FLAGS": " ".join(f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f),
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the unbuilt repository, reduced to what packaging and commands need."""
    folder = tmp_path_factory.mktemp("clone") / "bitnet_jax"
    folder.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "runs")
    for name in (*PACKAGES, "kernels", "experiments", "tests", ".ci", "requirements"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore, dirs_exist_ok=True)
    for name in ("README.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder)
    return folder


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-index"]


def build_wheel(source: Path, target: Path, library: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"BITNET_KERNELS_PREBUILT": str(library)}
    command = [*PIP, "wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", target, source]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel_site(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed. The C++ library is the prebuilt one, because compiling takes minutes."""
    library = ROOT / "kernels" / "bitnet_kernels" / "_cpu.so"
    assert library.is_file(), "the C++ library is not built; make test builds it"
    wheels, site = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    made = build_wheel(clone, wheels, library)
    assert made.returncode == 0, made.stderr
    (wheel,) = wheels.glob("*.whl")
    install = [*PIP, "install", *OFFLINE, "--target", site, wheel]
    subprocess.run(install, check=True, capture_output=True)
    assert (site / "bitnet_kernels" / "_cpu.so").read_bytes() == library.read_bytes()
    return site


@pytest.fixture(scope="module")
def clone_site(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make` installs from a clone: links to its packages instead of the folder that contains them."""
    site = tmp_path_factory.mktemp("editable")
    for package, folder in PACKAGES.items():
        (site / package).symlink_to(clone / folder)
    shutil.copy(ROOT / "kernels" / "bitnet_kernels" / "_cpu.so", clone / "kernels" / "bitnet_kernels")
    script = site / "bin" / "bitnet-jax"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nfrom bitnet_jax.cli.main import console\nconsole()\n")
    script.chmod(0o755)
    return site


def test_commands_are_found_in_the_pages() -> None:
    """If the pattern were wrong, every test below would be vacuous."""
    assert len(COMMANDS) > 20
    for start in (
        "bitnet-jax train",
        "bitnet-jax pack",
        "make quickstart",
        "bitnet-jax sweep",
    ):
        assert any(command.startswith(start) for command in COMMANDS)
    assert all(any(re.fullmatch(pattern, command) for command in COMMANDS) for pattern in NOT_RUN), (
        "an entry of NOT_RUN that is on no page"
    )


def test_every_extra_in_the_pages_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        name
        for command in COMMANDS
        for names in re.findall(r"\.\[([\w,]+)\]", command)
        for name in names.split(",")
    }
    assert named
    assert named <= set(extras)


def test_a_missing_prebuilt_library_fails_the_build(clone: Path, tmp_path: Path) -> None:
    """If it was requested explicitly, the result must not be a wheel without kernels."""
    made = build_wheel(clone, tmp_path, tmp_path / "nowhere.so")
    assert made.returncode != 0
    assert "expected the _cpu.so of an earlier build" in made.stderr + made.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_readme_commands_run_from_an_installed_wheel(wheel_site: Path, tmp_path: Path) -> None:
    run_all(INSTALLED, tmp_path, wheel_site)
    assert (tmp_path / "runs" / "first-packed" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "cnn" / "result.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", named_configs())
def test_a_copy_of_every_config_trains_with_an_installed_wheel(
    name: str, wheel_site: Path, tmp_path: Path
) -> None:
    variant = "short" if name == "quickstart" else "small"
    run(f"bitnet-jax init {name} mine.py", tmp_path, wheel_site)
    train = f"bitnet-jax train --config mine.py:{variant} --workdir run --quiet --config.training.steps=2"
    run(train, tmp_path, wheel_site)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["step"] == 2


@pytest.mark.slow
def test_doctor_runs_from_an_installed_wheel(wheel_site: Path, tmp_path: Path) -> None:
    assert DOCTOR in RUN
    run(DOCTOR, tmp_path, wheel_site)


@pytest.mark.slow
def test_the_readme_commands_run_from_a_bare_clone(clone: Path, clone_site: Path) -> None:
    for command in INSTALLED:
        run(command, clone, clone_site)


@pytest.mark.parametrize(
    "command",
    [
        # test_report.py compares individually rebuilt pages with their results.
        pytest.param(
            command,
            marks=[pytest.mark.slow] if command.startswith(("python", "bitnet-jax report --all")) else [],
        )
        for command in REPOSITORY
    ],
)
def test_commands_that_need_the_repository(command: str, clone: Path, clone_site: Path) -> None:
    study = clone / "experiments" / "studies" / "ternary_penalty" / "study.py"
    if "SMALL_ARMS" not in study.read_text():
        study.write_text(study.read_text() + SMALL_STUDY)
    run(command, clone, clone_site)
