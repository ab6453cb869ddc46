"""What a profile was calibrated on: the identity of a model's weights and how they are run."""

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
# Weight files are identified by name, size and this many evenly spaced pieces of this length: a finetune changes all
# tensors, and reading 16 GB at every start would cost more than a calibration.
NUM_PIECES, PIECE_BYTES = 16, 65536


@dataclass(frozen=True)
class ModelFingerprint:
    """Equal for two engines only if a profile of one may be used by the other.

    Attributes:
        weights: Hash of the weight files; of the model's name and revision where there are no local files.
        quantization: vLLM's name of the weight quantization, "none" without.
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


def weights_folder(model: str, revision: str | None) -> Path | None:
    """The folder of a checkpoint: itself, or that of its snapshot in the Hugging Face cache; None if there is none."""
    from vllm.transformers_utils.repo_utils import try_get_local_file

    if Path(model).is_dir():
        return Path(model)
    config = try_get_local_file(model, "config.json", revision or "main")
    return config.parent if isinstance(config, Path) else None


def model_fingerprint(
    vllm_config: "VllmConfig", checkpoint: tuple[str, str | None] | None = None
) -> ModelFingerprint | None:
    """The identity of an engine's model.

    Args:
        vllm_config: The engine's configuration.
        checkpoint: Model and revision whose files its weights are, where it has read them anew.

    Returns:
        None where a checkpoint has no files of a known kind here.
    """
    model = vllm_config.model_config
    weights = None
    if vllm_config.load_config.load_format != "dummy":
        folder = weights_folder(*(checkpoint or (model.model, model.revision)))
        weights = hash_weights(folder) if folder is not None else None
    if weights is None and checkpoint is not None:
        return None
    if weights is None:
        commit = getattr(model.hf_config, "_commit_hash", None)
        weights = f"{model.model}@{commit or model.revision}"
    return ModelFingerprint(
        weights=weights,
        quantization=model.quantization or "none",
        dtype=str(model.dtype).removeprefix("torch."),
        vocab_size=model.hf_config.vocab_size,
        mask_token_id=model.hf_config.mask_token_id,
    )


def model_name(model: str) -> str:
    """What people call a model: its repository, or its folder.

    (Offline, vLLM puts the folder of a snapshot in the place of the repository.)
    """
    snapshot = re.search(r"models--([^/]+)/snapshots/[^/]+/?$", model)
    if snapshot:
        return snapshot[1].replace("--", "/")
    return Path(model).resolve().name if Path(model).is_dir() else model
