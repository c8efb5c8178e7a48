"""After an export: does its consumer say what the trained model says?

A consumer's fault ends in a result with a reason and a printed warning, never in an error: the model is trained, and
the artifact is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore.agreement import Agreement, Tolerance, tolerance
from ftcore.consumers import Consumer, Transformers
from ftcore.errors import Refused
from ftcore.probes import texts
from ftcore.report import note, size

if TYPE_CHECKING:
    from ftcore.trained_model import Checkpoint

POSITIONS = 200
"""Logits are compared over as many positions at least, where the texts have so many."""
LONGEST = 192
"""Tokens of one text whose logits are compared."""
CONTEXT = 512
WRITTEN, WRITERS = 16, 2
"""New tokens that are compared, and after how many of the texts."""
WITHOUT_TEXT = ("AutoModelForSpeechSeq2Seq", "AutoModelForTextToWaveform")
"""Models that read or write recordings."""
KINDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""torch's names of a type, and GGUF's."""
SPARE = 1.2
"""What loading a model takes, over the size of its weights."""


def probes(checkpoint: Checkpoint) -> list[str]:
    """Texts to compare on: rendered conversations, or plain texts where the tokenizer has no chat template.

    The run's own prompts come first. The shipped ones alone have more than 200 tokens in any vocabulary.
    """
    return texts(checkpoint.plan, checkpoint.tokenizer)[0]


def read_back(
    checkpoint: Checkpoint, consumer: Consumer, kind: str = "f32", within: Tolerance | None = None
) -> dict[str, Any]:
    """Compare a consumer with the trained model, in the dtype and on the device that the model has.

    :param kind: GGUF's name of the type that the artifact's weights are stored in; says what is tolerated.
    :param within: what is tolerated instead.

    Returns `verified`, `consumer`, `positions`, `max_logit_difference`, `kl` (mean KL(model || consumer), nats),
    `top1_agreement` and `same_prompt_tokens` (parts of 1), `same_greedy_text`, `same_end_token`, `reference_dtype`,
    `seconds`, and `reason` where it is not verified. Of a model that writes no text, `relative_difference` of its
    head's values or hidden states stands in the place of what is known of next tokens.

    It is verified when the prompts' token ids are the same, the tokenizer's end token ends an answer, and the logits
    keep to the tolerance; the greedy text is only reported.
    """
    started = time.perf_counter()
    found: dict[str, Any] = {"verified": False, "consumer": consumer.name}
    try:
        found |= _compared(checkpoint, consumer, kind, within)
    except Refused as refused:
        found["reason"] = refused.problems[0].message
    found["seconds"] = round(time.perf_counter() - started, 3)
    return _warned(found)


def read_back_gguf(
    checkpoint: Checkpoint, file: Path, type_name: str | None = None, lora: Path | None = None
) -> dict[str, Any]:
    """`read_back` by real llama.cpp, on the CPU.

    :param type_name: such as `q8_0`; None takes what the file says.
    :param lora: adapter as GGUF that is applied to `file`.
    """
    from ftcore.llama_cpp import LlamaCpp, installed

    if not installed():
        return {"verified": False, "reason": "llama.cpp is not installed: pip install 'ftcore[llama_cpp]'"}
    try:
        with LlamaCpp(file, lora=lora, context=CONTEXT) as consumer:
            kind = type_name or consumer.kind
            return {"type": kind, **read_back(checkpoint, consumer, kind)}
    except Refused as refused:
        return _warned({"verified": False, "consumer": LlamaCpp.name, "reason": refused.problems[0].message})


def read_back_folder(checkpoint: Checkpoint, folder: Path, within: Tolerance | None = None) -> dict[str, Any]:
    """`read_back` by transformers, which loads the folder beside the trained model, in that model's dtype."""
    found: dict[str, Any] = {"verified": False, "consumer": Transformers.name}
    if checkpoint.plan.family.auto_class in WITHOUT_TEXT:
        return {**found, "reason": "it reads or writes recordings, on which it is not compared"}
    try:
        needed = weight_bytes(checkpoint, folder)
        if (reason := _no_room(checkpoint, needed)) is not None:
            return {**found, "reason": reason}
        consumer = _opened(checkpoint, folder)
    except Exception as error:  # whatever a damaged folder makes the library raise
        reason = f"transformers does not load it: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return _warned({**found, "reason": reason})
    try:
        return read_back(checkpoint, consumer, KINDS.get(_stored_dtype(folder), ""), within)
    finally:
        consumer.close()


