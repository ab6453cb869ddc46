"""What ``vllm-osdt tune`` is made of."""
