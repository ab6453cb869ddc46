"""What a run of ``vllm-osdt tune`` found, for programs and for people."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vllm_osdt.calibration.profile import CalibrationProfile, Choice, setting_in_words
from vllm_osdt.calibration.selection import num_needed, smallest_risk
from vllm_osdt.cli.common import print_table
from vllm_osdt.cli.tuning.plan import Plan, rounded_up
from vllm_osdt.cli.tuning.run import SKIPPED, Row


def report(plan: Plan, rows: Sequence[Row], chosen: Row, profile: CalibrationProfile, accuracy: float | None) -> dict:
    """Everything that was found, as plain values."""
    number = len(plan.prompts)
    assert profile.choice is not None
    return {
        "task": plan.task,
        "model": plan.model,
        "profile": profile.profile_id,
        "choice": asdict(profile.choice),
        "risk": plan.risk,
        "confidence": plan.confidence,
        "level_of_a_policy": plan.level,
        "num_prompts": number,
        "num_prompts_needed": num_needed(plan.risk, plan.level),
        "smallest_risk": smallest_risk(number, plan.level),
        "reference_accuracy": accuracy,
        "promise": promise(plan, chosen, profile.choice),
        "candidates": [asdict(row) for row in rows],
    }


def promise(plan: Plan, chosen: Row, choice: Choice) -> str:
    """What is promised, for which requests, with what confidence."""
    saved = f"{chosen.nfe:.1f} forward passes a request in place of {chosen.reference_nfe:.1f}"
    conditions = ", ".join(f"{name} {value}" for name, value in choice.decoding.items())
    reference = setting_in_words(choice.reference)
    text = (
        f"Requests of task {plan.task!r} that name neither a policy nor options of one are decoded with {choice}: "
        f"{saved}. "
    )
    if chosen.status == "reference":
        return text + "No other setting was accepted with fewer forward passes; nothing is lost against the reference."
    return text + (
        f"With confidence {choice.confidence:g}, at most a share {choice.risk:g} of requests has {choice.loss} "
        f"({reference}); {choice.num_lost} of {choice.num_prompts} prompts had. This holds for requests that are "
        f"drawn as these prompts were and are decoded greedily with {conditions}, until the task is calibrated again. "
        "It says nothing of other requests."
    )


def print_report(found: dict[str, Any], rows: list[Row]) -> None:
    """What people read."""
    table = []
    for row in rows:
        if row.reason == SKIPPED:
            continue
        tested = row.nfe is not None
        table.append(
            {
                "policy": row.policy,
                "setting": row.setting,
                "prompts": row.prompts,
                "lost": row.lost if tested else "",
                "won": row.won if tested else "",
                "at most lost": "" if row.upper_bound is None else f"{row.upper_bound:.2%}",
                "NFE": f"{row.nfe:.1f}" if tested else "",
                "tokens/forward": f"{row.tokens_per_forward:.2f}" if tested else "",
                "accepted": row.status + (f": {row.reason}" if row.reason else ""),
            }
        )
    print_table(f"task {found['task']}, risk {found['risk']:g}, confidence {found['confidence']:g}", table)
    print(
        f"{found['num_prompts']} prompts; risk {found['risk']:g} needs {found['num_prompts_needed']} where no request "
        f"loses, and the smallest risk that these can certify is {rounded_up(found['smallest_risk'])}"
    )
    if found["reference_accuracy"] is not None:
        print(f"the reference is right in {found['reference_accuracy']:.1%}")
    print(f"profile {found['profile']}")
    print(found["promise"])