def weight_bytes(checkpoint: Checkpoint, folder: Path) -> int:
    """Bytes that the folder's weights take in the trained model's dtype."""
    import torch

    stored = getattr(torch, _stored_dtype(folder), torch.float32)
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return int(files * _dtype(checkpoint.base()).itemsize / stored.itemsize)


def _compared(checkpoint: Checkpoint, consumer: Consumer, kind: str, within: Tolerance | None) -> dict[str, Any]:
    given, rendered = texts(checkpoint.plan, checkpoint.tokenizer)
    reference = Transformers(checkpoint.model, checkpoint.tokenizer, rendered)
    ids = [reference.tokens(text) for text in given]
    same = sum(consumer.tokens(text) == known for text, known in zip(given, ids, strict=True)) / len(ids)
    agreement, longest = Agreement(tokens=reference.writes), min(LONGEST, consumer.longest)
    for known in ids:
        if agreement.positions >= POSITIONS:
            break
        if known:
            agreement.add(reference.logits(known[:longest]), consumer.logits(known[:longest]))
    dtype = str(_dtype(checkpoint.base())).removeprefix("torch.")
    found = {**agreement.numbers(), "same_prompt_tokens": same, "reference_dtype": dtype}
    objections = [agreement.objection(within or tolerance(kind, dtype))]
    if same < 1:
        objections.insert(0, f"{1 - same:.0%} of the prompts have other token ids")
    if reference.writes:
        found["same_greedy_text"] = _same_text(reference, consumer, ids)
        end = checkpoint.tokenizer.eos_token_id
        found["same_end_token"] = end is None or end in consumer.eog
        objections.append(None if found["same_end_token"] else f"the end token {end} does not end an answer there")
    reasons = [objection for objection in objections if objection]
    return {**found, "verified": not reasons, **({"reason": "; ".join(reasons)} if reasons else {})}


def _same_text(reference: Transformers, consumer: Consumer, ids: Sequence[Sequence[int]]) -> bool:
    """Whether both write the same after the first texts, up to what ends an answer for one of them."""
    count = min(WRITTEN, consumer.longest // 2)
    asked = [known[: min(LONGEST, consumer.longest - count)] for known in ids[:WRITERS]]
    ours = [reference.greedy(known, count, consumer.eog) for known in asked]
    return ours == [consumer.greedy(known, count, reference.eog) for known in asked]


def _opened(checkpoint: Checkpoint, folder: Path) -> Transformers:
    """The folder's own model and tokenizer, on the trained model's device and with its kind of attention."""
    import transformers

    model: Any = checkpoint.base()
    auto = getattr(transformers, checkpoint.plan.family.auto_class)
    attention = getattr(model.config, "_attn_implementation", None)
    options = {"attn_implementation": "eager"} if attention == "eager" else {}
    loaded = auto.from_pretrained(folder, dtype=_dtype(model), trust_remote_code=False, **options).to(model.device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return Transformers(loaded, tokenizer, texts(checkpoint.plan, checkpoint.tokenizer)[1])


def _no_room(checkpoint: Checkpoint, needed: int) -> str | None:
    """Why a second model cannot be loaded, or None."""
    import psutil
    import torch

    model: Any = checkpoint.model
    places = [("host", psutil.virtual_memory().available)]
    if model.device.type == "cuda":
        places.append(("GPU", torch.cuda.mem_get_info(model.device)[0]))
    for name, free in places:
        if free < SPARE * needed:
            return f"not read back: {size(needed)} of weights do not fit into {size(free)} of free {name} memory"
    return None


def _dtype(model: Any) -> Any:
    """The dtype in which the model computes, whatever quantized layers store."""
    return model.dtype


def _stored_dtype(folder: Path) -> str:
    """The dtype that the folder's config names; empty where it names none."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")


def _warned(found: dict[str, Any]) -> dict[str, Any]:
    if not found["verified"]:
        note(f"warning: {found['consumer']} does not agree with the trained model: {found['reason']}")
    return found
