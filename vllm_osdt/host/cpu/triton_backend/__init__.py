"""The Triton backend named "cpu": Triton's own interpreter, declared as a backend so that vLLM finds one.

The wheel of Triton has no CPU backend, and without one the CPU build of vLLM turns Triton off, and Model Runner V2 with
it. Triton loads every entry of the group `triton.backends` (`compiler` and `driver` of this package are one) while it
is imported itself, before any kernel is decorated: early enough, in every process, to turn the interpreter on.
"""

# First of all: whoever imports this package before Triton lets Triton import its two halves in Triton's own order.
import triton  # noqa: F401
