"""Prints a process's resource usage as JSON: after every size was used once, and after `rounds` more random lengths.

Arguments: rounds, max_length of the model.
"""

from __future__ import annotations

import gc
import json
import random
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax.data.tokenizers import ByteTokenizer
from bitnet_jax.evaluation.completion import complete
from bitnet_jax.evaluation.likelihood import Request, TextModel, score_requests
from bitnet_jax.inference.generation import generate, stream_tokens
from bitnet_jax.inference.sampling import SamplingConfig
from bitnet_jax.models import ModelConfig, Transformer
from bitnet_jax.packed import packing

COMPILED: list[str] = []


def held() -> dict[str, int]:
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    maps = len(Path("/proc/self/maps").read_text().splitlines())
    return {"maps": maps, "bytes": resident * 4096, "compilations": len(COMPILED)}


def main(rounds: int, longest: int) -> None:
    config = ModelConfig(
        vocab_size=256,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        ffn_size=16,
        max_length=longest,
        mlp="relu2",
    )
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **details: (
            COMPILED.append(event) if event.endswith("backend_compile_duration") else None
        )
    )
    params = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    model = TextModel(config, packing.pack(params, config), ByteTokenizer())
    draw = random.Random(0)

    def use(prompt: int, new_tokens: int) -> None:
        tokens = np.asarray([[draw.randrange(1, 256) for _ in range(prompt)]], np.int32)
        sampling = SamplingConfig(temperature=draw.uniform(0.5, 2), top_p=draw.uniform(0.1, 0.9))
        key = jax.random.key(draw.randrange(1000))
        generate(
            config, model.variables, tokens, max_new_tokens=new_tokens, sampling=sampling, key=key,
            eos_ids=range(prompt % 5 + 1),
        )  # fmt: skip
        for _ in stream_tokens(
            config, model.variables, tokens, max_new_tokens=new_tokens, sampling=sampling, key=key, chunk=7
        ):
            pass
        complete(model, [tokens[0]] * 2, min(new_tokens, longest - 1))
        score_requests(model, [Request(np.resize(tokens, prompt + 1), 1)])

    sizes = [(1, 2), (1, longest - 1), (longest - 1, 1)]
    for prompt, new_tokens in sizes + [(n, longest - n) for n in range(16, longest, 16)]:
        use(prompt, new_tokens)
    draw.seed(1)
    for _ in range(rounds // 5):
        use(prompt := draw.randint(1, longest - 1), draw.randint(1, longest - prompt))
    settled = held()
    for _ in range(rounds):
        use(prompt := draw.randint(1, longest - 1), draw.randint(1, longest - prompt))
    print(json.dumps([settled, held()]))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
