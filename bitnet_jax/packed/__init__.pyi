from .packing import PackingError, check_packable, pack, sizes
from .proof import Proof, prove
from .storage import load_packed, save_packed
from .tensor_file import StorageError

__all__ = [
    "PackingError",
    "Proof",
    "StorageError",
    "check_packable",
    "load_packed",
    "pack",
    "prove",
    "save_packed",
    "sizes",
]
