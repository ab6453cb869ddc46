"""What is recorded of a calibrating request; imports no torch, as everything that reads profiles."""

from typing import NamedTuple

import numpy as np


class Recording(NamedTuple):
    """What the denoising steps of one request saw; all ``[blocks, steps, positions]``.

    Attributes:
        confidence: float32, NaN where a position was not masked.
        committed: bool, the positions that the step unmasked.
        wrong: bool, masked positions whose proposal was not the token that stood there in the end. Positions that
            never got a token, behind the end of the answer, are not counted as wrong.
    """

    confidence: np.ndarray
    committed: np.ndarray
    wrong: np.ndarray
