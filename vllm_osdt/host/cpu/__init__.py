"""What lets vLLM's Model Runner V2 run without a GPU: a Triton backend entry, and NumPy versions of its kernels.

Importing this package imports nothing else: `import triton` reaches it in every process.
"""
