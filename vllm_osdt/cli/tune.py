"""``vllm-osdt tune``: choose how a task is decoded, with a bound on the share of requests that lose by it."""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_osdt.calibration.fingerprint import hash_weights
from vllm_osdt.calibration.profile import OptionValue
from vllm_osdt.cli.common import CommandError, read_lines
from vllm_osdt.cli.tuning.candidates import CANDIDATES, USUAL
from vllm_osdt.cli.tuning.decoders import Decoder, EngineDecoder, ServerDecoder
from vllm_osdt.cli.tuning.judge import Judge, load_checker
from vllm_osdt.cli.tuning.plan import Plan, name_run
from vllm_osdt.cli.tuning.report import print_report, report
from vllm_osdt.cli.tuning.run import Row, Tuning
from vllm_osdt.cli.tuning.state import State
from vllm_osdt.options import AUTO_TASK, DECLARED, choosing
from vllm_osdt.options.parsing import check_operator_values

CANVAS_OPTIONS = ("block_length", "cache_mode", "gen_length")


def share(text: str) -> float:
    """A number in (0, 1), for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number in (0, 1), such as 0.05")
    return value


def positive(text: str) -> int:
    """A count of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 1")
    return int(text)


def regex(text: str) -> re.Pattern[str]:
    """A regular expression, for argparse."""
    try:
        return re.compile(text, re.MULTILINE)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def policy_names(text: str) -> tuple[str, ...]:
    """Names of lists of candidates, for argparse."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in CANDIDATES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(CANDIDATES)}")
    return names


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What ``tune`` takes beside the model and the folder."""
    add = command.add_argument
    add("--task", required=True, help="name that requests will give as osdt_task")
    add("--prompts", type=Path, required=True, help="a prompt a line, or .jsonl with the field prompt")
    right = command.add_mutually_exclusive_group()
    right.add_argument("--answers", type=Path, help="the right answers: one a line, or .jsonl with the field answer")
    right.add_argument("--checker", metavar="MODULE:FUNCTION", help="function of prompt and text: is it right?")
    add("--answer-pattern", type=regex, metavar="REGEX", help="what of a text is its answer: the last match")
    add("--risk", type=share, default=0.01, help="share of requests that may lose (default: %(default)s)")
    add("--confidence", type=share, default=0.95, help="that no more lose (default: %(default)s)")
    usual = ",".join(USUAL)
    others = ", ".join(name for name in CANDIDATES if name not in USUAL)
    add(
        "--policies",
        type=policy_names,
        default=tuple(USUAL),
        metavar="NAME,...",
        help=f"whose settings to try (default: {usual}); others: {others}. More of them make each test stricter",
    )
    add("--limit", type=positive, help="take only so many prompts")
    add("--max-tokens", type=positive, default=256, help="of every request (default: %(default)s)")
    for name in CANVAS_OPTIONS:
        kind: Any = str if name == "cache_mode" else positive
        add(f"--{name.replace('_', '-')}", type=kind, help=f"send osdt_{name} with every request, as users will")
    add(
        "--server", metavar="URL", help="ask this server, which shares the folder of the profiles; else start an engine"
    )
    add("--picture", type=Path, help="draw forward passes and losses of the candidates")
    add("--state", type=Path, help="file that keeps what was decoded (default: beside the profiles)")


def tune(args: argparse.Namespace) -> None:
    """Decode prompts with several policies; have requests of the task use the one with the fewest forward passes.

    Which of them may be used is tested: with the confidence asked for, no more than a share `risk` of requests loses.
    """
    plan = make_plan(args)
    plan.check()
    weights = hash_weights(Path(args.model)) if not args.server and Path(args.model).is_dir() else None
    run = name_run(args.server or args.model, weights, plan)
    state = State(args.state or args.dir.parent / "tuning" / f"{run}.jsonl", run)
    say = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 160).print
    say(f"{len(plan.prompts)} prompts; what was decoded is kept in {state.path}")
    tuning, rows = decode(plan, make_decoder(args, state.path.with_suffix(".profiles")), state)
    row, profile = tuning.write(rows, args.dir)
    if args.server:
        tuning.clean_up()
        if not tuning.is_followed(profile):
            say(
                "The server does not follow the choice: its --osdt-config names a policy or an option of one, or its "
                f"profiles are in another folder than {args.dir}."
            )
    found = report(plan, rows, row, profile, tuning.accuracy())
    if args.picture:
        from vllm_osdt.calibration.plot import draw_candidates

        draw_candidates(found, args.picture)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print_report(found, rows)
    if args.picture:
        print(args.picture)


def make_plan(args: argparse.Namespace) -> Plan:
    """What is asked for, checked as far as it can be without decoding.

    Raises:
        CommandError: Files, checker or options that do not fit.
        InvalidOptionError: A bad value of an option.
    """
    task = DECLARED["task"].check("--task", args.task)
    if task == AUTO_TASK:
        raise CommandError(f"--task is {task!r}, which stands for tasks that have no name; give the task one")
    own = choosing(args.osdt_config)
    if own:
        raise CommandError(
            f"--osdt-config sets {', '.join(own)}: requests of such a server do not leave it to their task's profile "
            "how they are decoded; leave it out, here and there"
        )
    options: dict[str, OptionValue] = {}
    for name in CANVAS_OPTIONS:
        if getattr(args, name) is not None:
            options[name] = DECLARED[name].check(f"--{name.replace('_', '-')}", getattr(args, name))
    prompts = read_lines(args.prompts, "prompt")
    answers = None
    if args.answers is not None:
        answers = read_lines(args.answers, "answer")
        if len(answers) != len(prompts):
            raise CommandError(
                f"{args.answers} holds {len(answers)} answers, but {args.prompts} holds {len(prompts)} prompts; give "
                "one for each"
            )
    checker = None
    if args.checker is not None:
        if args.answer_pattern is not None:
            raise CommandError("--checker sees the whole text; leave --answer-pattern out")
        checker = load_checker(args.checker)
    prompts = prompts[: args.limit]
    return Plan(
        task,
        args.model,
        prompts,
        Judge(prompts, answers[: args.limit] if answers else None, checker, args.answer_pattern),
        args.policies,
        check_operator_values(args.osdt_config).num_calibration_requests,
        args.max_tokens,
        options,
        args.risk,
        args.confidence,
    )


def make_decoder(args: argparse.Namespace, folder: Path) -> Decoder:
    """The server that is asked for, or an engine whose own profiles are in ``folder``."""
    if args.server:
        return ServerDecoder(args.server, args.model, args.dir)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is the report's
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    # The guard would have the task calibrate again on the way, and audits would cost time.
    operator = {**args.osdt_config, "profile_dir": str(folder), "drift": "off", "audit": 0.0}
    llm = LLM(
        model=args.model, dtype=args.dtype, max_model_len=args.max_model_len, additional_config={"osdt": operator}
    )
    return EngineDecoder(llm, folder)


def decode(plan: Plan, decoder: Decoder, state: State) -> tuple[Tuning, list[Row]]:
    """Run, with a bar that tells how far it is."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        bars: dict[str, Any] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in bars:
                for other in bars.values():
                    bar.remove_task(other)
                bars.clear()
                bars[name] = bar.add_task(name)
            bar.update(bars[name], completed=done, total=total)

        tuning = Tuning(plan, decoder, state, progress)
        return tuning, tuning.run()
