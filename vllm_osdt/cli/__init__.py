"""The ``vllm-osdt`` command: look after calibration profiles, make or tune one ahead of time, check an installation.

Exit status: 0 when all went well, 1 when something asked for is not there or does not hold, 2 for wrong arguments.
"""

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_osdt import __version__
from vllm_osdt.calibration.store import default_folder
from vllm_osdt.cli.calibrate import calibrate
from vllm_osdt.cli.common import find_model
from vllm_osdt.cli.doctor import doctor
from vllm_osdt.cli.options import options
from vllm_osdt.cli.profiles import diff, export, import_profiles, list_profiles, plot, remove, show
from vllm_osdt.cli.train_filter import train_filter
from vllm_osdt.cli.tune import add_arguments as add_tune_arguments
from vllm_osdt.cli.tune import tune
from vllm_osdt.errors import OSDTError
from vllm_osdt.options.operator import parse_operator_json


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="vllm-osdt",
        description="Calibration profiles of One-Shot Dynamic Thresholding.",
        epilog="examples:\n  vllm-osdt doctor\n  vllm-osdt profiles list\n  vllm-osdt profiles show gsm8k\n"
        "  vllm-osdt calibrate llada-mini --task quiz --prompts prompts.txt --max-tokens 96\n"
        "  vllm-osdt tune llada-mini --task quiz --prompts prompts.txt --max-tokens 96",
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"vllm-osdt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument(
        "--dir",
        "--profile-dir",
        type=Path,
        default=default_folder(),
        help="folder of the profiles (default: %(default)s)",
    )
    one_model = argparse.ArgumentParser(add_help=False)
    one_model.add_argument(
        "--model", dest="model_name", help="only this model's: its name, or the beginning of its fingerprint"
    )
    engine = argparse.ArgumentParser(add_help=False)
    engine.add_argument("--dtype", default="auto", help="as the server's: a profile is for one dtype")
    engine.add_argument("--max-model-len", type=int, help="as vLLM's")
    engine.add_argument("--osdt-config", type=parse_operator_json, default={}, help="options of the server, as JSON")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="machine-readable output")

    profiles = commands.add_parser("profiles", help="look after the profiles on disk").add_subparsers(required=True)

    def add(name: str, function: Callable[[argparse.Namespace], None], *parents: argparse.ArgumentParser) -> Any:
        command = profiles.add_parser(
            name, help=function.__doc__, description=function.__doc__, parents=[folder, *parents], formatter_class=raw
        )
        command.set_defaults(function=function)
        return command

    profile_help = "id, beginning of an id, or name of a task that has one profile"
    add("list", list_profiles, one_model, as_json)
    add("show", show, one_model, as_json).add_argument("profile", help=profile_help)
    command = add("plot", plot, one_model)
    command.add_argument("profile", help=profile_help)
    command.add_argument("--out", type=Path, required=True, help="picture to write, such as profile.png")
    command = add("export", export, one_model)
    command.add_argument("profile", help=profile_help)
    command.add_argument("file", type=Path)
    add("import", import_profiles).add_argument("file", type=Path)
    add("remove", remove, one_model).add_argument("profiles", nargs="+", help=profile_help)
    command = add("diff", diff, one_model, as_json)
    command.add_argument("left", help=profile_help)
    command.add_argument("right", help=profile_help)

    command = commands.add_parser(
        "calibrate",
        help="make a task's profile ahead of time",
        description=calibrate.__doc__,
        epilog="example:\n  vllm-osdt calibrate GSAI-ML/LLaDA-8B-Instruct --task gsm8k --prompts gsm8k.jsonl",
        parents=[folder, engine],
        formatter_class=raw,
    )
    command.add_argument("model", help="checkpoint, or the name of a bundled model")
    command.add_argument("--task", required=True, help="name that requests will give as osdt_task")
    command.add_argument("--prompts", type=Path, required=True, help="a prompt a line, or .jsonl with the field prompt")
    command.add_argument("--max-tokens", type=int, default=256, help="of every request (default: %(default)s)")
    command.set_defaults(function=calibrate)

    command = commands.add_parser(
        "tune",
        help="choose how a task is decoded, with a bound on what is lost",
        description=inspect.getdoc(tune),
        epilog="example:\n  vllm-osdt tune GSAI-ML/LLaDA-8B-Instruct --task gsm8k --prompts gsm8k.jsonl "
        "--answers gsm8k.jsonl \\\n    --answer-pattern '#### (.*)' --risk 0.02",
        parents=[folder, engine, as_json],
        formatter_class=raw,
    )
    command.add_argument("model", help="checkpoint, name of a bundled model, or of a model that the server has")
    add_tune_arguments(command)
    command.set_defaults(function=tune)

    command = commands.add_parser(
        "train-filter",
        help="make the filter of the policy learned_filter",
        description=train_filter.__doc__,
        epilog="example:\n  vllm-osdt calibrate llada-mini --task quiz --prompts prompts.txt --max-tokens 96\n"
        "  vllm-osdt train-filter quiz --out filter.safetensors\n"
        '  vllm serve ... --osdt-config \'{"policy": "learned_filter", "filter_file": "filter.safetensors"}\'',
        parents=[folder, one_model, as_json],
        formatter_class=raw,
    )
    command.add_argument("profiles", nargs="+", help=profile_help)
    command.add_argument("--out", type=Path, required=True, help="file to write, in the safetensors format")
    command.add_argument("--seed", type=int, default=0, help="of the training (default: %(default)s)")
    command.add_argument("--max-updates", type=int, default=3000, help="of the weights (default: %(default)s)")
    command.set_defaults(function=train_filter)

    command = commands.add_parser(
        "options", help="explain every option", description=options.__doc__, parents=[as_json]
    )
    command.set_defaults(function=options)
    command = commands.add_parser(
        "doctor", help="check this installation", description=doctor.__doc__, parents=[as_json]
    )
    command.set_defaults(function=doctor)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = make_parser().parse_args(arguments)
    try:
        if getattr(args, "model", None) is not None and not getattr(args, "server", None):
            args.model = find_model(args.model)
        args.function(args)
    except (OSDTError, OSError) as error:
        print(f"vllm-osdt: {error}", file=sys.stderr)
        return 1
    return 0
