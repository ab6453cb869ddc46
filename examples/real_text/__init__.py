"""A pretrained small language model becomes a block diffusion model that vLLM serves through this plugin."""
