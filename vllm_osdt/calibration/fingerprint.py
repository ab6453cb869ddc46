"""What a profile was calibrated on: the identity of a model's weights and how they are run."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
# Weight files are identified by name, size and this many evenly spaced pieces of this length: a finetune changes all
# tensors, and reading 16 GB at every start would cost more than a calibration.
NUM_PIECES, PIECE_BYTES = 16, 65536


@dataclass(frozen=True)
class ModelFingerprint:
    """Equal for two engines only if a profile of one may be used by the other.

    Attributes:
        weights: Hash of the weight files; of the model's name and revision where there are no local files.
        quantization: vLLM's name of the weight quantisation, "none" without.
        dtype: Activation dtype, such as "bfloat16".
        vocab_size: Rows of the output head.
        mask_token_id: Id of an undecided position.
    """

    weights: str
    quantization: str
    dtype: str
    vocab_size: int
    mask_token_id: int

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name a folder."""
        return hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:16]


def hash_weights(folder: Path) -> str | None:
    """Hash of a checkpoint folder's weight files, None if it has none."""
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES) if folder.is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as weights:
            for piece in range(NUM_PIECES):
                weights.seek(max(0, size - PIECE_BYTES) * piece // (NUM_PIECES - 1))
                digest.update(weights.read(PIECE_BYTES))
    return digest.hexdigest()
