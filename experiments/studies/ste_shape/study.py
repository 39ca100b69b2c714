"""Runs of the study: a W1A1 network with each straight-through estimator for the sign of its activations."""

from __future__ import annotations

from bitnet_experiments.claims import Claim
from bitnet_experiments.sections import arms_table, curves

QUESTION = "Does the shape of the straight-through estimator matter?"
SOURCE = "Bi-Real Net 1808.00278, IR-Net 1909.10788, ReSTE; larq's guide"
PAPER_EFFECT = "shaped >= clipped >= identity, by 0.5 to 3 points at W1A1 (CIFAR-10, ImageNet)"
SOURCE_TASK, TASK = "image classification", "image classification"
CLAIMS = (
    Claim(says="the identity is 0.5 to 3 points worse", contrast=("identity", "clipped"), between=(0.5, 3)),
    *(
        Claim(says=f"{ste} is 0.5 to 3 points better", contrast=(ste, "clipped"), between=(-3, -0.5))
        for ste in ("approx_sign", "swish_sign", "tanh", "reste")
    ),
)

CONFIG = "mnist_mlp"
METRIC = "valid_error"  # per cent of the test images
TEST_EXAMPLES = {"valid_error": 10_000}
BASELINE = "clipped"

# No activation function before the sign: its own window would hide the estimator's.
ARMS = {
    ste: {"model.activation": "none", "model.precision": f"bnn(activation_ste={ste})"}
    for ste in ("identity", "clipped", "approx_sign", "swish_sign", "tanh", "reste")
}
SEEDS = (0, 1, 2)
REPORT = (arms_table("valid_loss", "train_loss"), curves())
