"""Text as token batches: deterministic, shuffled, any batch by its step alone. Knows no model."""

from bitnet_jax.data.batches import TokenBatches, consecutive_batches
from bitnet_jax.data.corpus import Corpus, load_corpus, load_tokenizer, token_stream
from bitnet_jax.data.errors import DataError
from bitnet_jax.data.text import Document, Documents, read_documents, resolve_path, split_documents
from bitnet_jax.data.tokenizers import ByteTokenizer, CharTokenizer, JsonTokenizer, Tokenizer, from_json

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "DataError",
    "Document",
    "Documents",
    "JsonTokenizer",
    "TokenBatches",
    "Tokenizer",
    "consecutive_batches",
    "from_json",
    "load_corpus",
    "load_tokenizer",
    "read_documents",
    "resolve_path",
    "split_documents",
    "token_stream",
]
