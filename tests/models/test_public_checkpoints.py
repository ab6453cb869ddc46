"""Public checkpoints of other authors that have the architecture of a family.

Some load as they are; of others the operator has to say something.

No config.json of d3LLM's and dParallel's checkpoints was found. Their cards and programs load them with the code of the
model that they were made of, whose config stands here; d3LLM's generation_config.json are their own.
"""

import json

import pytest

from tests.models.test_dream import PUBLISHED as DREAM
from tests.models.test_llada import PUBLISHED as LLADA
from tests.reference.dream import ReferenceDream, make_dream_checkpoint
from vllm_osdt.models.configs.dream import DreamConfig
from vllm_osdt.models.configs.llada import LLaDAConfig
from vllm_osdt.plugin import register

# config.json of Dream-org/Dream-Coder-v0-Instruct-7B, of the copy in smoorsmith/Dream-coder-test.
DREAM_CODER = {
    "architectures": ["DreamModel"],
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 151665,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
# generation_config.json of d3LLM/d3LLM_LLaDA, d3LLM/d3LLM_Dream and d3LLM/d3LLM_Dream_Coder.
OF_D3LLM_LLADA = {"bos_token_id": 126080, "eos_token_id": 126081, "transformers_version": "4.49.0"}
OF_D3LLM_DREAM = {
    "alg": "origin",
    "alg_temp": None,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "eps": 0.001,
    "mask_token_id": None,
    "output_history": False,
    "pad_token_id": 151643,
    "steps": 512,
    "temperature": 0.0,
    "top_k": None,
    "top_p": None,
    "transformers_version": "4.46.3",
}
OF_D3LLM_DREAM_CODER = {
    **OF_D3LLM_DREAM,
    "bos_token_id": 151665,
    "eos_penalty": 0.0,
    "transformers_version": "4.49.0",
}
CHECKPOINTS = {
    # config, generation config, class, mask token, shift
    "d3LLM/d3LLM_LLaDA": (LLADA, OF_D3LLM_LLADA, LLaDAConfig, 126336, 0),
    "d3LLM/d3LLM_Dream": (DREAM, OF_D3LLM_DREAM, DreamConfig, 151666, 1),
    "d3LLM/d3LLM_Dream_Coder": (DREAM_CODER, OF_D3LLM_DREAM_CODER, DreamConfig, 151666, 1),
    "Zigeng/dParallel-LLaDA-8B-instruct": (LLADA, {}, LLaDAConfig, 126336, 0),
    "Zigeng/dParallel_Dream_7B_Instruct": (DREAM, {}, DreamConfig, 151666, 1),
}

# fredzzp/open-dcoder-0.5B says that it is a Qwen2. Its config.json was not found: a test in public code asserts the
# values that are called stated; the others are those of Qwen/Qwen2.5-Coder-0.5B. Its decoder (pengzhangzhi/Open-dLLM)
# takes the causal mask away and reads position i from the logits at i - 1, as Dream's does. The mask token is <M> of
# its added_tokens.json.
OPEN_DCODER = {
    "architectures": ["Qwen2ForCausalLM"],  # stated
    "bos_token_id": 151643,
    "eos_token_id": 151643,  # stated
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",  # stated
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,  # stated
}
OPEN_DCODER_OVERRIDES = {"architectures": ["DreamModel"], "mask_token_id": 151665}


def write(folder, config, generation=None):
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))


def read(folder, **overrides):
    """The config that vLLM makes of a checkpoint's and an operator's overrides."""
    from vllm.transformers_utils.config import get_config

    register()
    return get_config(str(folder), trust_remote_code=False, hf_overrides_kw=overrides)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_its_config_is_that_of_a_family(tmp_path, name):
    fields, _, own, mask_token_id, shift = CHECKPOINTS[name]
    write(tmp_path, fields)
    config = read(tmp_path)
    assert type(config) is own and config.architectures == fields["architectures"]
    assert (config.mask_token_id, config.logits_shift) == (mask_token_id, shift)
    assert (config.block_length, getattr(config, "is_block_causal", False)) == (32, False)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_engine_takes_nothing_but_its_temperature_from_its_generation_config(tmp_path, name):
    from vllm.engine.arg_utils import EngineArgs

    fields, generation, *_ = CHECKPOINTS[name]
    write(tmp_path, fields, generation)
    config = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, max_model_len=2048).create_engine_config()
    assert config.model_config.get_diff_sampling_param() == {"temperature": 0.0}
    assert config.diffusion_config.canvas_length == 32


@pytest.mark.e2e
def test_requests_that_say_nothing_decode_with_the_generation_config_of_d3llm(tmp_path, start_llm):
    from tests.e2e.engine import generate, sampling, tokens

    folder = make_dream_checkpoint(tmp_path / "model", seed=3)
    (folder / "generation_config.json").write_text(json.dumps({**OF_D3LLM_DREAM, "eos_token_id": 0}))
    llm = start_llm(folder, max_num_seqs=4, max_model_len=128)
    prompts = [list(range(8, 8 + length)) for length in (3, 17)]
    default = llm.get_default_sampling_params()
    default.max_tokens = 32
    assert tokens(generate(llm, prompts, default)) == tokens(generate(llm, prompts, sampling(32, ignore_eos=False)))


def make_open_dcoder_checkpoint(folder, seed=0):
    """A small one in the published format: a Qwen2's config, tied embeddings."""
    make_dream_checkpoint(folder, seed=seed, weight_tying=True)
    fields = json.loads((folder / "config.json").read_text())
    del fields["mask_token_id"]
    write(folder, {**fields, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"})
    return folder


def test_open_dcoder_is_vllms_ordinary_qwen2_unless_an_operator_says_otherwise(tmp_path):
    from transformers import Qwen2Config
    from vllm.engine.arg_utils import EngineArgs

    write(tmp_path, OPEN_DCODER)
    assert type(read(tmp_path)) is Qwen2Config
    config = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True).create_engine_config()
    assert config.model_config.architecture == "Qwen2ForCausalLM" and config.diffusion_config is None
    assert "vllm_osdt" not in config.parallel_config.worker_cls and config.scheduler_config.scheduler_cls is None
    told = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, hf_overrides=OPEN_DCODER_OVERRIDES)
    own = told.create_engine_config().model_config.hf_config
    assert type(own) is DreamConfig and own.architectures == ["DreamModel"]
    assert (own.mask_token_id, own.logits_shift, own.qkv_bias, own.block_length) == (151665, 1, True, 32)
    assert (own.hidden_size, own.num_key_value_heads, own.vocab_size) == (896, 2, 151936)
    assert (own.tie_word_embeddings, own.eos_token_id, own.sliding_window) == (True, 151643, None)
    assert own.rope_parameters == {"rope_type": "default", "rope_theta": 1000000.0}


@pytest.mark.e2e
def test_open_dcoder_decodes_as_dream_does(tmp_path, start_llm):
    """Random requests in all cache modes; embeddings are tied."""
    from tests.e2e.jobs import assert_one_batch_is_right, make_canvas_jobs

    folder = make_open_dcoder_checkpoint(tmp_path / "model", seed=6)
    overrides = {**OPEN_DCODER_OVERRIDES, "mask_token_id": 100}
    llm = start_llm(folder, max_num_seqs=64, max_model_len=256, hf_overrides=overrides)
    fields = json.loads((folder / "config.json").read_text())
    write(folder, {**fields, "mask_token_id": 100})
    assert_one_batch_is_right(llm, make_canvas_jobs(ReferenceDream.load(folder)))
