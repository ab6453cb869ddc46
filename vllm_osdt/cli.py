"""The ``vllm-osdt`` command: look after calibration profiles, make one ahead of time, and check an installation.

Exit status: 0 when all went well, 1 when something asked for is not there or does not hold, 2 for wrong arguments.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_osdt import __version__
from vllm_osdt.calibration.fingerprint import ModelFingerprint
from vllm_osdt.calibration.profile import CalibrationProfile, Setting, as_lists
from vllm_osdt.calibration.store import ProfileStore, UnusableFileError, default_folder, read_file, read_folder
from vllm_osdt.config import METRICS, MODES, RECORDS, DecodingOptions, check_operator_values, parse_operator_json
from vllm_osdt.errors import OSDTError

STATISTICS = [("conformal", "masked"), *((metric, record) for metric in METRICS[1:] for record in RECORDS)]


class CommandError(OSDTError):
    """What was asked for is not there or cannot be done; ends the command with status 1."""


@dataclass(frozen=True)
class Found:
    """A profile on disk and the model it is for; one that was replaced is kept for a while, to be pinned by its id."""

    fingerprint: ModelFingerprint
    model: str
    profile: CalibrationProfile
    is_replaced: bool

    def is_of(self, model: str) -> bool:
        """Whether its model is meant by a name, by the last part of one, or by the beginning of its fingerprint."""
        return model in (self.model, self.model.rsplit("/", 1)[-1]) or self.fingerprint.digest.startswith(model)

    def summary(self) -> dict[str, Any]:
        """One line of ``profiles list``."""
        key, used = self.profile.key, ~np.isnan(self.profile.record.confidence)
        return {
            "id": self.profile.profile_id,
            "task": key.task,
            "model": self.model or self.fingerprint.digest,
            "fingerprint": self.fingerprint.digest,
            "dtype": self.fingerprint.dtype,
            "quantization": self.fingerprint.quantization,
            "block_length": key.block_length,
            "cache": key.cache,
            "threshold": key.threshold,
            "requests": self.profile.num_requests,
            "blocks": used.shape[1],
            "forwards": int(used.any(axis=3).sum()),
            "samples": int(used.sum()),
            "replaced": self.is_replaced,
            "created": self.profile.created,
            "versions": self.profile.versions,
        }


def _find(folder: Path, model: str | None = None) -> list[Found]:
    """The profiles in a folder, of one model or of all.

    Raises:
        CommandError: There is no such folder. (The user's own is made with its first profile.)
    """
    if not folder.is_dir() and folder != default_folder():
        raise CommandError(f"there is no folder {folder}")
    found = []
    for fingerprint, name, profiles in read_folder(folder):
        newest = {profile.key: profile for profile in profiles}  # files have it last
        found += [Found(fingerprint, name, profile, newest[profile.key] is not profile) for profile in profiles]
    if model is not None:
        found = [one for one in found if one.is_of(model)]
    return sorted(found, key=lambda one: (one.profile.key.task, one.model, one.profile.created))


def _one(args: argparse.Namespace, name: str) -> Found:
    """The profile of an id, of the beginning of an id, or of a task that has one."""
    everything = _find(args.dir, args.model_name)
    matching = [one for one in everything if one.profile.profile_id.startswith(name)]
    matching = matching or [one for one in everything if one.profile.key.task == name and not one.is_replaced]
    if len(matching) != 1:
        what = "no profile" if not matching else f"{len(matching)} profiles"
        ids = "".join(
            f"\n  {one.profile.profile_id}  {one.profile.key.task} of {one.summary()['model']}"
            for one in matching or everything
        )
        remedy = "name one of these by its id"
        if len({one.fingerprint for one in matching}) > 1:
            remedy += ", or their model with --model"
        raise CommandError(f"{what} in {args.dir} for {name!r}; {remedy}:{ids or ' (none)'}")
    return matching[0]


def _print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right" if isinstance(rows[0][name], int | float) else "left")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table)


def list_profiles(args: argparse.Namespace) -> None:
    """What is in the folder."""
    rows = [one.summary() for one in _find(args.dir, args.model_name)]
    if args.json:
        print(json.dumps(rows, indent=2))
    elif rows:
        shown = ("id", "task", "model", "block_length", "cache", "requests", "blocks", "replaced", "created")
        _print_table(f"profiles in {args.dir}", [{name: row[name] for name in shown} for row in rows])
    else:
        print(f"no profiles in {args.dir}")


def show(args: argparse.Namespace) -> None:
    """One profile: where it is from and the thresholds that each statistic makes of it, block by block."""
    found = _one(args, args.profile)
    settings = [Setting(mode, *rest) for mode in MODES for rest in STATISTICS]
    tables = {str(setting): as_lists(found.profile.thresholds(setting).values) for setting in settings}
    if args.json:
        print(json.dumps({**found.profile.as_dict(), **found.summary(), "thresholds": tables}, indent=2))
        return
    for name, value in found.summary().items():
        print(f"{name:<14}{value}")
    rows = []
    for setting in settings:
        if setting.mode == "block":
            blocks = {
                f"block {block}": "static" if row[0] is None else row[0]
                for block, row in enumerate(tables[str(setting)])
            }
            rows.append({"setting": str(setting).removeprefix("block/"), **blocks})
    _print_table("T by block, before cap and slack", rows)


def plot(args: argparse.Namespace) -> None:
    """A picture of one profile."""
    from vllm_osdt.calibration.picture import draw_signatures

    found = _one(args, args.profile)
    found.profile.thresholds(Setting())
    draw_signatures([{**found.profile.as_dict(), "model": found.summary()["model"]}], args.out)
    print(args.out)


def export(args: argparse.Namespace) -> None:
    """A profile in a file of its own, for another machine."""
    found = _one(args, args.profile)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    ProfileStore(args.dir, found.fingerprint, found.model).export(found.profile, args.file)
    print(f"{found.profile.profile_id} ({found.profile.key.task}) -> {args.file}")


def import_profiles(args: argparse.Namespace) -> None:
    """The profiles of an exported file, in place of those with their keys."""
    try:
        fingerprint, model, profiles = read_file(args.file)
    except FileNotFoundError:
        raise CommandError(f"there is no file {args.file}") from None
    except UnusableFileError as error:
        raise CommandError(f"{args.file} cannot be used: {error}") from None
    for profile in profiles:
        ProfileStore(args.dir, fingerprint, model).write(profile)
        print(f"{profile.profile_id} ({profile.key.task}) for model {model or fingerprint.digest}")


def remove(args: argparse.Namespace) -> None:
    """Delete profiles; a running engine keeps what it has in memory."""
    for name in args.profiles:
        found = _one(args, name)
        ProfileStore(args.dir, found.fingerprint, found.model).remove(found.profile)
        print(f"removed {found.profile.profile_id} ({found.profile.key.task})")


def compare(left: CalibrationProfile, right: CalibrationProfile) -> dict[str, Any]:
    """How two profiles differ, over the (block, step) cells that both have recorded."""
    shape = tuple(min(a, b) for a, b in zip(left.mean_confidence.shape, right.mean_confidence.shape, strict=True))
    a, b = (profile.mean_confidence[: shape[0], : shape[1]].astype(np.float64) for profile in (left, right))
    both = ~np.isnan(a) & ~np.isnan(b)
    a, b = a[both], b[both]
    first, second = (profile.thresholds(Setting(metric="q1")).values[:, 0] for profile in (left, right))
    return {
        "cells": int(both.sum()),
        "cosine": float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))),
        "mean_gap": float((b - a).mean()),
        "largest_gap": float(np.abs(b - a).max()),
        "thresholds": [[float(x), float(y)] for x, y in zip(first, second, strict=False)],
    }


def diff(args: argparse.Namespace) -> None:
    """How two profiles differ."""
    left, right = (_one(args, name).profile for name in (args.left, args.right))
    result = compare(left, right)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(f"mean confidences over {result['cells']} (block, step) cells that both have:")
    print(f"  cosine {result['cosine']:.4f}, mean gap {result['mean_gap']:+.4f}, largest {result['largest_gap']:.4f}")
    rows = [
        {"block": block, left.profile_id: x, right.profile_id: y, "difference": y - x}
        for block, (x, y) in enumerate(result["thresholds"])
    ]
    _print_table("T by block (q1 of all masked)", rows)


def calibrate(args: argparse.Namespace) -> None:
    """Decode prompts until they have made the task's profile, and keep it."""
    prompts = _prompts(args.prompts)
    options = check_operator_values(args.osdt_config)
    if len(prompts) < options.calibrations:
        raise CommandError(
            f"{args.prompts} holds {len(prompts)} prompts, but calibrations is {options.calibrations}; give more "
            'prompts, or fewer calibrations with --osdt-config (one request: {"calibrations": 1, "metric": "q1"})'
        )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    from vllm_osdt import profiles

    operator = {**args.osdt_config, "profile_dir": str(args.dir)}
    llm = LLM(
        model=args.model, dtype=args.dtype, max_model_len=args.max_model_len, additional_config={"osdt": operator}
    )
    extra = {"osdt_policy": "osdt", "osdt_task": args.task, "osdt_recalibrate": True}
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, extra_args=extra)
    args.dir.mkdir(parents=True, exist_ok=True)
    before = {(one.profile.profile_id, one.profile.created) for one in _find(args.dir)}
    num_tokens = num_forwards = num_decoded = 0
    while len(prompts) - num_decoded > 0:  # more than calibrations where some do not count
        batch = prompts[num_decoded : num_decoded + options.calibrations]
        num_decoded += len(batch)
        for output in llm.generate(batch, params, use_tqdm=False):
            num_tokens += len(output.outputs[0].token_ids)
            num_forwards += sum(output.outputs[0].spec_decode_metrics.histogram)
        found = [profile for profile in profiles(llm) if profile["task"] == args.task]
        made = [profile for profile in found if (profile["id"], profile["created"]) not in before]
        if made:
            number = made[0]["num_requests"]
            print(
                f"{made[0]['id']}  task {args.task}: {number} requests, {num_tokens} tokens in {num_forwards} forwards"
            )
            if number < DecodingOptions.calibrations:
                print(f"a server uses it for requests with osdt_calibrations = {number} or fewer")
            return
    raise CommandError(f"none of the {len(prompts)} prompts made a profile; --max-tokens must be at least one block")


