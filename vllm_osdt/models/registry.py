"""The model families: one line each, and the test whether a model is one of them."""

from typing import Any, NamedTuple


class Family(NamedTuple):
    """Where a family's classes are; ``module:class``, as vLLM's model registry names them."""

    model: str
    model_type: str  # as in config.json
    config: str


FAMILIES: dict[str, Family] = {  # by architecture, as in config.json
    "LLaDAModelLM": Family("llada:LLaDAModelLM", "llada", "llada:LLaDAConfig"),
    "LLaDAMoEModelLM": Family("llada_moe:LLaDAMoEModelLM", "llada_moe", "llada_moe:LLaDAMoEConfig"),
    "DreamModel": Family("dream:DreamModel", "Dream", "dream:DreamConfig"),
    "SDARForCausalLM": Family("sdar:SDARForCausalLM", "sdar", "sdar:SDARConfig"),
    "SDARMoeForCausalLM": Family("sdar:SDARMoeForCausalLM", "sdar_moe", "sdar:SDARMoeConfig"),
    "LLaDA2MoeModelLM": Family("llada2:LLaDA2MoeModelLM", "llada2_moe", "llada2:LLaDA2MoeConfig"),
    "Fast_dLLM_QwenForCausalLM": Family(
        "fast_dllm_v2:FastDLLMv2ForCausalLM", "Fast_dLLM_Qwen", "fast_dllm_v2:FastDLLMv2Config"
    ),
    "StableDiffcoderForCausalLM": Family(
        "stable_diffcoder:StableDiffcoderForCausalLM", "stable_diffcoder", "stable_diffcoder:StableDiffcoderConfig"
    ),
    "ILLaDAForCausalLM": Family("illada:ILLaDAForCausalLM", "illada", "illada:ILLaDAConfig"),
    "A2DQwen3LMHeadModel": Family("a2d:A2DQwen3LMHeadModel", "a2d-qwen3", "a2d:A2DQwen3Config"),
    "A2DQwen2LMHeadModel": Family("a2d:A2DQwen2LMHeadModel", "a2d-qwen2", "a2d:A2DQwen2Config"),
    "A2DLlamaLMHeadModel": Family("a2d:A2DLlamaLMHeadModel", "a2d-llama", "a2d:A2DLlamaConfig"),
    "NemotronLabsDiffusionModel": Family(
        "nemotron_labs_diffusion:NemotronLabsDiffusionModel",
        "nemotron_labs_diffusion",
        "nemotron_labs_diffusion:NemotronLabsDiffusionConfig",
    ),
}
# Other model types that checkpoints of a family say.
ALIASES = {"lladamoe": "LLaDAMoEModelLM"}


def model_class(architecture: str) -> str:
    """``module:class`` of a family's model."""
    return f"{__package__}.{FAMILIES[architecture].model}"


def config_class(architecture: str) -> Any:
    """The Hugging Face config class of a family."""
    from importlib import import_module

    module, name = FAMILIES[architecture].config.split(":")
    return getattr(import_module(f"{__package__}.configs.{module}"), name)


def is_canvas_model(model_config: Any) -> bool:
    """Whether an engine's model is one of this package's; ``model_config`` is vLLM's, or None."""
    return model_config is not None and model_config.architecture in FAMILIES
