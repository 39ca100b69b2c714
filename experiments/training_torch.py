"""The models of `training_cost --compare torch` in PyTorch: one process that trains when it is told to.

    echo 3 | python experiments/training_torch.py --hidden 128 --ffn 384 --layers 5 --heads 4 --batch 8 --length 256

Prints a line of JSON when it is ready, then one for every line of standard input, which is a number of steps. The model
is the decoder of bitnet_jax (RMSNorm before each block, rotary positions, SwiGLU, tied head) as one writes it in
PyTorch, with the fused AdamW and its scaled_dot_product_attention; ternary layers are the fake quantization of
BitNet b1.58 (2402.17764). Needs torch and nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, ternary: bool) -> None:
        super().__init__()
        self.weight, self.ternary = nn.Parameter(0.02 * torch.randn(outputs, inputs)), ternary

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.ternary:
            size = w.abs().mean().clamp(min=1e-5)
            w = w + ((w / size).round().clamp(-1, 1) * size - w).detach()
            scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
            x = x + ((x * scale).round().clamp(-128, 127) / scale - x).detach()
        return F.linear(x, w)


class Block(nn.Module):
    def __init__(self, hidden: int, ffn: int, heads: int, ternary: bool) -> None:
        super().__init__()
        self.heads, self.attention_norm, self.ffn_norm = heads, nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q, self.k, self.v, self.o = (Linear(hidden, hidden, ternary) for _ in range(4))
        self.gate, self.up = (Linear(hidden, ffn, ternary) for _ in range(2))
        self.down = Linear(ffn, hidden, ternary)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        y = self.attention_norm(x)
        q, k, v = (f(y).view(batch, length, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, hidden))
        y = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


class Model(nn.Module):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.embedding = nn.Parameter(0.02 * torch.randn(VOCABULARY, args.hidden))
        ternary = args.recipe == "ternary"
        self.blocks = nn.ModuleList(
            Block(args.hidden, args.ffn, args.heads, ternary) for _ in range(args.layers)
        )
        self.norm = nn.RMSNorm(args.hidden)
        half = args.hidden // args.heads // 2
        angle = torch.arange(args.length)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding[tokens[:, :-1]]
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.norm(x) @ self.embedding.T
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("hidden", "ffn", "layers", "heads", "batch", "length"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--recipe", choices=("float32", "ternary"), default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    args = parser.parse_args()
    torch.manual_seed(0)
    model: Any = Model(args)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    loss_of = torch.compile(model) if args.compile else model
    tokens = torch.randint(VOCABULARY, (args.batch, args.length + 1))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    for _ in range(2):
        step()
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"parameters": parameters, "version": torch.__version__}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            loss = step()
        took = time.perf_counter() - began
        with open("/proc/self/status") as status:
            peak = 1024 * int(status.read().partition("VmHWM:")[2].split()[0])
        print(json.dumps({"seconds": took, "loss": loss, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