def _prompts(path: Path) -> list[str]:
    """One prompt a line, or JSON lines with ``prompt``."""
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise CommandError(f"the prompts cannot be read: {error}") from None
    if path.suffix == ".jsonl":
        try:
            lines = [json.loads(line)["prompt"] for line in lines]
        except (ValueError, KeyError, TypeError):
            raise CommandError(f"{path}: every line must be a JSON object with the field prompt") from None
    if not lines:
        raise CommandError(f"{path} holds no prompt")
    return lines


def doctor(args: argparse.Namespace) -> None:
    """Whether this installation can serve, line by line."""
    checks = [_check(name, check) for name, check in _CHECKS.items()]
    if args.json:
        print(json.dumps(checks, indent=2))
    else:
        for check in checks:
            print(f"{'ok ' if check['ok'] else 'BAD'}  {check['name']:<16}{check['found']}")
    if not all(check["ok"] for check in checks):
        raise CommandError("not everything is as it should be")


def _check(name: str, check: Callable[[], tuple[bool, str]]) -> dict[str, Any]:
    try:
        ok, found = check()
    except Exception as error:  # a broken installation may fail in any way; that is the finding
        ok, found = False, f"{type(error).__name__}: {error}"
    return {"name": name, "ok": ok, "found": found}


def _versions() -> tuple[bool, str]:
    from importlib import metadata

    import torch

    vllm = metadata.version("vllm")
    supported = (0, 32) <= tuple(int(part) for part in vllm.split(".")[:2]) < (0, 34)
    return supported, f"vllm-osdt {__version__}, vllm {vllm} (0.32 or 0.33 needed), torch {torch.__version__}"


