"""Where ``host.cpu`` was in the last release; goes with the next one.

Metadata of an editable install that is older than the checkout names ``vllm_osdt.cpu.triton_backend`` as a backend of
Triton, and ``import triton`` fails for everybody when it is not there.
"""
