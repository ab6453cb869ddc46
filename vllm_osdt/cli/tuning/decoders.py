"""What decodes the prompts of ``vllm-osdt tune``: an engine in this process, or a server."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from vllm_osdt.calibration.profile import OptionValue
from vllm_osdt.cli.common import CommandError
from vllm_osdt.errors import OSDTError
from vllm_osdt.options import PREFIX

if TYPE_CHECKING:
    from vllm import LLM

NUM_AT_ONCE = 32  # requests that a server is sent at a time
REQUEST_LIMIT_S = 1800


class Decoded(NamedTuple):
    """A prompt's text, its output tokens, the forward passes it took, and the profile it was decoded with."""

    text: str
    num_tokens: int
    nfe: int
    profile: str | None = None


class RefusedError(Exception):
    """The model does not take these options; the message says why."""


class Decoder(Protocol):
    """Decodes prompts greedily.

    Attributes:
        folder: Where its profiles are.
        writing_limit_s: How long after :meth:`flush` they may take to be there.
    """

    folder: Path
    writing_limit_s: float

    def decode(self, prompts: Sequence[str], max_tokens: int, options: Mapping[str, OptionValue]) -> list[Decoded]:
        """The outcome of every prompt, with options by name.

        Raises:
            RefusedError: The options are refused.
        """
        ...

    def flush(self) -> None:
        """Have the profiles made so far written."""
        ...


class EngineDecoder:
    """An engine in this process, whose profiles are in ``folder``."""

    writing_limit_s = 0.0

    def __init__(self, llm: "LLM", folder: Path) -> None:
        self.folder = folder
        self._llm = llm

    def decode(self, prompts: Sequence[str], max_tokens: int, options: Mapping[str, OptionValue]) -> list[Decoded]:
        """See the protocol."""
        from vllm_osdt import describe, sampling_params

        params = sampling_params(max_tokens=max_tokens, **options)
        try:
            outputs = self._llm.generate(list(prompts), params, use_tqdm=False)
        except OSDTError as error:
            raise RefusedError(str(error)) from None
        decoded = []
        for output in outputs:
            completion = output.outputs[0]
            about = describe(completion) or {}
            decoded.append(
                Decoded(completion.text, len(completion.token_ids), about.get("nfe", 0), about.get("profile"))
            )
        return decoded

    def flush(self) -> None:
        """See the protocol."""
        from vllm_osdt import profiles

        profiles(self._llm)


class ServerDecoder:
    """A running server with an OpenAI endpoint for completions.

    Args:
        url: Of the server, with or without ``/v1``.
        model: Name under which it serves the model.
        folder: Of its profiles, which it shares with this machine.

    Raises:
        CommandError: It cannot be reached, or serves no such model.
    """

    writing_limit_s = 20.0

    def __init__(self, url: str, model: str, folder: Path) -> None:
        self.folder = folder
        self._url = url.rstrip("/").removesuffix("/v1")
        self._model = model
        if not self._url.startswith(("http://", "https://")):
            raise CommandError(f"the server is {url!r}; expected its URL, such as http://127.0.0.1:8000")
        try:
            served = [one["id"] for one in self._ask("/v1/models")["data"]]
        except (RefusedError, KeyError, TypeError) as error:
            raise CommandError(f"{self._url} is no server of models: {error}") from None
        if model not in served:
            raise CommandError(f"the server {self._url} has no model {model!r}; it serves {', '.join(served)}")

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        request = urllib.request.Request(self._url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_LIMIT_S) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            if error.code == 400:
                raise RefusedError(_message(text)) from None
            raise CommandError(f"the server {self._url}{path} answers {error.code}: {_message(text)}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise CommandError(f"the server {self._url} cannot be reached ({reason}); is it running?") from None

    def decode(self, prompts: Sequence[str], max_tokens: int, options: Mapping[str, OptionValue]) -> list[Decoded]:
        """See the protocol."""
        extra = {PREFIX + name: value for name, value in options.items()}
        body = {"model": self._model, "max_tokens": max_tokens, "temperature": 0.0, "vllm_xargs": extra}
        with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
            return list(pool.map(lambda prompt: self._decode_one({**body, "prompt": prompt}), prompts))

    def _decode_one(self, body: Mapping[str, Any]) -> Decoded:
        answer = self._ask("/v1/completions", body)
        try:
            about = answer["osdt"]
            text, num_tokens = answer["choices"][0]["text"], answer["usage"]["completion_tokens"]
            return Decoded(text, num_tokens, about["nfe"], about["profile"])
        except (KeyError, TypeError, IndexError):
            raise CommandError(
                f"the answers of {self._url} have no key osdt; start the server with `vllm serve MODEL --plugin osdt`"
            ) from None

    def flush(self) -> None:
        """See the protocol; a server does so by itself."""


def _message(text: str) -> str:
    """What an error of an OpenAI endpoint says."""
    try:
        found = json.loads(text)
        return str(found.get("error", found).get("message", text))
    except (ValueError, AttributeError):
        return text[:500]