def _plugin() -> tuple[bool, str]:
    from vllm.model_executor.models import ModelRegistry
    from vllm.plugins import load_general_plugins

    from vllm_osdt.plugin import ARCHITECTURES

    load_general_plugins()
    missing = set(ARCHITECTURES) - set(ModelRegistry.get_supported_archs())
    return not missing, f"vLLM does not know {sorted(missing)}" if missing else f"serves {', '.join(ARCHITECTURES)}"


def _triton() -> tuple[bool, str]:
    import triton

    from vllm_osdt.cpu.triton_backend.stand_in import is_interpreting

    if is_interpreting():
        return (
            True,
            f"triton {triton.__version__}, no GPU: its interpreter stands in, hot loops are compiled with Numba",
        )
    return True, f"triton {triton.__version__} with a compiler"


def _kernels() -> tuple[bool, str]:
    import torch

    import csrc_triton

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    token, probability = csrc_triton.confidence(torch.tensor([[0.0, 3.0, 1.0]], device=device), excluded_token_id=1)
    right = token.item() == 2 and abs(probability.item() - 0.1141952) < 1e-4
    return right, f"{csrc_triton.implementations(device).confidence.__module__} on {device.type}"


def _folder() -> tuple[bool, str]:
    folder = default_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return existing.is_dir() and os.access(existing, os.W_OK), f"{folder} ({len(_find(folder))} profiles)"


