"""Logits that a request's sampling parameters change before a token is proposed.

A grammar leaves out what its text cannot have next. Biases, banned and allowed tokens, ``min_tokens`` and penalties
change what the model says; ``min_p``, ``top_k`` and ``top_p`` then leave tokens out. The states of the requests and the
functions are vLLM's own. A proposal comes from what is left; its confidence is the model's own probability of it, or,
where the request asks for that, its share of what is left, both without temperature. The only token that a grammar
allows is certain.
"""

from copy import copy
from typing import Any

import torch
from vllm.model_executor.layers.utils import apply_penalties
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.penalties import use_penalty

from csrc_triton import implementations
from vllm_osdt.worker.grammar import GrammarRows
from vllm_osdt.worker.modifying import CHUNK_ELEMENTS, StepLogits
from vllm_osdt.worker.slots import CanvasStates
from vllm_osdt.worker.step.batch import LogitRows

NUM_TEMPORARIES = 10  # copies of them, and counts by token of prompt and output, in 4 bytes each


class LogitShaping:
    """Changes logits of the requests that ask for it.

    Args:
        sampler: vLLM's own, for its states of requests.
        states: Tables of the canvases.
    """

    def __init__(self, sampler: Any, states: CanvasStates) -> None:
        self._states = states
        self._confidence = implementations(states.device).confidence
        self._filters = sampler.sampling_states
        self._biases = next(one for one in sampler.logits_processors if isinstance(one, LogitBiasState))
        self._has_news = False

    def add_request(self, slot: int, params: SamplingParams) -> None:
        """Take in the parameters of a request that starts or resumes."""
        filters = self._filters.add_request(slot, params) and (
            params.min_p > 0 or params.top_p < 1 or 0 < params.top_k < self._filters.vocab_size
        )
        penalizes = use_penalty(params)
        biases = self._biases.add_request(slot, _with_banned_words(params))
        host = self._states.host
        is_shaped = filters or penalizes or biases or host.has_grammar[slot]
        host.penalties[slot] = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
        host.penalizes[slot], host.is_shaped[slot] = penalizes, is_shaped
        self._has_news |= is_shaped

    def apply_staged_writes(self) -> None:
        """Bring what :meth:`add_request` took in to the device."""
        if self._has_news:
            self._filters.apply_staged_writes()
            self._biases.apply_staged_writes()
            self._has_news = False

    def measure(self) -> None:
        """Take the memory that changing logits takes, where a GPU's is measured."""
        if self._states.device.type != "cpu":
            torch.empty(NUM_TEMPORARIES * CHUNK_ELEMENTS, device=self._states.device)

    def propose(
        self,
        logits: StepLogits,
        shaped: LogitRows,
        temperature: torch.Tensor | None,
        noise_key: torch.Tensor | None,
        token: torch.Tensor,
        confidence: torch.Tensor,
        by_entropy: torch.Tensor | None,
        grammar: GrammarRows | None = None,
    ) -> None:
        """Put the proposals of the rows of :class:`LogitRows` in place of the model's own.

        Args:
            logits: M rows.
            shaped: The rows.
            temperature, noise_key, by_entropy: ``[M]``, see ``csrc_triton.confidence``.
            token, confidence: int64 and fp32 ``[M]``, written in place.
            grammar: What the step's grammars allow.
        """
        size = shaped.rows.shape[0]
        step = max(1, CHUNK_ELEMENTS // logits.written.shape[1])
        for start in range(0, size, step):
            part = shaped.part(start, start + step)
            own = logits.rows(part.rows)
            of_part = [None if one is None else one[part.rows] for one in (temperature, noise_key, by_entropy)]
            left = self.shape(own.clone(), part, of_part[0], grammar)
            found, share = self._confidence(left, self._states.mask_token_id, *of_part)
            probability = torch.exp(own.gather(1, found[:, None]).squeeze(1) - own.logsumexp(dim=1)).nan_to_num(nan=0.0)
            if part.asks_share is not None:
                probability = torch.where(part.asks_share, share, probability)
            if of_part[2] is not None:
                probability = torch.where(of_part[2], confidence[part.rows], probability)
            token[part.rows], confidence[part.rows] = found, probability
        if grammar is not None:
            grammar.settle(token, confidence)

    def shape(
        self,
        logits: torch.Tensor,
        rows: LogitRows,
        temperature: torch.Tensor | None,
        grammar: GrammarRows | None = None,
    ) -> torch.Tensor:
        """Logits as the requests' parameters change them; what is left out becomes -inf. No temperature is applied.

        Args:
            logits: fp32 ``[S, vocabulary]``, changed in place.
            rows: Whose they are; S so small that a few copies of the logits fit.
            temperature: fp32 ``[S]``, by which probabilities for ``min_p`` and ``top_p`` are made; None: 0.
            grammar: What the step's grammars allow.
        """
        if grammar is not None:
            logits = grammar.ban(logits, rows.rows_np)
        slots_np, filters = rows.slots_np, self._filters
        # vLLM numbers a row by the position that it is read at, which is that of the token before.
        context = LogitsContext(rows.slots, rows.slots, slots_np, rows.slots, rows.slots, rows.place - 1, slots_np)
        logits = self._biases.apply(logits, context)
        if rows.penalties is not None:
            logits = self._penalize(logits, rows, rows.penalties)
        removes = (
            (filters.top_k.np[slots_np] != filters.vocab_size)
            | (filters.top_p.np[slots_np] != 1.0)
            | (filters.min_p.np[slots_np] != 0.0)
        )
        if temperature is not None and removes.any():
            scaled = logits / torch.where(temperature > 0, temperature, 1.0)[:, None]
            filters.apply_min_p(scaled, rows.slots, slots_np)
            scaled = self._filter(scaled, filters.top_k.gpu[rows.slots], filters.top_p.gpu[rows.slots])
            logits = logits.masked_fill_(scaled == -torch.inf, -torch.inf)
        return logits

    def _filter(self, logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
        """Leave ``top_k`` and ``top_p`` of every row.

        vLLM's own kernel sums a row's probabilities in another order for another number of rows, or where other rows
        ask for something else. On a GPU it is therefore vLLM's PyTorch function, always with as many rows.
        """
        num_rows, vocabulary = logits.shape
        if logits.device.type == "cpu":
            return apply_top_k_top_p_pytorch(logits, top_k, top_p)
        size = max(num_rows, CHUNK_ELEMENTS // vocabulary, 1)
        padded = logits.new_zeros(size, vocabulary)
        padded[:num_rows] = logits
        everything = top_k.new_full((size,), vocabulary), top_p.new_ones(size)
        for whole, part in zip(everything, (top_k, top_p), strict=True):
            whole[:num_rows] = part
        return apply_top_k_top_p_pytorch(padded, *everything)[:num_rows]

    def _penalize(self, logits: torch.Tensor, rows: LogitRows, penalties: torch.Tensor) -> torch.Tensor:
        """Apply penalties for the tokens of prompt and canvas that are decided when the step starts."""
        states, vocabulary = self._states, logits.shape[1]
        length = int(states.host.canvas_end[rows.slots_np].max())
        prompt_end, end = penalties[:, 3, None], penalties[:, 4, None]
        presence, frequency, repetition = penalties[:, :3].float().unbind(dim=1)
        place = torch.arange(length, device=logits.device)
        tokens = states.token_ids[:, :length].index_select(0, rows.slots).long()  # [S, length]
        in_prompt = place < prompt_end
        is_decided = (place < end) & (tokens != states.mask_token_id)
        prompt = tokens.masked_fill(~in_prompt, vocabulary)
        output = tokens.masked_fill(in_prompt | ~is_decided, vocabulary)
        return apply_penalties(logits, prompt, output, presence, frequency, repetition)


def _with_banned_words(params: SamplingParams) -> SamplingParams:
    """The parameters with single banned tokens as biases of -inf; admission has refused longer words."""
    if not params.bad_words_token_ids:
        return params
    params = copy(params)
    banned = {word[-1]: -float("inf") for word in params.bad_words_token_ids}
    params.logit_bias = {**(params.logit_bias or {}), **banned}
    return params
