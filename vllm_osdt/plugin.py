"""What this package adds to vLLM, as one list. vLLM calls :func:`register` in every one of its processes."""

_MODELS = {
    # architecture: (model class, HF model_type, config class)
    "LLaDAModelLM": ("vllm_osdt.models.llada:LLaDAModelLM", "llada", "vllm_osdt.models.llada_config:LLaDAConfig"),
    "SDARForCausalLM": ("vllm_osdt.models.sdar:SDARForCausalLM", "sdar", "vllm_osdt.models.sdar_config:SDARConfig"),
    "SDARMoeForCausalLM": (
        "vllm_osdt.models.sdar:SDARMoeForCausalLM",
        "sdar_moe",
        "vllm_osdt.models.sdar_config:SDARMoeConfig",
    ),
    "LLaDA2MoeModelLM": (
        "vllm_osdt.models.llada2:LLaDA2MoeModelLM",
        "llada2_moe",
        "vllm_osdt.models.llada2_config:LLaDA2MoeConfig",
    ),
    "Fast_dLLM_QwenForCausalLM": (
        "vllm_osdt.models.fast_dllm_v2:FastDLLMv2ForCausalLM",
        "Fast_dLLM_Qwen",
        "vllm_osdt.models.fast_dllm_v2_config:FastDLLMv2Config",
    ),
    "LLaDAMoEModelLM": (
        "vllm_osdt.models.llada_moe:LLaDAMoEModelLM",
        "llada_moe",
        "vllm_osdt.models.llada_moe_config:LLaDAMoEConfig",
    ),
    "ILLaDAForCausalLM": (
        "vllm_osdt.models.illada:ILLaDAForCausalLM",
        "illada",
        "vllm_osdt.models.illada_config:ILLaDAConfig",
    ),
    "A2DQwen3LMHeadModel": (
        "vllm_osdt.models.a2d:A2DQwen3LMHeadModel",
        "a2d-qwen3",
        "vllm_osdt.models.a2d_config:A2DQwen3Config",
    ),
    "A2DQwen2LMHeadModel": (
        "vllm_osdt.models.a2d:A2DQwen2LMHeadModel",
        "a2d-qwen2",
        "vllm_osdt.models.a2d_config:A2DQwen2Config",
    ),
    "A2DLlamaLMHeadModel": (
        "vllm_osdt.models.a2d:A2DLlamaLMHeadModel",
        "a2d-llama",
        "vllm_osdt.models.a2d_config:A2DLlamaConfig",
    ),
    "DreamModel": ("vllm_osdt.models.dream:DreamModel", "Dream", "vllm_osdt.models.dream_config:DreamConfig"),
    "StableDiffcoderForCausalLM": (
        "vllm_osdt.models.stable_diffcoder:StableDiffcoderForCausalLM",
        "stable_diffcoder",  # the checkpoints say "llama"; see CanvasConfigParser
        "vllm_osdt.models.stable_diffcoder_config:StableDiffcoderConfig",
    ),
}

ARCHITECTURES = frozenset(_MODELS)


def register() -> None:
    """Register models, config classes, engine defaults and the patches of ``compat``; safe to call twice."""
    from importlib import import_module

    from transformers import AutoTokenizer
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.config import _CONFIG_FORMAT_TO_CONFIG_PARSER, _CONFIG_REGISTRY

    from vllm_osdt import compat
    from vllm_osdt.engine_config import CanvasModelConfig
    from vllm_osdt.models.config_parser import CanvasConfigParser
    from vllm_osdt.models.dream_config import DreamConfig
    from vllm_osdt.models.dream_tokenizer import DreamTokenizer
    from vllm_osdt.models.llada_moe_config import LLaDAMoEConfig

    for architecture, (model, model_type, config) in _MODELS.items():
        ModelRegistry.register_model(architecture, model)
        module, name = config.split(":")
        _CONFIG_REGISTRY[model_type] = CanvasConfigParser.classes[architecture] = getattr(import_module(module), name)
        MODELS_CONFIG_MAP[architecture] = CanvasModelConfig
    _CONFIG_REGISTRY["lladamoe"] = LLaDAMoEConfig  # what some copies of LLaDA-MoE say
    _CONFIG_FORMAT_TO_CONFIG_PARSER["hf"] = CanvasConfigParser
    AutoTokenizer.register(DreamConfig, DreamTokenizer, exist_ok=True)
    compat.apply()
