"""Plain PyTorch references that the tests compare with: a model and a decoder without vLLM, one request at a time."""
