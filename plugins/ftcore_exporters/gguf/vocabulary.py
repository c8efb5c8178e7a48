"""The vocabulary of a GGUF file: `tokenizer.ggml.*` and the chat template, out of a fast tokenizer of transformers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ftcore.errors import Problem, Refused
from ftcore_exporters.gguf.vocabulary_chat import conversation, turn_end
from ftcore_exporters.gguf.vocabulary_name import fitting_name, strips_as_phi3
from ftcore_exporters.gguf.vocabulary_pre import parts_of, pre_tokenizer
from ftcore_exporters.gguf.vocabulary_scores import is_spaced, scores_of, space_prefix
from ftcore_exporters.gguf.vocabulary_tokens import Tokens, check_added, tokens_of

if TYPE_CHECKING:
    import gguf
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

    from ftcore.gguf_facts import Gguf

NO_MERGE = "<none> <none>"
"""A merge that never applies, as each side is more than a character and nothing makes it: llama.cpp wants a list."""
KINDS = ("bos", "eos", "unk", "sep", "pad", "mask")


def add_vocabulary(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, config: PretrainedConfig, facts: Gguf
) -> None:
    """Write the tokens, how text becomes tokens, the special tokens and the chat templates.

    In llama.cpp a text has the ids that it has in transformers, with three exceptions that are llama.cpp's: it does not
    bring text into Unicode's normal form C (as Qwen's tokenizers do), it only comes near to some expressions
    (`vocabulary_pre.KNOWN`), and it has not all of transformers' ways to put a space in front
    (`vocabulary_scores.space_prefix`).

    :param config: the model's; `vocab_size` of its text part is the rows of the embedding.
    :param facts: the family's; nothing of it is needed here.
    :raises Refused: llama.cpp has no way to split text as this tokenizer does.
    """
    backend = _backend(tokenizer)
    rows = config.get_text_config().vocab_size
    check_added(backend, strips_as_phi3(backend))
    spaced, text = is_spaced(backend), conversation(tokenizer)
    tokens = tokens_of(tokenizer, rows, spaces=spaced)
    if spaced:
        _add_spaced(writer, backend, tokens, text)
    else:
        _add_bytes(writer, backend, tokens)
    _add_special(writer, tokenizer, config.get_text_config(), text)
    if tokenizer.chat_template:
        named = tokenizer.chat_template
        templates = [{"name": n, "template": t} for n, t in named.items()] if isinstance(named, dict) else named
        writer.add_chat_template(templates)
    _fit_name(writer, backend)


def _backend(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """`tokenizer.json`; raises Refused if it is not BPE."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    backend: dict[str, Any] = json.loads(inner.to_str()) if inner is not None else {}
    model = backend.get("model", {})
    kind = model.get("type", type(tokenizer).__name__)
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        kind = "BPE with marks inside or at the end of words"
    if kind != "BPE":
        message = f"tokenizers of the kind {kind} are not written as GGUF"
        raise Refused(Problem("export.gguf", message, "export with +export=[safetensors]"))
    return backend


def _add_bytes(writer: gguf.GGUFWriter, backend: dict[str, Any], tokens: Tokens) -> None:
    """BPE over bytes, as GPT-2's."""
    for part in parts_of(backend.get("normalizer"), "normalizers"):
        if part["type"] != "NFC":
            message = f"llama.cpp does not normalize text as this tokenizer does ({part['type']})"
            raise Refused(Problem("export.gguf", message, "export with +export=[safetensors]"))
    merges = [m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(backend))
    writer.add_token_list(tokens.texts)
    writer.add_token_types(tokens.types)
    writer.add_token_merges(merges or [NO_MERGE])


def _add_spaced(writer: gguf.GGUFWriter, backend: dict[str, Any], tokens: Tokens, text: str | None) -> None:
    """BPE over characters with bytes to fall back on, as SentencePiece's."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens.texts)
    writer.add_token_scores(scores_of(backend["model"], tokens))
    writer.add_token_types(tokens.types)
    writer.add_add_space_prefix(space_prefix(backend, text))


def _add_special(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, config: PretrainedConfig, text: str | None
) -> None:
    """Ids of the tokens with a meaning, and which of them are put around a text.

    :param text: a rendered conversation, if the tokenizer has a template.
    """
    for kind in KINDS:
        index = getattr(tokenizer, f"{kind}_token_id", None)
        if index is None:  # such as Qwen's, whose config names a bos that its tokenizer has not
            index = getattr(config, f"{kind}_token_id", None)
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int) and 0 <= index < config.vocab_size:
            getattr(writer, f"add_{kind}_token_id")(index)
        elif kind == "eos":  # llama.cpp would take a token of its own choice for it: 11, or 2 for SentencePiece
            message = "the tokenizer has no end token, without which llama.cpp ends texts at some other one"
            raise Refused(Problem("export.gguf", message, "set its eos_token"))
    end = None if text is None else turn_end(tokenizer, text)
    if end is not None and end < config.vocab_size:
        writer.add_eot_token_id(end)
    # As the tokenizer does, whatever its settings say.
    plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a", add_special_tokens=True)
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    before, after = whole[:start], whole[start + len(plain) :]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        message = "the tokenizer puts other tokens around a text than bos and eos"
        raise Refused(Problem("export.gguf", message, "export with +export=[safetensors]"))
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))


def _fit_name(writer: gguf.GGUFWriter, backend: dict[str, Any]) -> None:
    """llama.cpp reads from the name whether special tokens take the space after them."""
    for values in writer.kv_data:
        if "general.name" in values:
            values["general.name"].value = fitting_name(values["general.name"].value, backend)
