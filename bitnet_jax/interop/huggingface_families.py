"""Model types of Hugging Face that ModelConfig can describe, and what each key of their config.json means here.

A key is one of: read (COMMON_KEYS and the family's own keys); INERT, because the logits do not depend on it; NEUTRAL,
accepted with the one value that changes nothing; or unknown. An unknown key is accepted only if its value is null,
false or empty, which switches a feature off. Any other value may change the computation (a multiplier, a soft cap, a
second window), and a model that loads but computes something else is worse than one that does not load.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from bitnet_jax.names import check_name

_BASE: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "head_dim": None,
}
_QWEN: dict[str, Any] = _BASE | {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model_type: its architecture class in the library, the keys that its config class reads with their defaults,
    and what is fixed in its code."""

    architecture: str
    defaults: dict[str, Any]
    norm_placement: str = "pre"
    qkv_bias: bool = False  # biases on q, k and v, whatever the config says
    qk_norm: bool = False


FAMILIES: dict[str, Family] = {
    "bitnet": Family(
        "BitNetForCausalLM",
        _BASE
        | {
            "vocab_size": 128_256,
            "hidden_size": 2560,
            "intermediate_size": 6912,
            "num_hidden_layers": 30,
            "num_attention_heads": 20,
            "num_key_value_heads": 5,
            "hidden_act": "relu2",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "attention_bias": False,
        },
        norm_placement="sub",
    ),
    "llama": Family(
        "LlamaForCausalLM",
        _BASE
        | {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", _QWEN | {"head_dim": 128, "attention_bias": False}, qk_norm=True),
    "mistral": Family(
        "MistralForCausalLM",
        _BASE
        | {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
        },
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _BASE
        | {
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 11_008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
    ),
}
COMMON_KEYS = {*_BASE, "model_type", "quantization_config", "rope_parameters", "rope_scaling"}

INERT = frozenset(
    {
        # names, versions and dtypes; the compute dtype is an argument of the reader
        "_name_or_path", "architectures", "auto_map", "custom_pipelines", "dtype", "model_name",
        "name_or_path", "task_specific_params", "tokenizer_class", "torch_dtype",
        "transformers_version", "transformers.js_config", "unsloth_fixed", "unsloth_version",
        "is_llama_config", "finetuning_task",
        # token ids and settings of generation
        "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id",
        "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
        "eos_token_id", "exponential_decay_length_penalty", "forced_bos_token_id",
        "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
        "num_beam_groups", "num_beams", "num_return_sequences", "pad_token_id", "prefix",
        "remove_invalid_values", "repetition_penalty", "sep_token_id", "suppress_tokens", "temperature",
        "top_k", "top_p", "typical_p", "use_cache",
        # training, the form of outputs, and how the library computes the same numbers
        "_attn_implementation", "_attn_implementation_autoset", "attention_dropout",
        "attn_implementation", "chunk_size_feed_forward", "initializer_range", "output_attentions",
        "output_hidden_states", "output_scores", "pretraining_tp", "return_dict",
        "return_dict_in_generate", "rope_interleaved", "torchscript",
        # of encoders and classifiers
        "id2label", "label2id", "num_labels", "problem_type",
    }
)  # fmt: skip
NEUTRAL: dict[str, Any] = {"partial_rotary_factor": 1, "is_encoder_decoder": False}


def family_of(content: dict[str, Any]) -> Family:
    """The family of a config.json, all of whose keys are read or known to change nothing.

    Raises:
      ValueError: an unsupported model_type, or a key that may change the computation.
    """
    name = content.get("model_type", "bitnet")
    check_name("config.json: model_type", name, FAMILIES)
    family = FAMILIES[name]
    for key, value in content.items():
        if key in COMMON_KEYS or key in family.defaults or key in INERT:
            continue
        off = value is None or value is False or value in ({}, [])
        if not off and (key not in NEUTRAL or isinstance(value, bool) or value != NEUTRAL[key]):
            shown = key if key.isidentifier() and len(key) <= 80 else repr(key[:80])
            raise ValueError(
                f"config.json: {shown} is {str(value)[:60]!r}, which model_type {name!r} does not have here and "
                "which may change the outputs; remove it if it has no effect"
            )
    return family
