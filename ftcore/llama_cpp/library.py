"""llama.cpp's library through ctypes: its structs and functions after `include/llama.h` of build b11549 (v0.6.0).

The structs are read by their place in memory, so a build with other ones is refused, not misread: both functions that
give defaults must write exactly as many bytes as the struct here has, with the documented values in each field.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int32, c_size_t, c_uint32, c_void_p
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "xllamacpp"
"""A PyPI package whose extension module exports llama.cpp's functions, for any x86-64 CPU with AVX2.

Its file is found and opened; the package itself is never imported. `llama_cpp` in pyproject.toml pins its build.
"""
ENVIRONMENT = {"GGML_NO_BACKTRACE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""A failed assertion starts no debugger, and threads that wait sleep: spinning takes the CPU from whoever is needed."""


class OtherBuild(Exception):
    """The libraries are not of the build whose structs stand here."""


class ModelParams(ctypes.Structure):
    """`llama_model_params`."""

    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        *((name, c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc")),
        ("load_mtp", c_bool),
    ]


class ContextParams(ctypes.Structure):
    """`llama_context_params`."""

    _fields_ = [
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, c_int32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    ]


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(ctypes.c_int8)),
    ]


class ChainParams(ctypes.Structure):
    """`llama_sampler_chain_params`."""

    _fields_ = [("no_perf", c_bool)]


MODEL_DEFAULTS: dict[str, float] = {
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "use_extra_bufts": True,
}
"""`llama_model_default_params`: fields that are not zero or null."""
CONTEXT_DEFAULTS: dict[str, float] = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0,
    "yarn_beta_fast": -1.0,
    "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0,
    "type_k": 1,
    "type_v": 1,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
}
"""`llama_context_default_params`: fields that are not zero or null; type 1 is float16."""

LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
_TOKENS = POINTER(c_int32)
_PROTOTYPES: dict[str, tuple[object, list[object]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_model_meta_val_str": (c_int32, [c_void_p, c_char_p, c_char_p, c_size_t]),
    "llama_model_chat_template": (c_char_p, [c_void_p, c_char_p]),
    "llama_model_has_encoder": (c_bool, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
    "llama_set_adapters_lora": (c_int32, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
    "llama_vocab_get_text": (c_char_p, [c_void_p, c_int32]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, _TOKENS, c_int32, c_bool, c_bool]),
    "llama_detokenize": (c_int32, [c_void_p, _TOKENS, c_int32, c_char_p, c_int32, c_bool, c_bool]),
    "llama_sampler_chain_init": (c_void_p, [ChainParams]),
    "llama_sampler_chain_add": (None, [c_void_p, c_void_p]),
    "llama_sampler_free": (None, [c_void_p]),
    "llama_sampler_accept": (None, [c_void_p, c_int32]),
    "llama_sampler_sample": (c_int32, [c_void_p, c_void_p, c_int32]),
    "llama_sampler_init_greedy": (c_void_p, []),
    "llama_sampler_init_dist": (c_void_p, [c_uint32]),
    "llama_sampler_init_top_k": (c_void_p, [c_int32]),
    "llama_sampler_init_top_p": (c_void_p, [c_float, c_size_t]),
    "llama_sampler_init_min_p": (c_void_p, [c_float, c_size_t]),
    "llama_sampler_init_temp": (c_void_p, [c_float]),
}


def find() -> Path | None:
    """The library's file; None where the package is not installed, or not for this kind of machine."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    spec = find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(place).glob(f"{PACKAGE}*.so")):
            return file
    return None


def load(file: Path) -> ctypes.CDLL:
    """The loaded library. Raises OtherBuild when its structs or functions are not those that stand here."""
    os.environ.update(ENVIRONMENT)
    library = ctypes.CDLL(str(file))
    check(library, "llama_model_default_params", ModelParams, MODEL_DEFAULTS)
    check(library, "llama_context_default_params", ContextParams, CONTEXT_DEFAULTS)
    for name, (returns, takes) in _PROTOTYPES.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise OtherBuild(f"{name} is missing") from None
        function.restype, function.argtypes = returns, takes
    return library


def check(
    library: ctypes.CDLL, name: str, struct: type[ctypes.Structure], defaults: dict[str, float], room: int = 1024
) -> None:
    """Raises OtherBuild unless the function returns a struct of this size with these values.

    In the x86-64 calling convention a struct of more than 16 bytes is written to where the first argument points, so
    the function is called with a place of our own, whose filling shows how many bytes it wrote.
    """
    function = getattr(library, name)
    function.restype, function.argtypes = c_void_p, [c_void_p]
    last = getattr(struct, struct._fields_[-1][0])
    written = []
    for filling in (0x5A, 0xA5):
        place = ctypes.create_string_buffer(bytes([filling]) * room, room)
        function(ctypes.addressof(place))
        written.append(place.raw)
        end = max((i + 1 for i, byte in enumerate(place.raw) if byte != filling), default=0)
        if end != last.offset + last.size:
            raise OtherBuild(f"{name} returns {end} bytes, not {last.offset + last.size}")
    values = struct.from_buffer_copy(written[0])
    for field in struct._fields_:
        found, documented = getattr(values, field[0]) or 0, defaults.get(field[0], 0)
        if found != documented:
            raise OtherBuild(f"{name} gives {field[0]} {found}, not {documented}")
