r"""Train a byte-level BPE tokenizer on a text, or measure one, and keep the tokens for training.

With --vocab-size, a tokenizer of that many tokens (the 256 bytes, an end token that separates documents, and merges) is
trained on the training part of SOURCE and written to --output; with --tokenizer, an existing one is used. Both parts
are then tokenized into the cache, where `train` finds them if its config has the same data.source, data.tokenizer,
data.split and data.valid_fraction.

Shown are the bytes a token stands for on held-out text (a byte tokenizer: 1) and the share of the vocabulary that
occurs there.

example:
  bitnet-jax tokenize stdlib --vocab-size 1024 --output tokenizer.json
  bitnet-jax tokenize stdlib --tokenizer tokenizer.json --json compression.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from bitnet_jax.cli.shared import allow_download_argument, write_json


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="SOURCE", help="stdlib, a text file, .jsonl, a folder, or hf:NAME")
    how = command.add_mutually_exclusive_group(required=True)
    how.add_argument("--vocab-size", type=int, metavar="N", help="train a tokenizer of N tokens")
    how.add_argument("--tokenizer", metavar="FILE", help="measure this tokenizer.json, or byte or char")
    command.add_argument("--output", type=Path, metavar="FILE", help="where to write the trained tokenizer")
    command.add_argument(
        "--split", default="document", help="what is held out: document, tail or record (default %(default)s)"
    )
    command.add_argument(
        "--valid-fraction", type=float, default=0.05, metavar="P", help="share held out (default %(default)s)"
    )
    command.add_argument("--skip-bad-files", action="store_true", help="skip files that cannot be read")
    command.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    allow_download_argument(command)


def run(args: argparse.Namespace) -> int:
    from bitnet_jax.data import Source, Split, load_corpus
    from bitnet_jax.data.bpe import measure_compression, train_bpe
    from bitnet_jax.data.documents import TRAIN
    from bitnet_jax.training.run_folder import write_atomic

    if (args.vocab_size is None) != (args.output is None):
        raise ValueError("got --vocab-size or --output without the other, expected both, or --tokenizer FILE")
    reading: dict[str, Any] = {
        "skip_bad_files": args.skip_bad_files,
        "allow_download": args.allow_download or None,
    }
    began, tokenizer = time.perf_counter(), args.tokenizer
    if args.vocab_size is not None:
        if args.output.exists() and not args.overwrite:
            raise FileExistsError(f"got --output {args.output}, which exists; use --overwrite to replace it")
        documents = Source(args.source, **reading)
        split = Split.of(documents, args.split, args.valid_fraction)
        trained = train_bpe(
            split.part(documents, TRAIN),
            args.vocab_size,
            end_token="<|endoftext|>",
            text_bytes=split.text_bytes,
        )
        write_atomic(args.output, trained.to_json())
        tokenizer = str(args.output.absolute())
    corpus = load_corpus(
        args.source,
        tokenizer=tokenizer,
        split=args.split,
        valid_fraction=args.valid_fraction,
        **reading,
    )
    measured = measure_compression(corpus)
    figures = corpus.summary() | measured.summary()
    figures |= {"source": args.source, "split": args.split, "seconds": time.perf_counter() - began}
    write_json(args.json, figures)
    print(
        f"{corpus.train_bytes:,} bytes for training are {len(corpus.train):,} tokens, {corpus.valid_bytes:,} held out "
        f"are {len(corpus.valid):,}\n"
        f"held out: {measured.bytes_per_token:.3f} bytes a token (byte tokenizer: 1), "
        f"{measured.used:.1%} of the {measured.vocab_size:,} tokens occur; {measured.train_used:.1%} in training"
    )
    if args.output is not None:
        print(
            f"wrote {args.output}; bitnet-jax train --config CONFIG --config.data.tokenizer={args.output} "
            f"--config.model.vocab_size={args.vocab_size}"
        )
    return 0
