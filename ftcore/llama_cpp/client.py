"""llama.cpp as seen from ftcore: a GGUF file opened in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore.errors import Exit, Problem, Refused
from ftcore.llama_cpp.library import find
from ftcore.llama_cpp.model import BATCH
from ftcore.llama_cpp.process import Declined, Process, Stopped

if TYPE_CHECKING:
    import torch

INSTALL = "pip install 'ftcore[llama_cpp]'"
RANDOM_SEED = 0xFFFFFFFF
"""`LLAMA_DEFAULT_SEED`: llama.cpp draws a seed."""
FILE_TYPES = dict(
    enumerate(
        [
            "f32",
            "f16",
            "q4_0",
            "q4_1",
            "-",
            "-",
            "-",
            "q8_0",
            "q5_0",
            "q5_1",
            "q2_k",
            "q3_k_s",
            "q3_k_m",
            "q3_k_l",
            "q4_k_s",
            "q4_k_m",
            "q5_k_s",
            "q5_k_m",
            "q6_k",
        ]
    )
)
FILE_TYPES[32] = "bf16"
"""`llama_ftype`, as `general.file_type` holds it, to the names of types."""


def installed() -> bool:
    """Whether llama.cpp is there: the package xllamacpp, on Linux with an x86-64 CPU. Loads nothing."""
    return find() is not None


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU, with a float32 KV cache and without flash attention.

    llama.cpp runs in a process of its own: a file that makes it crash ends in Refused here, and nothing else. Several
    may be open at once. Close it, or use it in a `with`.

    :param file: GGUF file; of a split one, the first part.
    :param lora: LoRA adapter as GGUF, applied with scale 1.
    :param context: most tokens in one text, new ones included; 0 takes what the model was trained for.
    :param kv: type of the KV cache, `f32` or `f16`.
    :param vocab_only: load only the vocabulary, for `tokens` and `text`.
    :param threads: CPU threads; 0 takes those that this process may use.

    Raises Refused, naming the file, where llama.cpp is missing, does not take the file, or stops.
    """

    name = "llama.cpp"

    def __init__(
        self,
        file: str | Path,
        lora: str | Path | None = None,
        context: int = 2048,
        kv: str = "f32",
        vocab_only: bool = False,
        threads: int = 0,
    ) -> None:
        self.file = Path(file)
        for given in (file, lora):
            if given is not None:
                _check(Path(given))
        if not installed():
            raise Refused(Problem("llama_cpp", "llama.cpp is not installed", INSTALL))
        self._process = Process()
        try:
            self.facts: dict[str, Any] = self._ask(
                file=str(self.file.resolve()),
                lora=None if lora is None else str(Path(lora).resolve()),
                context=context,
                kv=kv,
                vocab_only=vocab_only,
                threads=threads or len(os.sched_getaffinity(0)),
            )
        except BaseException:
            self.close()
            raise
        self.vocab_size: int = self.facts["vocab_size"]
        self.eog: list[int] = self.facts["eog"]
        """Ids of the tokens that end an answer."""
        self.bos: int | None = self.facts["bos"]
        self.adds_bos: bool = self.facts["adds_bos"]
        """Whether the file asks for a BOS token in front of every text."""
        self.context: int = self.facts["context"]
        """Most tokens in one text: what was asked for, rounded up by llama.cpp."""
        self.longest: int = min(self.context, self.facts["trained_context"] or self.context)
        self.kind: str = FILE_TYPES.get(self.facts["file_type"], "")
        """Type of most of the weights, as `q8_0`; empty for one that is not in `FILE_TYPES`."""

    def chat_template(self) -> str | None:
        """The file's `tokenizer.chat_template`, Jinja."""
        template: str | None = self.facts["chat_template"]
        return template

    def tokens(self, text: str, special: bool = True, bos: bool | None = None) -> list[int]:
        """Token ids as llama.cpp's server reads a prompt.

        :param special: read control tokens in the text as such.
        :param bos: put BOS in front (and EOS behind) where the file asks for it; None does so where the text does not
            begin with BOS itself.
        """
        opens = self.facts["bos_text"]
        add = bos if bos is not None else not (self.adds_bos and special and opens and text.startswith(opens))
        ids: list[int] = self._ask(call="tokens", text=text, special=special, add=add)
        return ids

    def text(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of token ids; `special` writes control tokens out."""
        said: str = self._ask(call="text", ids=_ints(ids), special=special)
        return said

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits after each token: `[len(ids), vocab_size]`, float32, on the CPU."""
        import torch

        given = _ints(ids)
        out = torch.empty(len(given), self.vocab_size, dtype=torch.float32)
        for start in range(0, len(given), BATCH):
            data = self._ask(call="logits", ids=given[start : start + BATCH], start=start)
            rows = torch.frombuffer(data, dtype=torch.float32).view(-1, self.vocab_size)
            out[start : start + len(rows)] = rows
        return out

    def greedy(self, ids: Sequence[int], count: int, stop: Iterable[int] = ()) -> list[int]:
        """At most `count` new tokens, the most likely each; ends before one that ends answers or is in `stop`."""
        return self._generate(ids, count, stop, None)

    def sample(
        self,
        ids: Sequence[int],
        count: int,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = RANDOM_SEED,
        stop: Iterable[int] = (),
    ) -> list[int]:
        """At most `count` new tokens, drawn by llama.cpp's samplers in transformers' order; ends as `greedy` does."""
        drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
        return self._generate(ids, count, stop, drawn)

    def close(self) -> None:
        """End the worker; its memory goes with it."""
        self._process.close()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _generate(
        self, ids: Sequence[int], count: int, stop: Iterable[int], sampling: dict[str, float] | None
    ) -> list[int]:
        ends = sorted({*self.eog, *stop})
        new: list[int] = self._ask(call="generate", ids=_ints(ids), count=count, stop=ends, sampling=sampling)
        return new

    def _ask(self, **request: Any) -> Any:
        try:
            return self._process.ask(**request)
        except Declined as error:
            what = "llama.cpp" if "call" in request else "llama.cpp does not take it"
            raise Refused(Problem(str(self.file), f"{what}: {error}", code=Exit.DATA)) from error
        except Stopped as error:
            raise Refused(Problem(str(self.file), f"llama.cpp stopped: {error}", code=Exit.DATA)) from error


def _check(file: Path) -> None:
    """Raises Refused for a file that is not there or does not begin as GGUF does, before a process is started."""
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        fix = "give the path of a GGUF file"
        raise Refused(Problem(str(file), f"cannot be read: {reason}", fix, Exit.MISSING_INPUT)) from error
    if magic != b"GGUF":
        raise Refused(Problem(str(file), "is not a GGUF file", "export one with +export=gguf", Exit.DATA))


def _ints(ids: Sequence[int]) -> list[int]:
    """Plain ints, of a tensor or an array too."""
    return [int(i) for i in ids]
