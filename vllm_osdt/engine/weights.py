"""Which weights an engine serves, for what a response says of them."""

from dataclasses import dataclass


@dataclass
class Weights:
    """The weights that workers hold between two updates.

    Attributes:
        num_updates: Updates since the engine's start, as its workers count them.
        label: The caller's name of them (vLLM's ``weight_version``); None without.
    """

    num_updates: int = 0
    label: str | None = None

    @property
    def version(self) -> int | str:
        """The label, or else the number of updates."""
        return self.num_updates if self.label is None else self.label
