"""Every refusal of a request, as the documentation lists them; code that raises one names its row."""

from typing import NamedTuple

from vllm_osdt.sampling import UNSUPPORTED_SAMPLING_PARAMS


class Refusal(NamedTuple):
    """Why requests are refused.

    Attributes:
        parameter: What the client sent, in Markdown.
        when: The condition, in Markdown.
        remedy: What to do instead, in Markdown.
    """

    parameter: str
    when: str
    remedy: str


OPTION = "any option"
REFUSALS = {
    "unknown-option": Refusal(
        "`osdt_...`",
        "No option has this name; the message has the one that was probably meant.",
        "Send a name of the [options](options.md).",
    ),
    "operator-option": Refusal(
        "`osdt_...`", "The option is the operator's.", "Set it in `--osdt-config`, or leave it out."
    ),
    "option-value": Refusal(
        OPTION, "A wrong type, a value out of range, or an unknown word.", "Send a value that the message names."
    ),
    "two-names": Refusal(OPTION, "Sent by its name and by its former one.", "Send the present name alone."),
    "two-places": Refusal(
        OPTION, "Other values at the top of the body and in `vllm_xargs`.", "Send it in one of the two places."
    ),
    "excludes": Refusal(
        "`osdt_steps` and `osdt_steps_per_block`, `osdt_adaptive_entropy` and `osdt_threshold`; `osdt_calibrated` and "
        "what it replaces",
        "Both are sent.",
        "Send one of them.",
    ),
    "needs-option": Refusal(
        "options of `osdt_credit`, of `osdt_calibrated`, of `osdt_answer_block_length`, of an early exit's form or "
        "progress, of a base decoder, of a router, of a ranking",
        "The option that they belong to is not sent, or another one leaves them nothing to say.",
        "Send it too, or leave them out.",
    ),
    "modifier-policy": Refusal(
        "`osdt_credit`",
        "The policy compares the model's distributions of two steps.",
        "Leave it out, or send another policy.",
    ),
    "needs-task": Refusal(
        "options of a calibration", "The request names no task, so nothing is calibrated.", "Send `osdt_task` too."
    ),
    "calibrated-policy": Refusal(
        "`osdt_calibrated`",
        "The policy has no threshold of confidences that could be a profile's; the message says what it has instead "
        "([table](calibration.md#other-policies-with-a-tasks-thresholds)).",
        "Leave it out, or send a policy that the message names.",
    ),
    "calibrated-entropy": Refusal(
        "`osdt_calibrated`",
        "`confidence_adaptive` with `osdt_adaptive_entropy`, or `dimple` with `osdt_threshold_on_rank`: a profile's "
        "thresholds are confidences.",
        "Send `osdt_adaptive_entropy` = null or `osdt_threshold_on_rank` = false, or leave it out.",
    ),
    "policy-does-not-use": Refusal(
        OPTION, "The request's policy does not read it.", "Leave it out, or send a policy that the message names."
    ),
    "reserved": Refusal("`osdt_resolved`", "Always; the server sets it.", "Send options instead."),
    "cache-mode": Refusal(
        "`osdt_cache_mode`",
        "It is one of models with another kind of attention.",
        "Leave it out.",
    ),
    "adablock-off": Refusal(
        "`osdt_adablock_threshold`, `osdt_adablock_length`, `osdt_adablock_delimiters`",
        "`osdt_adablock` is false.",
        "Leave it out, or send `osdt_adablock`.",
    ),
    "adablock-line-end": Refusal(
        "`osdt_adablock`", "The tokenizer's line end is no single token.", "Send `osdt_adablock_delimiters`."
    ),
    "adablock-vocabulary": Refusal(
        "`osdt_adablock_delimiters`", "One is no token id of the model.", "Send ids below the vocabulary's size."
    ),
    "adablock-policy": Refusal(
        "`osdt_adablock`", "The policy says itself how long blocks are (`cad_llm`).", "Leave it out."
    ),
    "cut-block-causal": Refusal(
        "`osdt_adablock`, `osdt_policy`",
        "Blocks of many lengths on a block-causal model, whose blocks have one length.",
        "Leave it out.",
    ),
    "cut-refresh": Refusal("`osdt_refresh_interval`", "Above 1 with blocks of many lengths.", "Leave it out."),
    "cad-lengths": Refusal(
        "`osdt_cad_min_block`, `osdt_cad_first_block`",
        "Not in order: shortest, first and longest block (`osdt_block_length`).",
        "Send values in that order.",
    ),
    "cad-steps": Refusal("`osdt_cad_max_steps`", "Below `osdt_cad_steps`.", "Raise it."),
    "cad-thresholds": Refusal("`osdt_cad_min_threshold`", "Above `osdt_cad_threshold`.", "Lower it."),
    "multi-block-shares": Refusal("`osdt_full_share`", "Below `osdt_enter_share`.", "Raise it."),
    "gen-length-block-causal": Refusal(
        "`osdt_gen_length`", "The model is block-causal.", "Leave it out and send `max_tokens`."
    ),
    "suffix-window-block-causal": Refusal(
        "`osdt_suffix_window`, `osdt_ratio_window`",
        "The model is block-causal: no block sees a later one.",
        "Leave it out.",
    ),
    "gen-length-blocks": Refusal(
        "`osdt_gen_length`", "No multiple of `osdt_block_length`.", "Send the multiple that the message names."
    ),
    "gen-length-room": Refusal(
        "`osdt_gen_length`", "More than the prompt leaves of the context.", "Lower it, or shorten the prompt."
    ),
    "max-tokens-room": Refusal(
        "`max_tokens`, by the name that the endpoint has for it",
        "More than the prompt leaves of the context.",
        "Lower it, or shorten the prompt.",
    ),
    "prompt-room": Refusal(
        "`prompt`, `messages`, `input` or `token_ids`", "It leaves no room for output.", "Shorten the prompt."
    ),
    "block-length-rows": Refusal(
        "`osdt_block_length`",
        "Two blocks do not fit a forward pass of a block-causal model.",
        "Lower it; the operator can raise `--max-num-batched-tokens`.",
    ),
    "refresh": Refusal(
        "`osdt_refresh_interval`, `osdt_refresh_confidence`",
        "The cache mode has no refreshes that they could change: `none` and `block`.",
        "Leave it out.",
    ),
    "edit-model": Refusal("`osdt_edit_threshold`", "The model was not trained to replace tokens.", "Leave it out."),
    "edit-entropy": Refusal(
        "`osdt_edit_threshold`", "The policy looks at entropies.", "Leave it out, or send another policy."
    ),
    "branches": Refusal(
        "`osdt_edit_threshold`, `osdt_refresh_confidence`, `osdt_sub_block_cache`, `osdt_draft_ngram`, `osdt_credit`",
        "With `freedave`, which computes several states of a block in one step: each of them depends on what a step "
        "that is left out would have seen.",
        "Leave it out, or send another policy.",
    ),
    "branches-sampling": Refusal(
        "`osdt_draft`, `prediction`, structured output, `logprobs`, `presence_penalty`, `frequency_penalty`, "
        "`repetition_penalty`",
        "With `freedave`, which computes several states of a block in one step: each of them would have its own.",
        "Leave it out, or send another policy.",
    ),
    "sub-blocks-model": Refusal(
        "`osdt_sub_block_length`, `osdt_sub_block_cache`", "The model's blocks have no sub-blocks.", "Leave both out."
    ),
    "sub-blocks-divide": Refusal(
        "`osdt_sub_block_length`", "It does not divide `osdt_block_length`.", "Send a divisor."
    ),
    "whole-blocks": Refusal(
        "`osdt_policy`",
        "`dimple`, on a model with sub-blocks or with `osdt_adablock`: its schedule is one of whole blocks.",
        "Send another policy.",
    ),
    "verify-model": Refusal(
        "`osdt_policy`", "`s2d2`, and every position of the model's canvas sees all others.", "Send another policy."
    ),
    "verify-company": Refusal(
        "`osdt_edit_threshold`, `osdt_sub_block_cache`, `osdt_draft_ngram`, `osdt_draft`, `prediction`, "
        "`osdt_cache_mode`, structured output, penalties; `logprobs`, `osdt_return_trace`",
        "Beside `s2d2`, whose verified tokens it contradicts; `causal_fused` has no pass for a block's first token. "
        "The last two beside its `osdt_steps` or `osdt_steps_per_block`.",
        "Leave it out, or send another policy.",
    ),
    "verify-bounds": Refusal(
        "`osdt_verify_off`, `osdt_verify_max_span`",
        "Not less than `osdt_verify_on`; less than `osdt_verify_min_span`.",
        "Send the other side of it.",
    ),
    "sub-blocks-steps": Refusal(
        "`osdt_steps`, `osdt_steps_per_block`",
        "With another policy than `fixed_steps` on a model with sub-blocks; `prophet` and `sched` take them without "
        "`osdt_commit_threshold` and `osdt_calibrated`.",
        "Leave it out, or send policy `fixed_steps`.",
    ),
    "steps-share": Refusal(
        "`osdt_steps`, `osdt_steps_per_block`",
        "The steps cannot be shared out to the blocks.",
        "Send a multiple of the number that the message names.",
    ),
    "conformal-record": Refusal(
        "`osdt_record`", "`committed` with `osdt_statistic` `conformal`.", "Leave it out, or send another statistic."
    ),
    "conformal-requests": Refusal(
        "`osdt_num_calibration_requests`",
        "Too few for `osdt_risk` with `osdt_statistic` `conformal`.",
        "Raise either of them, or send another statistic.",
    ),
    "sched-bounds": Refusal("`osdt_sched_low`", "Above `osdt_sched_high`.", "Lower it."),
    "nemotron-product": Refusal(
        "`osdt_bound_min`, `osdt_bound_factor`",
        "With `osdt_bound_form` `product`, which has no such bound.",
        "Leave it out.",
    ),
    "no-filter": Refusal(
        "`osdt_policy`",
        "`learned_filter` on a server whose operator has named no `filter_file`.",
        "Send another policy.",
    ),
    "filter-block-length": Refusal(
        "`osdt_block_length`",
        "`learned_filter` with blocks of another length than those that the server's filter is for.",
        "Send the length that the message names, or another policy.",
    ),
    "bacd-bounds": Refusal("`osdt_min_threshold`", "Above `osdt_max_threshold`.", "Lower it."),
    "pin-policy": Refusal("`osdt_profile`", "The policy uses no profile.", "Leave it out."),
    "pin-contradicted": Refusal(
        "`osdt_profile`",
        "With `osdt_recalibrate`, or with `osdt_task` `auto`.",
        "Send the profile's own task and leave `osdt_recalibrate` out.",
    ),
    "pin-task": Refusal("`osdt_profile`", "No task is named.", "Send the profile's own `osdt_task`."),
    "pin-memory": Refusal(
        "`osdt_profile`",
        "The server keeps profiles in memory only.",
        "Leave it out; the operator can set `profile_dir`.",
    ),
    "pin-unknown": Refusal(
        "`osdt_profile`",
        "The task has no such profile.",
        "Send an id of a response or of `vllm-osdt profiles list`; `profiles import` brings one back.",
    ),
    "pin-made-with": Refusal(
        "`osdt_profile`",
        "It was made with another `osdt_block_length`, `osdt_cache_mode`, `osdt_threshold`, `osdt_adablock` or "
        "`osdt_credit`.",
        "Send the values that the message names.",
    ),
    "neither-parameter-nor-option": Refusal(
        "`vllm_osdt.sampling_params(...)`",
        "A name is neither a sampling parameter nor an option.",
        "Send a name of the [options](options.md), or of vLLM's `SamplingParams`.",
    ),
    "sampling-parameter": Refusal(
        "a sampling parameter", "It is in the [list](#sampling-parameters) and not neutral.", "Send what the list says."
    ),
    "logprobs-number": Refusal("`logprobs`, `top_logprobs`", "Below 0 or above 128.", "Send a number in that range."),
    "bad-words": Refusal(
        "`bad_words`",
        "A word is more than one token: positions of a canvas are decided in any order. Or there is no tokenizer.",
        "Ban single tokens, or use `stop`.",
    ),
    "token-ids-number": Refusal(
        "`logit_bias` with `bad_words`, `allowed_token_ids`", "More than 1024 tokens.", "Send fewer."
    ),
    "token-ids-range": Refusal(
        "`logit_bias`, `allowed_token_ids`", "A token id that the model does not have.", "Send another one."
    ),
    "allowed-none": Refusal("`allowed_token_ids`", "All of them are mask tokens or in `bad_words`.", "Allow another."),
    "allowed-stops": Refusal(
        "`allowed_token_ids`", "All are stop tokens, beside `min_tokens` or a template.", "Allow another."
    ),
    "min-tokens-stops": Refusal(
        "`min_tokens`", "Beside more than 128 stop tokens.", "Send fewer, or leave `min_tokens` out."
    ),
    "grammar-edits": Refusal(
        "`osdt_edit_threshold`",
        "Beside structured output: a written token must not change.",
        "Send `null`, or leave structured output out.",
    ),
    "grammar-ignore-eos": Refusal("`ignore_eos`", "Beside structured output, which has an end.", "Leave it out."),
    "grammar-backend": Refusal(
        "structured output",
        "vLLM chose another backend than `xgrammar` and `guidance`.",
        "The operator can set `structured_outputs_config.backend`.",
    ),
    "grammar-reasoning": Refusal(
        "structured output",
        "The server has a reasoning parser, and grammars hold behind the reasoning alone.",
        "The operator can set `structured_outputs_config.enable_in_reasoning`.",
    ),
    "vllm-diffusion": Refusal(
        "`diffusion_canvas_length`, `diffusion_max_steps`, `diffusion_read_only`, `diffusion_constrained`",
        "Always: they are of vLLM's own diffusion models.",
        "Leave it out.",
    ),
    "infill-names": Refusal(
        "`osdt_infill`, `osdt_suffix`, `diffusion_seed_canvas`, `diffusion_pinned`",
        "More than one way to infill is sent, or pinned positions without a canvas.",
        "Send one of them.",
    ),
    "infill-value": Refusal(
        "`osdt_infill`, `osdt_suffix`, `diffusion_seed_canvas`, `diffusion_pinned`",
        "A part is no text, no token ids and no length of a hole, a position is outside, or there is no hole.",
        "Send what the message names.",
    ),
    "infill-seed": Refusal(
        "`diffusion_seed_canvas`",
        "A token that is not pinned and not the mask token: a masked model begins a hole with nothing else.",
        "Send the mask token there, or pin the position.",
    ),
    "infill-length": Refusal(
        "`max_tokens`, `osdt_suffix`",
        "`max_tokens` is less than the template has, or a suffix comes without it.",
        "Send as many, or leave it out of a template.",
    ),
    "infill-room": Refusal(
        "`osdt_infill`, `osdt_suffix`, `diffusion_seed_canvas`",
        "More than the prompt leaves of the context.",
        "Shorten one of them.",
    ),
    "infill-blocks": Refusal(
        "`osdt_infill`, `osdt_suffix`, `diffusion_pinned`",
        "Text behind a hole is in a later block of a block-causal model, which does not see it.",
        "Shorten the hole, or use a model whose positions see the whole canvas.",
    ),
    "infill-company": Refusal(
        "`osdt_gen_length`, `osdt_edit_threshold`, `logprobs`, structured output; `stop`, `stop_token_ids`; "
        "`min_tokens`",
        "Beside a template or a suffix; beside a template; beside open holes.",
        "Leave one of them out.",
    ),
    "region-text": Refusal(
        "`osdt_prophet_region`",
        "No given text has a hole behind it.",
        "Send `osdt_infill` with text before a hole, or leave it out.",
    ),
    "draft-value": Refusal(
        "`osdt_draft`, `prediction`", "It is neither text nor token ids of the model.", "Send what the message names."
    ),
    "draft-names": Refusal("`osdt_draft`, `prediction`", "Both are sent.", "Send one of them."),
    "draft-grammar": Refusal(
        "`osdt_draft`, `prediction`, `osdt_draft_ngram`",
        "Beside structured output: a grammar decides from left to right, a draft in any order.",
        "Leave one of them out.",
    ),
    "draft-without": Refusal(
        "`osdt_draft_threshold`",
        "The request has no draft.",
        "Send `osdt_draft` or `osdt_draft_ngram`, or leave it out.",
    ),
    "switch": Refusal(
        "`osdt_answer_block_length`",
        "It divides `osdt_block_length` not; with a task whose calibrated thresholds the policy takes, or with "
        "`osdt_steps`; the model or the policy has no blocks of that length.",
        "Send another length, or leave out what the message names.",
    ),
    "switch-token": Refusal(
        "`osdt_think_end_token`, `osdt_check_prompt`",
        "No token of the model, or not a single one; or it ends the output.",
        "Send what the message names.",
    ),
    "switch-room": Refusal(
        "`osdt_check_prompt`",
        "As many tokens as the output may have, or more.",
        "Shorten it, or raise `max_tokens`.",
    ),
    "switch-company": Refusal(
        "templates, drafts, structured output; `logprobs`",
        "Beside `osdt_answer_block_length`; beside `osdt_check_prompt`.",
        "Leave one of them out.",
    ),
    "prompt-scores": Refusal(
        "`echo` with `logprobs`, `prompt_logprobs`",
        "Always: these models have no next-token probabilities of a prompt. Multiple-choice tasks of lm-eval "
        "(`loglikelihood`) send this.",
        "Let the model answer: `generate_until` tasks of lm-eval.",
    ),
    "kind-of-request": Refusal(
        "`use_beam_search`, `LLM.beam_search`, `/generative_scoring`, [structured decisions](#structured-decisions)",
        "Always: they need probabilities of the next token alone, but a canvas is decided many positions at a time.",
        "Send an ordinary completion.",
    ),
    "no-token-prompt": Refusal(
        "`prompt_embeds`, pooling requests", "The prompt is no text and no token ids.", "Send a text or token ids."
    ),
    "streaming-input": Refusal("a streaming input session", "Always.", "Send the whole prompt with one request."),
}


def sampling_rows() -> list[tuple[str, str, str]]:
    """Sampling parameters that are refused: name, the values that are not, and what to send."""
    rows = []
    for name, neutral in UNSUPPORTED_SAMPLING_PARAMS.items():
        allowed = " or ".join(f"`{value!r}`" for value in neutral)
        remedy = "leave it out" if neutral[0] is None else f"send `{neutral[0]!r}` or leave it out"
        rows.append((f"`{name}`", f"anything but {allowed}", remedy))
    return rows
