"""Decoders written in C++ as peers of `generate`: CTranslate2 and llama.cpp, with the weights of a transformers Llama.

Each function takes the transformers twin of a model and gives one of (prompts [B, P]) -> tokens [B, P + new], with
exactly `new` tokens and torch's number of threads.
"""

import ctypes
import functools
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

# What a comparison with each needs: pip install transformers ctranslate2 llama-cpp-python gguf
PACKAGES = {"transformers": ("transformers",), "CTranslate2": ("ctranslate2",), "llama.cpp": ("llama_cpp", "gguf")}


def installed(peer: str) -> bool:
    missing = [package for package in PACKAGES[peer] if importlib.util.find_spec(package) is None]
    if missing:
        warnings.warn(f"{peer} is left out: {', '.join(missing)} not installed", stacklevel=2)
    return not missing


def ctranslate2_decoder(twin, new: int, num_beams: int) -> Callable:
    """Its converter reads the twin from files and wants a tokenizer: token i is the word "i"."""
    import ctranslate2
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        words = {str(i): i for i in range(twin.config.vocab_size)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
        special = dict(bos_token="1", eos_token="2", unk_token="0")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
        twin.save_pretrained(folder)
        converted = str(Path(folder, "ctranslate2"))
        ctranslate2.converters.TransformersConverter(folder).convert(converted, quantization="float32")
        threads = torch.get_num_threads()
        generator = ctranslate2.Generator(converted, compute_type="float32", intra_threads=threads, inter_threads=1)
    options = dict(beam_size=num_beams, min_length=new, max_length=new, include_prompt_in_result=False)

    def generate(prompts):
        results = generator.generate_batch([[str(i) for i in row] for row in prompts.tolist()], **options)
        return torch.cat([prompts, torch.tensor([result.sequences_ids[0] for result in results])], dim=1)

    return generate


def llama_cpp_decoder(twin, new: int) -> Callable:
    """Greedy, one prompt, through the C functions."""
    import llama_cpp as cpp

    path = Path(tempfile.mkdtemp(), "model.gguf")
    write_gguf(twin, path)
    quiet = cpp.llama_log_callback(lambda level, text, data: None)
    cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    model = cpp.llama_model_load_from_file(str(path).encode(), cpp.llama_model_default_params())
    options = cpp.llama_context_default_params()
    options.n_ctx = 512
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    context = cpp.llama_init_from_model(model, options)
    sampler = cpp.llama_sampler_init_greedy()

    def generate(prompts):
        assert model and context and quiet, "what the C functions use lives as long as this one"
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        tokens, chunk = prompts[0].tolist(), prompts[0].tolist()
        for _ in range(new):
            array = (cpp.llama_token * len(chunk))(*chunk)  # the batch points into it
            assert cpp.llama_decode(context, cpp.llama_batch_get_one(array, len(chunk))) == 0
            chunk = [cpp.llama_sampler_sample(sampler, context, -1)]
            tokens += chunk
        return torch.tensor([tokens])

    return generate


def write_gguf(twin, path: Path) -> None:
    """The twin in llama.cpp's format, without a tokenizer. Its rotation pairs neighbours, hence the order of rows."""
    import gguf

    config = twin.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    bf16 = twin.dtype == torch.bfloat16
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in twin.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        for projection, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if projection in name:
                weight = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        data, dtype = weight.float().numpy(), gguf.GGMLQuantizationType.F32
        if bf16 and weight.dim() == 2:
            dtype = gguf.GGMLQuantizationType.BF16
            data = gguf.quants.quantize(data, dtype)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def transformers_decoder(twin, new: int, num_beams: int) -> Callable:
    twin.generation_config.eos_token_id = None
    options = dict(max_new_tokens=new, do_sample=False, num_beams=num_beams, pad_token_id=0, use_cache=True)
    return functools.partial(twin.generate, **options)
