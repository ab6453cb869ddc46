"""``vllm-osdt profiles``: look after calibration profiles on disk."""

import argparse
import json
from typing import Any, get_args

import numpy as np

from vllm_osdt.calibration.profile import CalibrationProfile, Setting, as_lists, setting_in_words
from vllm_osdt.calibration.store import ProfileStore, UnusableFileError, read_file
from vllm_osdt.cli.common import CommandError, find_profiles, one_profile, print_table
from vllm_osdt.policies.osdt import Granularity, Record, Statistic

GRANULARITIES = get_args(Granularity)
STATISTICS = [
    ("conformal", "masked"),
    *((statistic, record) for statistic in get_args(Statistic)[1:] for record in get_args(Record)),
]


def list_profiles(args: argparse.Namespace) -> None:
    """What is in the folder."""
    rows = [one.summary() for one in find_profiles(args.dir, args.model_name)]
    if args.json:
        print(json.dumps(rows, indent=2))
    elif rows:
        shown = ("id", "task", "model", "block_length", "cache", "choice", "requests", "blocks", "replaced", "created")
        print_table(f"profiles in {args.dir}", [{name: row[name] for name in shown} for row in rows])
    else:
        print(f"no profiles in {args.dir}")


def show(args: argparse.Namespace) -> None:
    """One profile: where it is from and the thresholds that each statistic makes of it, block by block."""
    found = one_profile(args, args.profile)
    settings = [Setting(granularity, *rest) for granularity in GRANULARITIES for rest in STATISTICS]
    tables = {str(setting): as_lists(found.profile.thresholds(setting).values) for setting in settings}
    if args.json:
        about = found.profile.as_dict()
        about |= {**found.summary(), "promised": about["choice"], "thresholds": tables}
        print(json.dumps(about, indent=2))
        return
    for name, value in found.summary().items():
        print(f"{name:<14}{value}")
    choice = found.profile.choice
    if choice is not None:
        decoding = ", ".join(f"{name} {value}" for name, value in choice.decoding.items())
        print(
            f"promised      at most {choice.risk:g} of requests lose, with confidence {choice.confidence:g}: of "
            f"{choice.num_prompts} prompts {choice.num_lost} had {choice.loss} "
            f"({setting_in_words(choice.reference)}; {decoding})"
        )
    rows = []
    for setting in settings:
        if setting.granularity == "block":
            blocks = {
                f"block {block}": "static" if row[0] is None else row[0]
                for block, row in enumerate(tables[str(setting)])
            }
            rows.append({"setting": str(setting).removeprefix("block/"), **blocks})
    print_table("T by block, before cap and slack", rows)


def plot(args: argparse.Namespace) -> None:
    """A picture of one profile."""
    from vllm_osdt.calibration.plot import draw_signatures

    found = one_profile(args, args.profile)
    found.profile.thresholds(Setting())
    draw_signatures([{**found.profile.as_dict(), "model": found.summary()["model"]}], args.out)
    print(args.out)


def export(args: argparse.Namespace) -> None:
    """A profile in a file of its own, for another machine."""
    found = one_profile(args, args.profile)
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
        found = one_profile(args, name)
        ProfileStore(args.dir, found.fingerprint, found.model).remove(found.profile)
        print(f"removed {found.profile.profile_id} ({found.profile.key.task})")


def compare(left: CalibrationProfile, right: CalibrationProfile) -> dict[str, Any]:
    """How two profiles differ, over the (block, step) cells that both have recorded."""
    shape = tuple(min(a, b) for a, b in zip(left.mean_confidence.shape, right.mean_confidence.shape, strict=True))
    a, b = (profile.mean_confidence[: shape[0], : shape[1]].astype(np.float64) for profile in (left, right))
    both = ~np.isnan(a) & ~np.isnan(b)
    a, b = a[both], b[both]
    first, second = (profile.thresholds(Setting(statistic="q1")).values[:, 0] for profile in (left, right))
    return {
        "cells": int(both.sum()),
        "cosine": float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))),
        "mean_gap": float((b - a).mean()),
        "largest_gap": float(np.abs(b - a).max()),
        "thresholds": [[float(x), float(y)] for x, y in zip(first, second, strict=False)],
    }


def diff(args: argparse.Namespace) -> None:
    """How two profiles differ."""
    left, right = (one_profile(args, name).profile for name in (args.left, args.right))
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
    print_table("T by block (q1 of all masked)", rows)
