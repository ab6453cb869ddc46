"""The stages of ``tools/gpu_check.py``: what only a GPU shows.

Each module has the stages of one subject. ``lines`` is how all of them report, ``sizes`` how much they do, and
``engines`` how they start an engine.
"""
