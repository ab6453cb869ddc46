"""Patches of what vLLM does on a CPU."""

import importlib

from vllm_osdt.host.compat.wrapping import wrap
from vllm_osdt.models.registry import is_canvas_model


def patch_runner_choice() -> None:
    """Without a GPU, our Triton stand-in must not move other models to Model Runner V2, whose kernels it interprets.

    Goes when vLLM for CPU ships a Triton compiler.
    """
    from vllm.config import VllmConfig

    from vllm_osdt.host.cpu.triton_backend.interpreter import is_interpreting

    def make(original):
        def use_v2_model_runner(self):
            import vllm.envs as envs

            if is_interpreting() and envs.VLLM_USE_V2_MODEL_RUNNER is None and not is_canvas_model(self.model_config):
                return False
            return original(self)

        return use_v2_model_runner

    wrap(VllmConfig, "use_v2_model_runner", make)


def patch_top_k_top_p() -> None:
    """vLLM's top-k and top-p of other models use a Triton kernel that the interpreter cannot run.

    On a CPU without a Triton compiler they take vLLM's PyTorch path, as they would without us.

    Goes when vLLM for CPU ships a Triton compiler.
    """
    from vllm_osdt.host.cpu.triton_backend.interpreter import is_interpreting

    if is_interpreting():
        from vllm.v1.sample.ops import topk_topp_sampler

        topk_topp_sampler.HAS_TRITON = False


def patch_host_kernels() -> None:
    """Host functions of Model Runner V2 whose kernels the interpreter would run are replaced by NumPy functions.

    Called by our CPU worker, so processes that serve other models keep vLLM's functions. Goes when vLLM for CPU ships
    a Triton compiler.
    """
    from vllm_osdt.host.cpu.triton_backend.interpreter import is_interpreting

    if not is_interpreting():
        return
    from vllm_osdt.host.cpu.numpy_kernels import REPLACEMENTS

    for replacement in REPLACEMENTS:
        owner = importlib.import_module(replacement.module)
        *path, name = replacement.attribute.split(".")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, name, replacement.function)


def patch_cpu_lora() -> None:
    """vLLM's CPU kernels give rows without an adapter none.

    They read the adapter index -1 of such rows as the last slot, and so give them the adapter that is there. Called by
    our CPU worker, when adapters are enabled.

    Goes when vLLM's own kernels pass such rows over.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    def make(original):
        def on_rows_with_an_adapter(inputs, weights, output, indices, *args, **kwargs):
            chosen = indices >= 0
            if chosen.all():
                return original(inputs, weights, output, indices, *args, **kwargs)
            rows = output[chosen]
            original(inputs[chosen], weights, rows, indices[chosen], *args, **kwargs)
            output[chosen] = rows

        return on_rows_with_an_adapter

    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"):
        wrap(lora_ops, name, make)
        setattr(punica_cpu, name, getattr(lora_ops, name))
