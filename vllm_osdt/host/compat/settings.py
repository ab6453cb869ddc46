"""Patches of how vLLM comes to its configuration: the command line, engine arguments, the model's own config."""

import functools
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from vllm_osdt.errors import OSDTError
from vllm_osdt.host.compat.wrapping import MARK, wrap
from vllm_osdt.options.operator import parse_operator_json
from vllm_osdt.options.reference import operator_help

# Engine arguments as the operator gave them, while vLLM makes its config of them: vLLM fills in its own defaults before
# it asks for ours. Empty for a config that was made without them.
ASKED: ContextVar[Mapping[str, Any]] = ContextVar("ASKED", default=MappingProxyType({}))
ASKED_NAMES = ("dtype", "enable_chunked_prefill", "enable_prefix_caching", "async_scheduling", "diffusion_config")


def patch_command_line() -> None:
    """``--plugin osdt`` and ``--osdt-config`` for ``vllm serve`` and every other command with engine arguments.

    Goes when vLLM has a plugin hook for engine arguments.
    """
    from vllm.engine.arg_utils import EngineArgs

    def make_add_cli_args(original):
        def add_cli_args(parser, *args, **kwargs):
            parser = original(parser, *args, **kwargs)
            if "--osdt-config" not in parser._option_string_actions:
                group = parser.add_argument_group(
                    title="vllm-osdt",
                    description="Masked diffusion language models with One-Shot Dynamic Thresholding.",
                )
                group.add_argument(
                    "--plugin",
                    choices=["osdt"],
                    default=None,
                    help="Fail unless this plugin is loaded; vLLM loads installed plugins by itself.",
                )
                group.add_argument(
                    "--osdt-config",
                    type=parse_operator_json,
                    default=None,
                    help=operator_help().replace("%", "%%"),
                )
            return parser

        return add_cli_args

    def make_from_cli_args(original):
        def from_cli_args(cls, args):
            options = getattr(args, "osdt_config", None)
            if options is not None:  # in the arguments: API servers of their own read them before they load plugins
                args.additional_config = {**(args.additional_config or {}), "osdt": options}
            return original(cls, args)

        return from_cli_args

    # AsyncEngineArgs.add_cli_args loads the plugins and then calls this one.
    wrap(EngineArgs, "add_cli_args", make_add_cli_args)
    original = EngineArgs.__dict__["from_cli_args"].__func__
    if not getattr(original, MARK, False):
        wrapper = functools.wraps(original)(make_from_cli_args(original))
        setattr(wrapper, MARK, True)
        EngineArgs.from_cli_args = classmethod(wrapper)


def patch_engine_arguments() -> None:
    """Our hook for engine settings sees which of them the operator has set.

    Its refusals are not wrapped in a validation error of the whole config.

    vLLM replaces arguments that are None by its own defaults before it asks for ours. Goes when a model can state its
    defaults.
    """
    from pydantic import ValidationError
    from vllm.engine.arg_utils import EngineArgs

    def make_create(original):
        def create_engine_config(self, *args, **kwargs):
            # Once: vLLM writes what it fills in into the arguments.
            asked = self.__dict__.setdefault("osdt_asked", {name: getattr(self, name) for name in ASKED_NAMES})
            token = ASKED.set(asked)
            try:
                return original(self, *args, **kwargs)
            except ValidationError as error:
                for one in error.errors():
                    cause = one.get("ctx", {}).get("error")
                    if isinstance(cause, OSDTError):
                        raise cause from None
                raise
            finally:
                ASKED.reset(token)

        return create_engine_config

    wrap(EngineArgs, "create_engine_config", make_create)


def patch_config_parser() -> None:
    """An architecture of ours gets its config class whatever its model type (see ``CanvasConfigParser``).

    vLLM lets a plugin register parsers of other formats, and config classes by model type alone. Goes when config
    classes can be registered by architecture.
    """
    from vllm.transformers_utils.config import _CONFIG_FORMAT_TO_CONFIG_PARSER

    from vllm_osdt.models.configs.parser import CanvasConfigParser

    _CONFIG_FORMAT_TO_CONFIG_PARSER["hf"] = CanvasConfigParser
