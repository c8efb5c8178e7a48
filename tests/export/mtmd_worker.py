"""An image through llama.cpp's libmtmd, in a process of its own: prints what comes of it as JSON.

`python mtmd_worker.py TEXT.gguf MMPROJ.gguf PIXELS WIDTH HEIGHT QUESTION`, with RGB bytes in the file PIXELS.
"""

from __future__ import annotations

import ctypes
import json
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path

from ftcore.llama_cpp import library


class Params(ctypes.Structure):
    """`mtmd_context_params` of the build that `ftcore.llama_cpp.library` is for."""

    _fields_ = [
        ("use_gpu", c_bool),
        ("device", c_void_p),
        ("print_timings", c_bool),
        ("n_threads", c_int32),
        ("image_marker", c_char_p),
        ("media_marker", c_char_p),
        ("flash_attn_type", c_int32),
        ("warmup", c_bool),
        ("image_min_tokens", c_int32),
        ("image_max_tokens", c_int32),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("batch_max_tokens", c_int32),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
    ]


class Text(ctypes.Structure):
    """`mtmd_input_text`."""

    _fields_ = [("text", c_char_p), ("text_len", c_size_t), ("add_special", c_bool), ("parse_special", c_bool)]


PROTOTYPES = {
    "mtmd_context_params_default": (Params, []),
    "mtmd_init_from_file": (c_void_p, [c_char_p, c_void_p, Params]),
    "mtmd_bitmap_init": (c_void_p, [c_uint32, c_uint32, c_char_p]),
    "mtmd_input_chunks_init": (c_void_p, []),
    "mtmd_input_chunks_size": (c_size_t, [c_void_p]),
    "mtmd_input_chunks_get": (c_void_p, [c_void_p, c_size_t]),
    "mtmd_input_chunk_get_type": (c_int32, [c_void_p]),
    "mtmd_input_chunk_get_n_tokens": (c_size_t, [c_void_p]),
    "mtmd_tokenize": (c_int32, [c_void_p, c_void_p, POINTER(Text), POINTER(c_void_p), c_size_t]),
    "mtmd_encode_chunk": (c_int32, [c_void_p, c_void_p]),
    "mtmd_get_output_embd": (POINTER(c_float), [c_void_p]),
    "mtmd_decode_use_mrope": (c_bool, [c_void_p]),
    "mtmd_helper_eval_chunks": (
        c_int32,
        [c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_int32, c_bool, POINTER(c_int32)],
    ),
    "llama_model_n_embd": (c_int32, [c_void_p]),
}


def main(text: str, projector: str, pixels: str, width: str, height: str, question: str) -> None:
    """Load both files, encode the image and read the question behind it.

    Prints `tokens` of the image, `values` of the projector `[tokens * hidden]`, and `logits` after the question.
    """
    file = library.find()
    assert file is not None
    lib = library.load(file)
    for name, (returns, takes) in PROTOTYPES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = returns, takes
    model = lib.llama_model_load_from_file(text.encode(), lib.llama_model_default_params())
    assert model, "the text model does not load"
    params = lib.mtmd_context_params_default()
    params.use_gpu, params.warmup, params.n_threads, params.flash_attn_type = False, False, 1, 0
    context = lib.mtmd_init_from_file(projector.encode(), model, params)
    assert context, "the projector does not load"
    bitmaps = (c_void_p * 1)(lib.mtmd_bitmap_init(int(width), int(height), Path(pixels).read_bytes()))
    chunks, said = lib.mtmd_input_chunks_init(), b"<__media__>" + question.encode()
    assert lib.mtmd_tokenize(context, chunks, Text(said, len(said), False, True), bitmaps, 1) == 0
    parts = [lib.mtmd_input_chunks_get(chunks, i) for i in range(lib.mtmd_input_chunks_size(chunks))]
    image = next(part for part in parts if lib.mtmd_input_chunk_get_type(part) == 1)
    assert lib.mtmd_encode_chunk(context, image) == 0
    count = lib.mtmd_input_chunk_get_n_tokens(image)
    values = lib.mtmd_get_output_embd(context)[: count * lib.llama_model_n_embd(model)]
    settings = lib.llama_context_default_params()
    settings.type_k = settings.type_v = settings.flash_attn_type = 0
    reader = lib.llama_init_from_model(model, settings)
    assert lib.mtmd_helper_eval_chunks(context, reader, chunks, 0, 0, 512, True, ctypes.byref(c_int32())) == 0
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    logits = lib.llama_get_logits_ith(reader, -1)[:vocabulary]
    print(json.dumps({"tokens": count, "values": values, "logits": logits}))


if __name__ == "__main__":
    main(*sys.argv[1:])