def _processor() -> tuple[bool, str]:
    """What it serves in by default."""
    import torch

    if torch.cuda.is_available():
        return True, f"{torch.cuda.get_device_name()}: the checkpoint's dtype, bfloat16 for float32"
    from vllm_osdt.engine_config import has_fast_bfloat16

    can = [
        name
        for name, has in (
            ("AVX2", torch.cpu._is_avx2_supported()),
            ("AVX512", torch.cpu._is_avx512_supported()),
            ("AVX512-BF16", torch.cpu._is_avx512_bf16_supported()),
            ("AMX", torch.cpu._is_amx_tile_supported()),
        )
        if has
    ]
    dtype = "bfloat16" if has_fast_bfloat16() else "float32, since bfloat16 would be slower"
    return True, f"CPU with {', '.join(can) or 'none of AVX2, AVX512, AMX'}; serves in {dtype}"


_CHECKS = {
    "versions": _versions,
    "processor": _processor,
    "plugin": _plugin,
    "triton": _triton,
    "kernels": _kernels,
    "profile folder": _folder,
}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="vllm-osdt",
        description="Calibration profiles of One-Shot Dynamic Thresholding.",
        epilog="examples:\n  vllm-osdt doctor\n  vllm-osdt profiles list\n  vllm-osdt profiles show gsm8k\n"
        "  vllm-osdt calibrate llada-mini --task quiz --prompts prompts.txt --max-tokens 96",
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"vllm-osdt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument(
        "--dir", type=Path, default=default_folder(), help="folder of the profiles (default: %(default)s)"
    )
    one_model = argparse.ArgumentParser(add_help=False)
    one_model.add_argument(
        "--model", dest="model_name", help="only this model's: its name, or the beginning of its fingerprint"
    )
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
        parents=[folder],
        formatter_class=raw,
    )
    command.add_argument("model", help="checkpoint, or the name of a bundled model")
    command.add_argument("--task", required=True, help="name that requests will give as osdt_task")
    command.add_argument("--prompts", type=Path, required=True, help="a prompt a line, or .jsonl with the field prompt")
    command.add_argument("--max-tokens", type=int, default=256, help="canvas of the calibrating requests")
    command.add_argument("--dtype", default="auto", help="as the server's: a profile is for one dtype")
    command.add_argument("--max-model-len", type=int, help="as vLLM's")
    command.add_argument("--osdt-config", type=parse_operator_json, default={}, help="options of the server, as JSON")
    command.set_defaults(function=calibrate)

    command = commands.add_parser(
        "doctor", help="check this installation", description=doctor.__doc__, parents=[as_json]
    )
    command.set_defaults(function=doctor)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = make_parser().parse_args(arguments)
    if getattr(args, "model", None) is not None:
        from vllm_osdt.mini import MODELS, model_path

        args.model = model_path(args.model) if args.model in MODELS else args.model
    try:
        args.function(args)
    except (OSDTError, OSError) as error:
        print(f"vllm-osdt: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
