"""The worker's part: request tables, model inputs, sampler and the thin runner that ties them to vLLM's."""
