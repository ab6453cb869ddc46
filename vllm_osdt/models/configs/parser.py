"""vLLM's reader of checkpoint configs, and the config class of an architecture of ours behind any model type."""

from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from vllm.transformers_utils.config import HFConfigParser

from vllm_osdt.models.registry import FAMILIES, config_class


class CanvasConfigParser(HFConfigParser):
    """Put in the place of vLLM's parser of the format ``hf``.

    vLLM chooses a config class by model type. Some checkpoints have the model type of an autoregressive family
    (Stable-DiffCoder has ``llama``), and an operator may name an architecture of ours for one that has both
    (``--hf-overrides '{"architectures": [...]}'``). All other configs are vLLM's, the very objects.

    Attributes:
        classes: Config class by architecture.
    """

    classes: ClassVar[dict[str, type[PreTrainedConfig]]] = {name: config_class(name) for name in FAMILIES}

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], PreTrainedConfig]:
        """The content of ``config.json``, and its config.

        Raises:
            UnsupportedModelError: It is one of ours, and a field has a value that the model code does not implement.
        """
        overrides = kwargs.get("hf_overrides")
        fields, config = super().parse(model, trust_remote_code, revision, code_revision, **kwargs)
        named = overrides.get("architectures") if isinstance(overrides, dict) else None
        architectures = named or fields.get("architectures") or ()
        own = next((self.classes[name] for name in architectures if name in self.classes), None)
        if own is None or isinstance(config, own):
            return fields, config
        fields_of_own = {**fields, "model_type": own.model_type}
        return fields, own.from_dict(fields_of_own, name_or_path=config.name_or_path)
