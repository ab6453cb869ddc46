"""What this package adds to vLLM, as one list. vLLM calls :func:`register` in every one of its processes."""


def register() -> None:
    """Register models, config classes, engine defaults and the patches of ``host.compat``; safe to call twice."""
    from transformers import AutoTokenizer
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from vllm_osdt.engine.engine_config import CanvasModelConfig
    from vllm_osdt.frontend import admission, parameters, parsing, response, sent
    from vllm_osdt.frontend.metrics import PrometheusMetrics
    from vllm_osdt.host import compat
    from vllm_osdt.models.configs.dream import DreamConfig
    from vllm_osdt.models.configs.dream_tokenizer import DreamTokenizer
    from vllm_osdt.models.registry import ALIASES, FAMILIES, config_class, model_class

    for architecture, family in FAMILIES.items():
        ModelRegistry.register_model(architecture, model_class(architecture))
        _CONFIG_REGISTRY[family.model_type] = config_class(architecture)
        MODELS_CONFIG_MAP[architecture] = CanvasModelConfig
    for model_type, architecture in ALIASES.items():
        _CONFIG_REGISTRY[model_type] = config_class(architecture)
    AutoTokenizer.register(DreamConfig, DreamTokenizer, exist_ok=True)
    compat.apply(compat.FrontEnd(admission, parameters, parsing, response, sent, PrometheusMetrics))
