"""Text and images as deterministic, shuffled batches with random access by step. Independent of any model."""

from bitnet_jax.data.batches import ExampleBatches, TokenBatches, consecutive_batches, whole_batches
from bitnet_jax.data.classes import Classes
from bitnet_jax.data.corpus import Corpus, load_corpus, load_stream, load_tokenizer
from bitnet_jax.data.documents import Document, Documents, Split, split_documents
from bitnet_jax.data.errors import DataError
from bitnet_jax.data.images import ImageSets, LabelledImages, load_images
from bitnet_jax.data.labelled_text import LabelledText, load_labelled_text
from bitnet_jax.data.mixtures import MixedBatches
from bitnet_jax.data.streams import MeasuredStream, measured_stream, token_stream
from bitnet_jax.data.text import Source, read_documents, resolve_path
from bitnet_jax.data.tokenizers import ByteTokenizer, CharTokenizer, JsonTokenizer, Tokenizer, from_json

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "Classes",
    "Corpus",
    "DataError",
    "Document",
    "Documents",
    "ExampleBatches",
    "ImageSets",
    "JsonTokenizer",
    "LabelledImages",
    "LabelledText",
    "MeasuredStream",
    "MixedBatches",
    "Source",
    "Split",
    "TokenBatches",
    "Tokenizer",
    "consecutive_batches",
    "from_json",
    "load_corpus",
    "load_images",
    "load_labelled_text",
    "load_stream",
    "load_tokenizer",
    "measured_stream",
    "read_documents",
    "resolve_path",
    "split_documents",
    "token_stream",
    "whole_batches",
]
