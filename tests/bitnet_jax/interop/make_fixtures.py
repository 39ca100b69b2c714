"""Writes fixtures/*.npz: tiny random models of several families, run by Hugging Face transformers.

    pip install transformers torch; python make_fixtures.py     (the present ones: transformers 5.24, torch 2.14)

Each file has `config` (the text of config.json), `weights/<name>`, and what the library computes in float32:

    input_ids, logits                     a whole sequence, longer than the sliding window or the original length
    pad_input_ids, pad_mask, pad_logits   a left-padded batch
    prompt_ids, greedy_ids, step_logits   greedy decoding with its cache

`rope.npz` has the rotary frequencies of many settings. Weights are stored in float16, which holds them exactly.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the quantizers of the library are decorated with a compiler

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitNetQuantConfig, LlamaConfig
from transformers.integrations.bitnet import replace_with_bitnet_linear
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

FOLDER = Path(__file__).parent / "fixtures"
LENGTH, QUANTIZED_LENGTH, PADDING, PROMPT, NEW_TOKENS = 24, 10, 3, 5, 10
GAP, TIE = 0.02, 3e-5
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}

CASES: dict[str, dict[str, Any]] = {
    "llama_llama3": {
        "model_type": "llama", "rope_parameters": {"rope_theta": 100.0, **LLAMA3}, "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "llama_linear": {
        "model_type": "llama", "rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0},
        "attention_bias": True, "mlp_bias": True,
    },
    "llama_yarn": {
        "model_type": "llama", "rope_parameters": {"rope_theta": 1e3, **YARN}, "mlp_bias": True, "head_dim": 16,
    },
    "llama_bias_online": {
        "model_type": "llama", "attention_bias": True, "mlp_bias": True, "quantization_config": ONLINE,
    },
    "llama_bias_packed": {
        "model_type": "llama", "attention_bias": True, "mlp_bias": True,
        "quantization_config": ONLINE | {"quantization_mode": "offline"},
    },
    "llama_bias_bitlinear": {
        "model_type": "llama", "attention_bias": True, "mlp_bias": True,
        "quantization_config": {"quant_method": "bitnet"},
    },
    "bitnet_bias": {"model_type": "bitnet", "attention_bias": True, "quantization_config": ONLINE},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_window": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0,
        "rope_parameters": {"rope_theta": 1e4, **YARN},
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_bias": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True, "quantization_config": ONLINE},
    "mistral": {"model_type": "mistral", "sliding_window": 6},
    "mistral_head_dim": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "mistral_bitlinear": {
        "model_type": "mistral", "sliding_window": 6, "quantization_config": {"quant_method": "bitnet"},
    },
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4},
    "smollm3_list": {
        "model_type": "smollm3", "num_hidden_layers": 3, "no_rope_layers": [0, 1, 0], "attention_bias": True,
        "mlp_bias": True, "rope_parameters": {"rope_theta": 1e4, **YARN},
    },
}  # fmt: skip

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "llama3_published": LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192},
    "yarn": YARN,
    "yarn_published": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn_beta": YARN | {"beta_fast": 4.0, "beta_slow": 0.5},
    "yarn_untruncated": YARN | {"truncate": False, "original_max_position_embeddings": 512},
    "yarn_attention": YARN | {"attention_factor": 0.75},
    "yarn_mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn_narrow": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096},
}


def random_weights(model: torch.nn.Module, generator: torch.Generator, offline: bool) -> None:
    """Values that float16 holds exactly, of a size that makes logits differ."""

    def normal(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("inv_freq"):
                continue
            if name.endswith("weight_scale"):
                new = 0.2 + 0.1 * torch.rand(1, generator=generator)
                new = (
                    new if "Auto" in type(model.get_submodule(name.rpartition(".")[0])).__name__ else 1 / new
                )
            elif value.dtype == torch.uint8:
                fields = torch.randint(0, 3, (4, *value.shape), generator=generator, dtype=torch.uint8)
                new = fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6
            elif offline and "_proj.weight" in name:
                new = torch.randint(-1, 2, value.shape, generator=generator)
            elif name.endswith("bias"):
                new = 0.5 * normal(value.shape)
            elif value.ndim == 1:
                new = 1 + 0.3 * normal(value.shape)
            else:
                new = normal(value.shape) * (1.0 if "embed" in name else 1.5 / value.shape[1] ** 0.5)
            value.copy_(new if new.dtype == torch.uint8 else new.half().float())


def model_of(content: dict[str, Any], seed: int) -> torch.nn.Module:
    content = dict(content)
    quantization = content.pop("quantization_config", None)
    config = AutoConfig.for_model(**content)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval().float()
    if quantization:
        quantization = BitNetQuantConfig(**{k: v for k, v in quantization.items() if k != "quant_method"})
        replace_with_bitnet_linear(model, ["lm_head"], quantization)
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                module.to_empty(device="cpu")
                module.dtype = torch.float32
        model.float()
    generator = torch.Generator().manual_seed(seed)
    offline = quantization is not None and quantization.quantization_mode == "offline"
    random_weights(model, generator, offline)
    model.requires_grad_(False)
    return model


def outputs(
    model: torch.nn.Module, vocabulary: int, generator: torch.Generator
) -> tuple[dict[str, Any], float]:
    """The arrays of a fixture, and the smallest gap between the two largest logits of a greedy step (0 if some
    activation is so near a rounding tie of its quantizer that the order of float32 sums decides)."""
    quantized = [
        module for module in model.modules() if type(module).__name__ in ("AutoBitLinear", "BitLinear")
    ]
    distances = []

    def measure(module: torch.nn.Module, inputs: Any) -> None:
        codes = inputs[0] * (127 / inputs[0].abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5))
        distances.append(float((codes - codes.floor() - 0.5).abs().min()))

    for module in quantized:
        module.register_forward_pre_hook(measure)
    length = QUANTIZED_LENGTH if quantized else LENGTH
    ids = torch.randint(0, vocabulary, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    prompt = ids[:1, :PROMPT]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=positions).logits
    logits = model(ids).logits

    steps, tokens, cache = [], prompt, None
    for _ in range(NEW_TOKENS):
        output = model(tokens if cache is None else tokens[:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits[0, -1])
        tokens = torch.cat([tokens, output.logits[:, -1:].argmax(-1)], dim=1)
    best = torch.stack(steps).topk(2).values
    gap = float((best[:, 0] - best[:, 1]).min())
    arrays = {
        "input_ids": ids,
        "logits": logits,
        "pad_input_ids": ids,
        "pad_mask": mask,
        "pad_logits": padded,
        "prompt_ids": prompt,
        "greedy_ids": tokens[:, PROMPT:],
        "step_logits": torch.stack(steps),
    }
    return arrays, gap if min(distances, default=1.0) > TIE else 0.0


def write(name: str, case: dict[str, Any]) -> None:
    """The first seed whose greedy steps are clear: rounding must not choose another token."""
    content = SHAPE | case
    for seed in range(1000):
        model = model_of(content, seed)
        arrays, gap = outputs(model, content["vocab_size"], torch.Generator().manual_seed(seed + 1000))
        if gap > GAP:
            break
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    if content.get("tie_word_embeddings", model.config.tie_word_embeddings):
        del weights["lm_head.weight"]
    text = model.config.to_dict() | {key: content[key] for key in ("quantization_config",) if key in content}
    stored = {
        f"weights/{key}": value if value.dtype == np.uint8 else value.astype(np.float16)
        for key, value in weights.items()
    }
    for key, value in weights.items():
        assert np.array_equal(stored[f"weights/{key}"].astype(value.dtype), value), key
    values = {key: value.numpy() for key, value in arrays.items()}
    ints = {key: value.astype(np.int32) for key, value in values.items() if value.dtype == np.int64}
    np.savez_compressed(
        FOLDER / f"{name}.npz", config=np.array(json.dumps(text)), **stored, **(values | ints)
    )
    size = (FOLDER / f"{name}.npz").stat().st_size
    print(f"{name}: seed {seed}, gap {gap:.3f}, {size} bytes, logits std {arrays['logits'].std():.2f}")
    assert size < 200_000


def write_ropes() -> None:
    arrays = {}
    for name, parameters in ROPES.items():
        for theta, head in ((1e4, 8), (5e5, 64)):
            rope = {"rope_theta": theta, **parameters}
            config = LlamaConfig(
                hidden_size=head, num_attention_heads=1, max_position_embeddings=64, rope_parameters=rope
            )
            frequencies, magnitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
            key = f"{name}_{head}"
            arrays |= {
                f"{key}/config": np.array(
                    json.dumps({"rope_parameters": rope, "max_position_embeddings": 64})
                ),
                f"{key}/frequencies": frequencies.numpy(),
                f"{key}/magnitude": np.float64(magnitude),
            }
    np.savez_compressed(FOLDER / "rope.npz", **arrays)


if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    write_ropes()
    for name, case in CASES.items():
        write(name, case)
