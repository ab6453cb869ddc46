"""What a user may set: every decoding option of a request and every option of the operator, declared once.

A user writes the same names in three places: ``SamplingParams.extra_args`` and HTTP ``vllm_xargs`` with the prefix
``osdt_`` (one request), ``additional_config={"osdt": {...}}`` and ``--osdt-config '{...}'`` without it (the operator's
defaults). Options that every policy reads are declared here, the others by their policy (``vllm_osdt.policies``).

At admission everything is resolved into one :class:`DecodingOptions`: ``parsing`` lays values over defaults, ``family``
refuses what the model has not, ``canvas`` fixes the canvas. ``operator`` reads an engine's configuration, ``reference``
describes the options to people.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator

from vllm_osdt.calibration.profile import cache_key
from vllm_osdt.declaration import Declaration, Flag, count, declarations, defaults, number, option
from vllm_osdt.geometry import BLOCK_CACHE, CACHE_MODES, CANVAS_CACHES, BlockLength
from vllm_osdt.policies import MODIFIERS, POLICIES
from vllm_osdt.policies.adablock import ADABLOCK, AdaBlockOptions
from vllm_osdt.policies.tccf import TCCFOptions

PREFIX = "osdt_"
REQUEST_FIELDS = ("infill", "suffix", "draft")  # of a request alone, with the prefix (vllm_osdt.frontend)
AUTO_TASK = "auto"
UNDECIDED_TASK = "auto:undecided"  # too little was seen to name the task


def _is_task(value: str) -> str:
    if not value or len(value) > 200 or not value.isprintable() or "@" in value:
        raise ValueError("no name of a task")
    return value


def _is_path(value: str) -> str:
    if not value.isprintable():
        raise ValueError("no path")
    return value


@dataclass(frozen=True)
class CommonOptions(AdaBlockOptions, TCCFOptions):
    """Options of every policy."""

    task: str | None = option(
        None,
        Annotated[str, AfterValidator(_is_task)] | None,
        "Task whose calibration profile the request makes or uses. `null`: none, the static threshold, since a profile "
        'of other traffic could cost accuracy. `"auto"`: found by the prompt\'s beginning.',
        expected=(
            "1 to 200 printable characters, none of them @, behind which stands an adapter's name, or null for no task"
        ),
    )
    policy: str = option(
        "osdt",
        Literal[tuple(POLICIES)],
        "Which masked positions a denoising step unmasks.",
    )
    block_length: int = option(
        32,
        BlockLength,
        "Positions denoised together.",
        unit="tokens",
        default_text="the checkpoint's, else 32 (SDAR: what its name says, as in `-b32`, else 4)",
    )
    gen_length: int | None = option(
        None,
        count() | None,
        "Length of the canvas, a multiple of `block_length`. A request's own is exact and bounds its output; the "
        "operator's is what others begin with, before they grow. Not for block-causal models, where no block sees a "
        "later one.",
        unit="tokens",
        default_text="what the model is used to, and more when the answer needs it",
    )
    cache_mode: str = option(
        "dual",
        Literal[CACHE_MODES],
        "What is recomputed between refreshes: `none` (everything, always), `prefix` or `dual` (arXiv 2505.22618, "
        "section 3). Block-causal models have `block` (finished blocks stay) and nothing else. "
        "Nemotron-Labs-Diffusion has `causal` (the causal forward that writes a finished block's keys and values gives "
        "the next block's first token) and `causal_fused` (it is the next block's first denoising step, too, and gives "
        "no token of its own).",
        default_text="`dual`; `block` for block-causal models; `causal` for Nemotron-Labs-Diffusion",
        formerly="cache",
    )
    refresh_interval: int = option(
        1,
        count(1, 1024),
        "Of `prefix` and `dual`: prompt and canvas are refreshed when every so many blocks are entered.",
        unit="blocks",
    )
    refresh_confidence: float = option(
        0.0,
        number(ge=0, lt=1),
        "Of `prefix` and `dual`: a step whose mean confidence is below this is followed by a refresh; 0 for never.",
    )
    suffix_window: int | None = option(
        None,
        count(0, 1024) | None,
        "Of `none`, `prefix` and `dual`: of the masks behind the active block, only those of so many blocks take part "
        "in a step (Streaming-dLLM, arXiv 2601.17917, without the last position). `null` for all.",
        unit="blocks",
    )
    edit_threshold: float | None = option(
        None,
        number(ge=0, lt=1) | None,
        "LLaDA2 only: confidence above which a written token is replaced by another; `null` for no editing. LLaDA2.1's "
        "Quality mode is `threshold` 0.7 and 0.5 here, its Speed mode 0.5 and 0.0 or `null`.",
    )
    sub_block_length: int | None = option(
        None,
        BlockLength | None,
        "Fast-dLLM v2 only: positions of a block that are denoised together, from left to right; a divisor of "
        "`block_length`.",
        unit="tokens",
        default_text="the checkpoint's, 8",
    )
    sub_block_cache: bool = option(
        False,
        Flag,
        'Fast-dLLM v2 only: compute the active sub-block alone where the authors\' "dual cache" does, against the keys '
        "and values that the rest of the block had when it was last computed whole.",
    )
    filtered_confidence: bool = option(
        False,
        Flag,
        "A proposal's confidence is its share of the tokens that `top_p`, `top_k`, `min_p`, biases and penalties "
        "leave, instead of the model's own probability. More tokens per forward, and less certain ones.",
    )
    draft_threshold: float = option(
        0.3,
        number(ge=0, le=1),
        "Of a request with a [draft](parameters.md#drafts): confidence that the model has at least in a drafted token "
        "that it proposes itself, for the token to be taken.",
    )
    draft_ngram: int | None = option(
        None,
        count(1, 32) | None,
        "Draft each block from the prompt and the output so far: the tokens behind an earlier occurrence of their last "
        "so many tokens. `null` for no such drafts.",
        unit="tokens",
    )
    return_trace: bool = option(
        False,
        Flag,
        "The response says of every token in which denoising step and forward it was unmasked, and how confident the "
        "model was.",
    )

    @property
    def num_blocks(self) -> int:
        """Blocks of the canvas, the last of which may be cut by the end of the context; ``gen_length`` must be set."""
        assert self.gen_length is not None
        return -(-self.gen_length // self.block_length)

    @property
    def is_block_causal(self) -> bool:
        """Whether they are for a block-causal model, which has a cache mode of its own."""
        return self.cache_mode not in CANVAS_CACHES

    @property
    def is_on_grid(self) -> bool:
        """Whether blocks lie on a grid from position 0; else they begin behind the prompt."""
        return self.cache_mode == BLOCK_CACHE

    @property
    def cache_key(self) -> str:
        """The cache mode, and the modifiers, as profiles tell them apart."""
        return cache_key(
            self.cache_mode,
            sub_block_length=self.sub_block_length,
            sub_block_cache=self.sub_block_cache,
            edit_threshold=self.edit_threshold,
            refresh_interval=self.refresh_interval,
            refresh_confidence=self.refresh_confidence,
            suffix_window=self.suffix_window,
            cuts=ADABLOCK.key(self) if self.adablock else None,
            modifiers=[one.key(self) for one in MODIFIERS if one.is_on(self)],
        )

    @property
    def calibrates(self) -> bool:
        """Whether its policy takes thresholds from the task's profile."""
        return POLICIES[self.policy].calibrates(self)

    @property
    def looks_at_entropy(self) -> bool:
        """Whether its policy compares entropies instead of confidences."""
        return POLICIES[self.policy].looks_at_entropy(self)

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain values, to travel between processes."""
        return asdict(self)


def _compose() -> type:
    """One class of the common options and those of every policy and modifier; options of the same name are one."""
    own = dict.fromkeys([*(one.Options for one in MODIFIERS), *(one.Options for one in POLICIES.values())])
    bases = [cls for cls in own if not any(other is not cls and issubclass(other, cls) for other in own)]
    composed = make_dataclass("DecodingOptions", [], bases=(CommonOptions, *bases), frozen=True)
    composed.__module__ = __name__  # where pickle looks for it
    composed.__doc__ = "How one request is decoded: the common options and those of every policy, as attributes."
    return composed


if TYPE_CHECKING:

    class DecodingOptions(CommonOptions):
        """How one request is decoded: the common options and those of every policy, as attributes."""

        def __init__(self, **values: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...
else:
    DecodingOptions = _compose()


def _as_load_bounds(value: dict[str, int]) -> tuple[int, int]:
    if value.keys() != {"low", "high"} or not 1 <= value["low"] < value["high"]:
        raise ValueError("no bounds")
    return value["low"], value["high"]


@dataclass(frozen=True)
class ServerOptions:
    """What the operator alone decides: ``additional_config={"osdt": {...}}`` and ``--osdt-config``, no request."""

    profile_dir: str | None = option(
        None,
        Annotated[str, AfterValidator(_is_path)] | None,
        'Folder in which calibration profiles outlive the process, shared by engines; `""` keeps them in memory only.',
        expected='the path of a folder, or "" for none',
        default_text="the user's data folder",
    )
    max_profiles: int = option(
        256,
        count(),
        "Profiles that an engine keeps in memory; the one unused for longest makes room.",
        unit="profiles",
    )
    drift: str = option(
        "recalibrate",
        Literal["recalibrate", "warn", "off"],
        "What the guard does about a task that no longer looks like its profile.",
    )
    drift_window: int = option(
        32, count(8), "Requests whose mean confidence is compared with the profile.", unit="requests"
    )
    drift_gap: float = option(
        0.03,
        number(gt=0, le=1),
        "Mean difference of confidence at block entry above which a task has drifted, where it is also beyond chance "
        "(4 standard errors).",
    )
    drift_cosine: float = option(
        0.95, number(ge=0, lt=1), "Cosine similarity with the profile below which a task has drifted."
    )
    audit: float = option(
        0.0,
        number(ge=0, le=1),
        "Share of the greedy requests with a profile that are decoded once more with the static threshold, in "
        "places that no request needs; nobody gets the result, the guard compares the tokens.",
    )
    audit_agreement: float = option(
        0.9,
        number(gt=0, lt=1),
        "Share of audited requests that must have the tokens of the static threshold. Where significantly fewer have, "
        "the guard does what `drift` says.",
    )
    max_auto_tasks: int = option(
        256, count(), 'Prefixes that `"task": "auto"` tells apart in one front-end process.', unit="tasks"
    )
    filter_file: str | None = option(
        None,
        Annotated[str, AfterValidator(_is_path)] | None,
        "Weights of the policy `learned_filter`, for blocks of the served length; `vllm-osdt train-filter` writes it. "
        "Every process of the engine reads it when it starts. `null`: requests are refused that policy.",
        expected="the path of a file, or null for none",
    )
    fused_commit: bool = option(
        True,
        Flag,
        "SDAR and LLaDA2: the forward that writes a finished block's keys and values is also the first denoising step "
        "of the next block. The tokens are the same either way.",
    )
    run_ahead: bool = option(
        True,
        Flag,
        "On a GPU: where a step's blocks are not expected to be finished by it, the next one is launched behind it, "
        "before its outcome is known. On a CPU: where it has finished none, up to four more are taken before the "
        "engine hears of it, none later than a tenth of a second after it began. The tokens are the same either way.",
    )
    fused_lm_head: bool = option(
        False,
        Flag,
        "On a GPU: one kernel finds tokens and confidences from hidden states and the output weight, and no logits are "
        "written but for requests that change or ask for them. Saves traffic of memory, and with tensor parallelism "
        "their gathering; its speed is not measured yet. For unquantized output weights without a bias, and no "
        "adapters; refused elsewhere.",
    )
    fused_lm_head_max_rows: int | None = option(
        None,
        count() | None,
        "Of `fused_lm_head`: steps that read more rows of logits than that write them. `benchmarks/bench_kernels.py "
        "--op lm_head_confidence` measures up to how many rows the kernel is as fast. In 16 bits a token may then "
        "depend on how many requests share its step, as two sums of a logit may differ in their last bit. `null`: all "
        "steps have the kernel.",
        expected="a number of rows, or null for all steps",
        unit="rows",
    )
    kept_logits_gib: float = option(
        2.0,
        number(ge=0),
        "For `klass`, `ccd` and sampled `s2d2`: memory at most for logits of earlier steps, on each device. A "
        "request's are kept if two steps of `max_num_seqs` blocks as long as its own fit; of others hidden states are, "
        "and each step computes their logits again. A step of a block of 32 takes 8 MB with 126,464 tokens in "
        "bfloat16, and 16 MB in float32. Taken from the first such request on, besides what vLLM reserves: leave room "
        "on a GPU (`--gpu-memory-utilization`). 0: hidden states of all.",
        unit="GiB",
    )
    load_aware: tuple[int, int] | None = option(
        None,
        Annotated[dict[str, int], AfterValidator(_as_load_bounds)] | None,
        "How drafts of `freedave` over `steps` follow the load: all of them while a step has at most `low` rows of its "
        "own, none from `high` rows on, fewer and fewer between. The tokens are the same either way. `null`: as many "
        "as a step has room for.",
        unit="rows",
        expected='{"low": ROWS, "high": ROWS} with 1 <= low < high, such as {"low": 32, "high": 256}, or null',
    )


OF_MODIFIERS = {name: one for modifier in MODIFIERS for name, one in declarations(modifier.Options).items()}
# Of every request, whatever its policy; first what is declared here, which users ask for most.
_COMMON = declarations(CommonOptions)
SHARED = {name: _COMMON[name] for name in (*CommonOptions.__annotations__, *_COMMON)} | OF_MODIFIERS
DECLARED: dict[str, Declaration] = SHARED | {
    name: one for policy in POLICIES.values() for name, one in declarations(policy.Options).items()
}
SERVER_DECLARED = declarations(ServerOptions)
OPTION_NAMES = tuple(DECLARED)
SERVER_OPTION_NAMES = tuple(SERVER_DECLARED)
DEFAULTS = defaults(DecodingOptions)
FORMER_NAMES = {one.formerly: name for name, one in DECLARED.items() if one.formerly}
# Options that say how positions are chosen; whoever names one of them does not leave it to the task's profile.
CHOOSING = {"policy", *OPTION_NAMES} - (set(SHARED) - {"policy"})
CHOOSING -= {"num_calibration_requests", "early", "recalibrate", "profile"}


def choosing(names: Iterable[str], prefix: str = "") -> list[str]:
    """Those of a request's or an operator's names (each with ``prefix``) that say how positions are chosen."""
    own = {name: name.removeprefix(prefix) for name in names}
    return [name for name, option in own.items() if FORMER_NAMES.get(option, option) in CHOOSING]


def policies_of(name: str) -> tuple[str, ...]:
    """The policies that an option means something to, or with which a request may send it all the same."""
    if name in SHARED or DECLARED[name].with_any_policy:
        return tuple(POLICIES)
    return readers_of(name)


def readers_of(name: str) -> tuple[str, ...]:
    """The policies whose own options have this name."""
    return tuple(policy.name for policy in POLICIES.values() if name in declarations(policy.Options))
