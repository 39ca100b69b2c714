"""Studies: a folder with a question, arms, seeds, and a file of results, one line per run.

experiments/studies/<name>/study.py        the constants read by `load_study`, see experiments/README.md
experiments/studies/<name>/results.jsonl   written by `bitnet-jax sweep <name>`
experiments/studies/<name>/tuning.jsonl    likewise, for studies with TUNE (see tuning.py)
experiments/studies/<name>/README.md       claim, method, tables (written by `bitnet-jax report <name>`), verdict
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitnet_experiments.claims import Claim
from bitnet_jax.names import check_name
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.config_file import load_config_file
from bitnet_jax.training.python_file import load_python_file

STUDIES = Path(__file__).resolve().parents[1] / "studies"  # in the repository; not part of a wheel
TASKS = ("language modelling", "image classification", "text classification", "translation")

Row = Mapping[str, Any]  # of results.jsonl
Overrides = Mapping[str, Any]  # config fields, dotted -> values
# (arm, seed, workdir of the study, small) -> fields of the row; see `Study.takes_overrides`
Run = Callable[..., dict[str, Any]]
TEST = "test_"  # the metrics of a run's test data begin with it, those of its validation data with "valid_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """The constants defined in a `study.py`, in lower case, and its folder. See experiments/README.md.

    Raises:
      ValueError: an unknown task, no arms or seeds, an arm that is missing (baseline, small arm, of a claim), or a
        grid that cannot be searched.
    """

    folder: Path
    question: str
    source: str  # paper and section
    paper_effect: str  # the paper's finding, as text
    source_task: str  # one of TASKS; where it is not TASK, the study is an analogue
    task: str
    # What is tested; (): the source states nothing that can be tested, the study has an own finding.
    claims: tuple[Claim, ...]
    arms: Mapping[str, Overrides]
    seeds: tuple[int, ...]
    metric: str  # the field of a row that is compared; smaller is better
    baseline: str  # the arm that the others are compared with, seed by seed
    # Name of an installed config, or a file with get_config(variant); None if `run` needs none.
    config: str | None = None
    # The answer for the index: an arm, for its difference to the baseline, or a function that returns a text; "": the
    # effect of the first claim.
    effect: str | Callable[[Study, Sequence[Row]], str] = ""
    cannot_show: str = ""  # why the model or the task cannot show the effect: the verdict is then "open"
    redo: str = ""  # why the rows should be measured again: their problems are then a note, not an error
    test_examples: Mapping[str, int] = dataclasses.field(default_factory=dict)  # of metrics that are per cent
    # arm -> the trained model that it evaluates; arms of one model are paired. None: every arm is trained.
    trained_model: Callable[[str], str] | None = None
    # arm -> its block: arms that are compared with each other, so their rows have one origin. None: all are one block.
    block: Callable[[str], str] | None = None
    common: Overrides = dataclasses.field(default_factory=dict)  # overrides of all arms
    small: Overrides = dataclasses.field(
        default_factory=dict
    )  # with --small, on the config's variant "small"
    small_arms: tuple[str, ...] | None = None  # None: all
    small_seeds: tuple[int, ...] | None = None  # None: the first two
    # Config field -> its grid, ascending: searched for every arm, with other seeds than the final ones; see tuning.py
    tune: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    tune_seeds: tuple[int, ...] = (1000,)
    # arm -> the arm whose search gives its values, such as a smaller model's; None: every arm has its own
    tuned_as: Callable[[str], str] | None = None
    run: Run | None = None  # None: train the arm
    # Each returns a Section; (): the table of arms and the curves.
    report: tuple[Callable[[Study, Sequence[Row]], Any], ...] = ()

    def __post_init__(self) -> None:
        for task in (self.task, self.source_task):
            check_name(f"{self.name}: task", task, TASKS)
        if not self.arms or not self.seeds:
            raise ValueError(
                f"{self.name}: got {len(self.arms)} arms and {len(self.seeds)} seeds, expected some"
            )
        named = [arm for claim in self.claims for arm in claim.contrast or ()]
        for arm in (self.baseline, *(self.small_arms or ()), *named):
            check_name(f"{self.name}: arm", arm, self.arms)
        for claim in self.claims:
            if len(blocks := {self.block_of(arm) for arm in claim.contrast or ()}) > 1:
                raise ValueError(
                    f"{self.name}: claim {claim.says!r}: got arms of the blocks {', '.join(sorted(blocks))}, "
                    "expected a contrast within one block"
                )
        if self.run is None and self.config is None:
            raise ValueError(f"{self.name}: got neither CONFIG nor run, expected at least one of them")
        if self.tune:
            self._check_tune()

    def _check_tune(self) -> None:
        for arm in self.arms:
            check_name(f"{self.name}: TUNED_AS({arm!r})", self.search_arm(arm), self.arms)
        for field, grid in self.tune.items():
            numbers = all(isinstance(value, int | float) and value > 0 for value in grid)
            if not numbers or len(grid) < 2 or list(grid) != sorted(set(grid)):
                raise ValueError(
                    f"{self.name}: TUNE[{field!r}]: got {grid!r}, expected at least two positive numbers, ascending"
                )
        for arm, overrides in self.arms.items():
            if both_set := set(self.tune) & overrides.keys():
                raise ValueError(
                    f"{self.name}: arm {arm!r}: got {min(both_set)}, which TUNE searches for; remove one of them"
                )
        if not self.metric.startswith(TEST):
            raise ValueError(
                f"{self.name}: METRIC: got {self.metric!r} with TUNE, which chooses by validation data; expected a "
                "metric of the test data such as 'test_loss', and data.test=True in COMMON"
            )
        both = set(self.tune_seeds) & {*self.seeds, *(self.small_seeds or ())}
        if both or not 0 < len(self.tune_seeds) < len(self.seeds):
            raise ValueError(
                f"{self.name}: TUNE_SEEDS: got {self.tune_seeds}, expected fewer than the {len(self.seeds)} SEEDS "
                "and none of them"
            )
        self.check_takes_overrides("TUNE")

    def check_takes_overrides(self, wanted: str) -> None:
        """Raises ValueError: `run` cannot be given overrides besides those of the arm."""
        if self.run is not None and not self.takes_overrides:
            raise ValueError(
                f"{self.name}: got {wanted}, but run(arm, seed, workdir, small) takes no further settings; add the "
                "parameter overrides={} and pass it to Study.settings"
            )

    def block_of(self, arm: str) -> str:
        """The block of an arm; "" where all arms are one, and for an arm that the study does not have."""
        return "" if self.block is None or arm not in self.arms else self.block(arm)

    @property
    def tuned_by(self) -> str:
        """The validation metric that a search goes by."""
        return "valid_" + self.metric.removeprefix(TEST)

    def search_arm(self, arm: str) -> str:
        """The arm whose search gives an arm's values."""
        return arm if self.tuned_as is None else self.tuned_as(arm)

    @property
    def takes_overrides(self) -> bool:
        """Whether `run` has a parameter `overrides`, for tuned values and those of --set."""
        return self.run is not None and "overrides" in inspect.signature(self.run).parameters

    def __reduce__(self) -> tuple[Callable[[Path], Study], tuple[Path]]:
        return read_study, (self.folder,)  # unpickling reads study.py again

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def results(self) -> Path:
        return self.folder / "results.jsonl"

    @property
    def committed(self) -> bool:
        """Whether its folder is in the repository."""
        return self.folder.parent == STUDIES

    def workdir(self, small: bool = False, sets: Overrides | None = None) -> Path:
        """The default folder of its runs, relative to the current folder.

        Args:
          sets: further settings of all runs.
        """
        mark = f"-set-{_short_hash(sorted(sets.items()))}" if sets else ""
        return Path("runs/studies") / (self.name + ("-small" if small else "") + mark)

    def runs(self, small: bool = False) -> dict[str, tuple[str, int]]:
        """Name of the run -> (arm, seed), ordered by seed, then by arm."""
        seeds = (self.small_seeds or self.seeds[:2]) if small else self.seeds
        arms = (self.small_arms or tuple(self.arms)) if small else tuple(self.arms)
        return {f"{arm}-seed{seed}": (arm, seed) for seed in seeds for arm in arms}

    def overrides(
        self, arm: str, seed: int, small: bool = False, more: Overrides | None = None
    ) -> dict[str, Any]:
        """The run's overrides of the base config; the last one wins: seed, common, small, the arm's own, `more`."""
        shared = {"seed": seed, **self.common, **(self.small if small else {})}
        return {**shared, **self.arms[arm], **(more or {})}

    def settings(
        self, arm: str, seed: int, small: bool = False, overrides: Overrides | None = None
    ) -> RunConfig:
        """The complete config of a run.

        Args:
          overrides: those that `run` was given, in addition to the arm's.

        Raises:
          ValueError: the arm has an unknown field or an invalid value.
        """
        if self.config is None:
            raise ValueError(f"{self.name}: got no CONFIG, expected one to derive settings from")
        base = load_config_file(f"{self.config}{':small' if small else ''}").to_dict()
        return RunConfig.from_dict(overridden(base, self.overrides(arm, seed, small, overrides)))

    def settings_hash(
        self, arm: str, seed: int, small: bool = False, more: Overrides | None = None
    ) -> str | None:
        """Identifies what a run measures: its complete config, or without CONFIG the arm, seed and overrides.

        The source of `run` is not part of it. None: the settings are invalid.
        """
        return next(iter(self.settings_hashes(arm, seed, small, more)), None)

    def settings_hashes(
        self, arm: str, seed: int, small: bool = False, more: Overrides | None = None
    ) -> tuple[str, ...]:
        """`settings_hash`, and others that earlier rows with the same settings may have."""
        if self.config is None:
            return (_short_hash([arm, seed, small, self.overrides(arm, seed, small, more)]),)
        try:
            return self.settings(arm, seed, small, more).hashes()
        except (ValueError, OSError):
            return ()


