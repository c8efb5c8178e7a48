"""One GGUF file in llama.cpp, inside the worker's process. Imports neither torch nor numpy."""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from ftcore.llama_cpp.library import Batch, ChainParams, LogCallback

BATCH = 64
"""Most tokens in one decode: bounds the logits that llama.cpp holds, 64 MiB for a vocabulary of 262,144."""
F32, F16 = 0, 1
"""`ggml_type` of the KV cache."""
WARN, ERROR, CONTINUED = 3, 4, 5
"""`ggml_log_level`; CONTINUED goes on with the line before."""


class Failed(Exception):
    """llama.cpp refused something; the message says what."""


class Log:
    """Keeps what llama.cpp says of errors, and passes it on to standard error; the rest is dropped."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.lines: deque[str] = deque(maxlen=8)
        self._level = 0
        self.callback = LogCallback(self._write)  # held here: llama.cpp calls it as long as the process lives
        library.llama_log_set(self.callback, None)

    def _write(self, level: int, text: bytes | None, _: Any) -> None:
        self._level = self._level if level == CONTINUED else level
        line = (text or b"").decode("utf-8", "replace").strip()
        if self._level >= ERROR and line:
            self.lines.append(line)
            print(line, file=sys.stderr, flush=True)

    def reason(self) -> str:
        """The last errors in one line; they are forgotten."""
        text = "; ".join(dict.fromkeys(self.lines)) or "llama.cpp gave no reason"
        self.lines.clear()
        return text


class Model:
    """An open model with its context. Raises Failed when llama.cpp does not take the file."""

    def __init__(
        self, library: ctypes.CDLL, file: str, lora: str | None, context: int, kv: str, vocab_only: bool, threads: int
    ) -> None:
        self.library, self.log = library, Log(library)
        library.llama_backend_init()
        self.model = self._model(file, vocab_only)
        self.vocab = library.llama_model_get_vocab(self.model)
        self.width = library.llama_vocab_n_tokens(self.vocab)
        self.context = None if vocab_only else self._context(context, kv, threads)
        self.room = library.llama_n_ctx(self.context) if self.context else 0
        if lora is not None:
            self._adapt(lora)

    def facts(self) -> dict[str, Any]:
        """What the file says about itself."""
        library = self.library
        template = library.llama_model_chat_template(self.model, None)
        bos = library.llama_vocab_bos(self.vocab)
        bos_text = library.llama_vocab_get_text(self.vocab, bos) if bos >= 0 else None
        eos = library.llama_vocab_eos(self.vocab)
        eos_text = library.llama_vocab_get_text(self.vocab, eos) if eos >= 0 else None
        return {
            "vocab_size": self.width,
            "eog": [i for i in range(self.width) if library.llama_vocab_is_eog(self.vocab, i)],
            "bos": bos if bos >= 0 else None,
            "bos_text": bos_text.decode("utf-8", "replace") if bos_text else None,
            "eos_text": eos_text.decode("utf-8", "replace") if eos_text else None,
            "adds_bos": library.llama_vocab_get_add_bos(self.vocab),
            "file_type": self._number("general.file_type"),
            "chat_template": template.decode("utf-8", "replace") if template else None,
            "context": self.room,
            "trained_context": library.llama_model_n_ctx_train(self.model),
        }

    def tokens(self, text: str, special: bool, add: bool) -> list[int]:
        """Token ids; `special` reads control tokens in the text, `add` puts in front or behind what the file says."""
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        while True:
            ids = (ctypes.c_int32 * room)()
            count = self.library.llama_tokenize(self.vocab, data, len(data), ids, room, add, special)
            if count >= 0:
                return list(ids[:count])
            if -count <= room:
                raise Failed(f"the text cannot be tokenized: {self.log.reason()}")
            room = -count

    def text(self, ids: Sequence[int], special: bool) -> str:
        """The text of token ids; `special` writes control tokens out."""
        if any(not 0 <= i < self.width for i in ids):
            raise Failed(f"token ids lie between 0 and {self.width - 1}")
        given = (ctypes.c_int32 * max(len(ids), 1))(*ids)
        room = 16 * len(ids) + 64
        while True:
            data = ctypes.create_string_buffer(room)
            count = self.library.llama_detokenize(self.vocab, given, len(ids), data, room, False, special)
            if count >= 0:
                return data.raw[:count].decode("utf-8", "replace")
            room = -count

    def logits(self, ids: Sequence[int], start: int) -> bytes:
        """Logits after each of at most BATCH tokens, `[len(ids), vocab]` float32, that stand at position `start`."""
        if start == 0:
            self._clear()
        self._decode(ids, start, every=True)
        rows = []
        for i in range(len(ids)):
            row = self.library.llama_get_logits_ith(self.context, i)
            if not row:
                raise Failed("the model gives no logits")
            rows.append(ctypes.string_at(row, 4 * self.width))
        return b"".join(rows)

    def generate(
        self, ids: Sequence[int], count: int, stop: Iterable[int], sampling: dict[str, float] | None
    ) -> list[int]:
        """At most `count` new tokens after `ids`, up to one in `stop`, which is left out; greedy without `sampling`."""
        if not ids:
            raise Failed("there is nothing to continue: the text has no tokens")
        self._clear()
        for start in range(0, len(ids), BATCH):
            self._decode(ids[start : start + BATCH], start)
        ends, written = set(stop), list[int]()
        chain = self._chain(sampling)
        try:
            while (
                len(written) < count and (new := self.library.llama_sampler_sample(chain, self.context, -1)) not in ends
            ):
                written.append(new)
                position = len(ids) + len(written) - 1
                if len(written) == count or position >= self.room:
                    break
                self._decode([new], position)
        finally:
            self.library.llama_sampler_free(chain)
        return written

    def close(self) -> None:
        """Free the context and the model, the adapter with it."""
        if self.context:
            self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)

    def _number(self, key: str) -> int | None:
        """A number of the file's metadata; None where it has none."""
        data = ctypes.create_string_buffer(32)
        length = self.library.llama_model_meta_val_str(self.model, key.encode(), data, len(data))
        return int(data.value) if length > 0 and data.value.isdigit() else None

    def _model(self, file: str, vocab_only: bool) -> Any:
        params = self.library.llama_model_default_params()
        none = (ctypes.c_void_p * 1)(None)  # a list of no devices: the CPU alone
        params.devices = ctypes.cast(none, ctypes.c_void_p).value
        params.n_gpu_layers = 0
        params.vocab_only = vocab_only
        params.check_tensors = True
        params.use_extra_bufts = False  # weights as the file has them, not packed anew
        model = self.library.llama_model_load_from_file(file.encode(), params)
        if not model:
            raise Failed(self.log.reason())
        return model

    def _context(self, context: int, kv: str, threads: int) -> Any:
        params = self.library.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, BATCH, BATCH
        params.n_outputs_max = params.n_outputs_max_per_seq = BATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 0
        params.type_k = params.type_v = {"f32": F32, "f16": F16}[kv]
        params.offload_kqv = params.op_offload = False
        made = self.library.llama_init_from_model(self.model, params)
        if not made:
            raise Failed(self.log.reason())
        return made

    def _adapt(self, lora: str) -> None:
        adapter = self.library.llama_adapter_lora_init(self.model, lora.encode())
        if not adapter:
            raise Failed(f"{lora}: {self.log.reason()}")
        adapters, scales = (ctypes.c_void_p * 1)(adapter), (ctypes.c_float * 1)(1.0)
        if self.library.llama_set_adapters_lora(self.context, adapters, 1, scales) != 0:
            raise Failed(f"{lora}: {self.log.reason()}")

    def _clear(self) -> None:
        if not self.context:
            raise Failed("only the vocabulary is loaded")
        if memory := self.library.llama_get_memory(self.context):
            self.library.llama_memory_clear(memory, True)

    def _decode(self, ids: Sequence[int], start: int, every: bool = False) -> None:
        count = len(ids)
        if start + count > self.room:
            raise Failed(f"{start + count} tokens do not fit into the context of {self.room}")
        zero = (ctypes.c_int32 * 1)(0)
        first = ctypes.cast(zero, ctypes.POINTER(ctypes.c_int32))
        sequences = (ctypes.POINTER(ctypes.c_int32) * count)(*[first] * count)
        wanted = [int(every or i == count - 1) for i in range(count)]
        batch = Batch(
            n_tokens=count,
            token=(ctypes.c_int32 * count)(*ids),
            pos=(ctypes.c_int32 * count)(*range(start, start + count)),
            n_seq_id=(ctypes.c_int32 * count)(*[1] * count),
            seq_id=sequences,
            logits=(ctypes.c_int8 * count)(*wanted),
        )
        if (code := self.library.llama_decode(self.context, batch)) != 0:
            raise Failed(f"llama_decode returned {code}: {self.log.reason()}")

    def _chain(self, sampling: dict[str, float] | None) -> Any:
        """A sampler chain in transformers' order, temperature first, so that the same values mean the same."""
        library = self.library
        chain = library.llama_sampler_chain_init(ChainParams(no_perf=True))
        if not sampling:
            library.llama_sampler_chain_add(chain, library.llama_sampler_init_greedy())
            return chain
        library.llama_sampler_chain_add(chain, library.llama_sampler_init_temp(sampling["temperature"]))
        library.llama_sampler_chain_add(chain, library.llama_sampler_init_top_k(int(sampling["top_k"])))
        library.llama_sampler_chain_add(chain, library.llama_sampler_init_top_p(sampling["top_p"], 1))
        library.llama_sampler_chain_add(chain, library.llama_sampler_init_min_p(sampling["min_p"], 1))
        library.llama_sampler_chain_add(chain, library.llama_sampler_init_dist(int(sampling["seed"])))
        return chain
