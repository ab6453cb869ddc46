"""What vLLM needs from us to run these models: patches, attention backends, and kernels for a CPU without Triton.

``import triton`` reaches ``host.cpu.triton_backend`` in every process, so this package imports nothing.
"""