def _short_hash(value: Any) -> str:
    """12 hex digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def overridden(fields: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Nested dicts with the dotted names of `overrides` set. RunConfig validates the names."""
    result = {name: dict(value) if isinstance(value, Mapping) else value for name, value in fields.items()}
    for path, value in overrides.items():
        section, _, field = path.rpartition(".")
        if section:
            result.setdefault(section, {})[field] = value
        else:
            result[field] = value
    return result


def product(*factors: Mapping[str, Overrides], join: str = "-") -> dict[str, dict[str, Any]]:
    """Every combination of one arm from each factor: {"a-x": {**a, **x}, "a-y": ..., "b-x": ...}."""
    combined = {}
    for choice in itertools.product(*(factor.items() for factor in factors)):
        overrides: dict[str, Any] = {}
        for _, part in choice:
            overrides |= part
        combined[join.join(name for name, _ in choice)] = overrides
    return combined


def zip_(names: Sequence[str], **fields: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Arms that change several fields together; `__` in a keyword stands for a dot.

    zip_(["a", "b"], model__hidden_size=[32, 64]) == {"a": {"model.hidden_size": 32}, "b": {...: 64}}
    """
    for field, values in fields.items():
        if len(values) != len(names):
            raise ValueError(f"zip_: got {len(values)} values of {field}, expected {len(names)}, one per arm")
    return {
        name: {field.replace("__", "."): values[i] for field, values in fields.items()}
        for i, name in enumerate(names)
    }


def study_names() -> list[str]:
    return sorted(path.parent.name for path in STUDIES.glob("*/study.py"))


def load_study(name: str) -> Study:
    """The study with that name in experiments/studies, or in the folder with that path.

    Raises:
      ValueError: there is none (the message lists the available ones), or see `read_study`.
    """
    names = study_names()
    if name not in names and (Path(name) / "study.py").is_file():
        return read_study(Path(name).resolve())
    if not names:
        raise ValueError(
            f"study: got {name!r}, expected a folder with study.py; an installed package contains no studies"
        )
    check_name("study", name, names, also=" or a folder with study.py")
    return read_study(STUDIES / name)


def read_study(folder: Path) -> Study:
    """Reads `study.py` in a folder. The file is executed: read only trusted studies.

    Raises:
      ValueError: the file raises an error (the message gives file and line), or a name is missing or unknown.
    """
    module = load_python_file(folder / "study.py")
    fields = {field.name: field for field in dataclasses.fields(Study) if field.name not in ("folder", "run")}
    given = {name.lower(): value for name, value in vars(module).items() if name.isupper() and name[0] != "_"}
    missing = [name.upper() for name, field in fields.items() if _required(field) and name not in given]
    unknown = [name.upper() for name in given if name not in fields]
    if missing or unknown:
        raise ValueError(
            f"{folder.name}/study.py: missing {', '.join(missing) or 'nothing'}, unknown "
            f"{', '.join(unknown) or 'nothing'}; expected {', '.join(map(str.upper, fields))}; start other constants "
            "with an underscore"
        )
    return Study(folder=folder, run=getattr(module, "run", None), **given)


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows written so far. Raises ValueError: a line is not a JSON row with run and status."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number} is not JSON ({error}); remove the line") from error
        if not isinstance(row, dict) or not {"run", "status"} <= row.keys():
            raise ValueError(
                f"{path}:{number}: got {line[:60]!r}, expected an object with run and status; remove the line"
            )
        rows.append(row)
    return rows


def row_of(rows: Sequence[Row], name: str) -> Row | None:
    """The row of the run with this name; None if there is none."""
    return next((row for row in rows if row["run"] == name), None)
