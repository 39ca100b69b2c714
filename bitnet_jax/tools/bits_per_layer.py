"""A float language model in few bits, the bits of each layer chosen by what they cost the predictions of the model."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bitnet_jax.conversion.progress_folder import FinishedBlocks, MeasuredBlocks, claim
from bitnet_jax.packed import packing, storage
from bitnet_jax.quantization.scales import Granularity
from bitnet_jax.tools import few_bits as tool
from bitnet_jax.tools.agreement import compare, logits_of
from bitnet_jax.tools.layer_harms import LayerHarms, candidates, layer_harms, packed_bytes
from bitnet_jax.tools.pack_model import prove_and_save

KL_WINDOWS = 4  # of calibration text, after those that layers are fitted on: where divergences are measured


class Attempt(NamedTuple):
    """A choice that was converted."""

    bytes: int  # of the model
    predicted_kl: float  # to the float model, nats a token
    measured_kl: float


class Chosen(NamedTuple):
    converted: tool.Converted
    harms: LayerHarms
    choice: dict[str, str]  # path -> grid
    attempts: list[Attempt]  # the last one is what was written


def bits_per_layer(
    source: str | Path,
    target: str | Path,
    *,
    calibration: str,
    budget: int | None = None,
    max_kl: float | None = None,
    granularity: Granularity | None = None,
    activation: str = "int16",
    rotate: bool = False,
    length: int = tool.LENGTH,
    count: int = tool.WINDOWS,
    embedding: str | None = None,
    parts: Path | None = None,
    step: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Chosen:
    """Converts to the least divergence in `budget` bytes, or to the fewest bytes within the divergence `max_kl`.

    Divergences are mean KL(float || packed) in nats a token on windows of the calibration text that no layer is fitted
    on. The harm of each grid in each layer is measured first; the sum of harms is the prediction by which grids are
    chosen (conversion/sensitivity.py, allocation.py). A converted model is measured before it is written. If it is
    above max_kl, another one is made whose prediction is lower by the same factor; so what is written is within max_kl,
    but a smaller one may exist.

    Args:
      source, granularity, activation, rotate, length, embedding, step: see `few_bits`.
      budget: bytes of the packed model: matrices, scales, tables, norms. Names and alignment in the file are not in it.
      count: of the windows that layers are fitted on; KL_WINDOWS more are read.
      parts: the folder where measurements are kept, for several calls with one model and text; by default it is
        `<target>.parts`, which is removed at the end.

    Raises:
      ValueError, RuntimeError: as `few_bits`; the budget is less than the fewest bits need or more than the float model
        has, or no choice is within max_kl. Nothing is written.
      StorageError: as `pack_model`.
    """
    target = Path(target)
    storage.check_target(target, overwrite)
    if (budget is None) == (max_kl is None) or not (max_kl is None or max_kl > 0):
        raise ValueError(f"got budget={budget}, max_kl={max_kl}, expected one of the two, and max_kl above 0")
    model = tool.float_model(source, step)
    settings = candidates(granularity or tool.default_granularity(model.config), activation, rotate)
    configs = {grid: tool.converted_config(model.config, one, embedding) for grid, one in settings.items()}
    for config in configs.values():
        packing.check_packable(config)
    nbytes, float_bytes = packed_bytes(configs), packing.sizes(model.variables).total
    if budget is not None and not nbytes.least <= budget <= float_bytes:
        raise ValueError(
            f"got a budget of {budget:,d} bytes, expected {nbytes.least:,d} (the fewest bits in every layer, and "
            f"{nbytes.others:,d} bytes outside layers) to {float_bytes:,d} (the float model)"
        )
    found = tool.calibration_windows(model, calibration, length, count + KL_WINDOWS)
    if len(found) <= KL_WINDOWS:
        raise ValueError(
            f"got a calibration text of {len(found)} windows of {found.shape[1]} tokens, expected more than the "
            f"{KL_WINDOWS} where divergences are measured; use a longer text"
        )
    tokens, probed = found[:-KL_WINDOWS], found[-KL_WINDOWS:]
    folder = parts or target.with_name(target.name + tool.PARTS)
    measured_as = {"bits per layer": {grid: dataclasses.asdict(one) for grid, one in settings.items()}}
    first = next(iter(configs.values()))
    claim(folder, tool.subject_of(model.variables["params"], first, measured_as, found))
    reference = list(logits_of(model, probed))
    harms = layer_harms(model, settings, configs, tokens, reference, MeasuredBlocks(folder), progress)
    model = model._replace(variables={})  # each conversion reads it again, and frees it block by block

    frontier, attempts = harms.frontier(), list[Attempt]()
    if max_kl is not None:
        choice = frontier.within_harm(max_kl - harms.other_kl)
    else:
        choice = frontier.within_bytes((budget or 0) - nbytes.others)
    while choice is not None:
        made = harms.settings_of(choice.names)
        config = tool.converted_config(model.config, made, embedding)
        params = dict(tool.float_model(source, step).variables["params"])
        blocks = folder / f"choice_{tool.digest({'names': np.array(sorted(choice.names.items()))})[:12]}"
        subject = tool.subject_of(params, config, dataclasses.asdict(made), tokens)
        reports, resumed = tool.convert_blocks(
            config, params, made, tokens, FinishedBlocks(blocks, subject), progress
        )
        latent = model._replace(config=config, variables={"params": params})
        kl = compare(iter(reference), latent).kl
        attempts.append(Attempt(nbytes.total(choice.names), harms.predicted_kl(choice.names), kl))
        if max_kl is None or kl <= max_kl:
            proof, sizes = prove_and_save(target, latent, tool.PROOF_TOKENS, overwrite)
            shutil.rmtree(folder if parts is None else blocks)
            done = tool.Converted(made, reports, resumed, tokens.size, proof, sizes)
            return Chosen(done, harms, choice.names, attempts)
        lower = attempts[-1].predicted_kl * max_kl / kl - harms.other_kl
        best = float(frontier.harm[-1])
        choice = frontier.within_harm(max(lower, best)) if choice.harm > best else None
    tried = "".join(f"; {one.measured_kl:.4g} measured in {one.bytes:,d} bytes" for one in attempts)
    raise ValueError(
        f"got a limit of {max_kl:g} nats a token, expected at least {harms.other_kl + frontier.harm[-1]:.4g}, which is "
        f"predicted for the best choice of bits{tried}; raise it (what is measured is kept in {folder})"
    )
