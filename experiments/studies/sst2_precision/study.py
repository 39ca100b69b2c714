"""Runs of the study: a sentence classifier from float to one bit, and one-bit distillation from float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitnet_experiments.claims import Claim
from bitnet_experiments.runs import locked, train
from bitnet_experiments.sections import arms_table, curves, pairs_table
from bitnet_experiments.study import overridden, read_study
from bitnet_jax.data.labelled_text import read_examples
from bitnet_jax.training.config import RunConfig

QUESTION = "What do fewer bits cost a text classifier, and do learned ranges or distillation help at one bit?"
SOURCE = "BiT 2205.13016, GLUE table (README of its code)"
PAPER_EFFECT = (
    "SST-2 accuracy: float 93.2; W1A1 53.2 with fixed ranges, 87.7 with BiT's learned ones and a teacher"
)
SOURCE_TASK, TASK = "text classification", "text classification"
CANNOT_SHOW = (
    "The source binarizes a pretrained model; here no knowledge is in the matrices that could be lost."
)
CLAIMS = (
    Claim(
        says="one bit with fixed ranges costs 40.0 points",
        contrast=("W1A1 fixed", "float32"),
        between=(40, 40),
    ),
    Claim(
        says="learned ranges and a teacher recover 34.5 of them",
        contrast=("W1A1 elastic, taught", "W1A1 fixed"),
        between=(-34.5, -34.5),
    ),
)

CONFIG = "text_classifier"
METRIC = "valid_error"  # per cent of the test sentences
TEST_EXAMPLES = {"valid_error": 1_821}
BASELINE = "float32"

COMMON = {"training.steps": 1000, "training.checkpoint_every": 1000}
SMALL = {"training.steps": 160, "training.checkpoint_every": 160}
_VOCABULARY = 2000
_SST2: dict[str, Any] = {
    "model.vocab_size": _VOCABULARY,
    "model.num_classes": 2,
    "data.length": 40,  # tokens; three in four sentences fit
    "data.source": "classify/sst2.train.jsonl.gz",
    "data.valid_source": "classify/sst2.test.jsonl.gz",
}


def _arm(recipe: str, attention: str = "softmax") -> dict[str, Any]:
    return {"model.precision": recipe, "model.attention": attention}


ARMS = {
    "float32": _arm("float32"),
    "W8A8": _arm("int8"),
    "W4A8": _arm("int4"),
    "W2A8": _arm("int2"),
    "ternary A8": _arm("bitnet_b158"),
    "W1A8": _arm("bitnet"),
    "W1A1 fixed": _arm("bitnet(activation=sign_absmean, activation_ste=clipped)", "binary"),
    "W1A1 elastic": _arm("bit_relu", "binary"),
    "W1A1 elastic, taught": _arm("bit_relu", "binary"),
}
SEEDS = (0, 1, 2)


def run(arm: str, seed: int, workdir: Path, small: bool) -> dict[str, Any]:
    """Trains an arm from labels; the taught arm from the probabilities of the float arm with the same seed."""
    study = read_study(Path(__file__).parent)
    base = {} if small else _SST2 | {"data.tokenizer": str(_tokenizer(workdir))}

    def config(arm: str, **more: Any) -> RunConfig:
        return RunConfig.from_dict(overridden(study.settings(arm, seed, small).to_dict(), base | more))

    if not arm.endswith(", taught"):
        return train(config(arm), workdir / f"{arm}-seed{seed}")
    teacher = workdir / f"{BASELINE}-seed{seed}"
    train(config(BASELINE), teacher)
    return train(config(arm, **{"distillation.teacher": str(teacher)}), workdir / f"{arm}-seed{seed}")


def _tokenizer(workdir: Path) -> Path:
    """A BPE tokenizer of the training sentences; characters carry too little for a model this small."""
    path = workdir.absolute() / "tokenizer.json"
    with locked(path.with_suffix(".lock")):
        if not path.is_file():
            from tokenizers import ByteLevelBPETokenizer

            made = ByteLevelBPETokenizer()
            texts = [example.text for example in read_examples(_SST2["data.source"])]
            made.train_from_iterator(texts, vocab_size=_VOCABULARY, show_progress=False)
            made.save(str(path))
    return path


REPORT = (
    arms_table("valid_loss", "train_loss", "weight_bits", "model_bytes"),
    pairs_table(
        ("W1A1 fixed", "W1A8"), ("W1A1 elastic", "W1A1 fixed"), ("W1A1 elastic, taught", "W1A1 elastic")
    ),
    curves(),
)
