"""Core's loading of tokenizer and model, and its patching."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import checkpoint, rope, templates, unsafe_weights, vocabulary
from ftcore.adapter_folder import saved_template
from ftcore.errors import Exit, Problem, Refused
from ftcore.hooks import hookimpl
from ftcore.specs import PatchReport, Phase, Plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


DRAWING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0}
"""Settings for generation that mean nothing without draws, and their usual values."""


@hookimpl(trylast=True)
def ftcore_load_tokenizer(plan: Plan) -> PreTrainedTokenizerBase:
    """AutoTokenizer; a missing pad token becomes the end token, and new tokens are added.

    The chat template is that of `data.template`, the tokenizer's own, or else the family's.
    """
    from ftcore import vision

    assert plan.run.model is not None
    model = plan.run.model
    tokenizer = _own_tokenizer(checkpoint.locate(model, plan.family), model.revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if plan.family.vision and (own := vision.template(checkpoint.locate(model, plan.family), model.revision)):
        tokenizer.chat_template = own
    if plan.run.data and plan.run.data.template:
        tokenizer.chat_template = templates.read(plan.run.data.template)
    elif saved := _saved_template(plan):
        tokenizer.chat_template = saved
    elif not tokenizer.chat_template and plan.family.chat_template:
        tokenizer.chat_template = plan.family.chat_template
    vocabulary.add(tokenizer, model.new_tokens)
    if plan.family.vision:
        vision.attach(tokenizer, checkpoint.locate(model, plan.family), plan.family, model.revision)
    return tokenizer


def _own_tokenizer(place: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises Refused where it needs Python code of the repository."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place, revision=revision, trust_remote_code=False
        )
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        message = f"the tokenizer of {place} needs Python code of its own, and ftcore runs no code of repositories"
        raise Refused(Problem("model", message, "take a checkpoint whose tokenizer transformers brings")) from error
    return tokenizer


def _saved_template(plan: Plan) -> str | dict[str, str] | None:
    """The template that the adapter was trained with: it is saved beside it, and may be another than the base's."""
    path = getattr(plan.run.adapter, "path", None)
    return saved_template(Path(path)) if path else None


@hookimpl(trylast=True)
def ftcore_load_model(plan: Plan, quantization: Any | None) -> PreTrainedModel:
    """The family's auto class. A checkpoint that carries a quantization config is loaded as it is."""
    import torch
    import transformers

    assert plan.run.model is not None
    model = plan.run.model
    options: dict[str, Any] = {"dtype": getattr(torch, plan.dtype), "revision": model.revision}
    if quantization is not None:
        options["quantization_config"] = quantization
    if plan.device.kind == "cuda":
        options["device_map"] = {"": torch.cuda.current_device()}  # straight to the GPU, never whole in host memory
    if model.rope_scaling or model.max_length:
        options["config"] = _stretched(plan)
    else:
        options |= plan.family.settings
    if any("attention_softcap" in role.traits for role in plan.family.roles):
        options["attn_implementation"] = "eager"  # SDPA leaves the cap out, and transformers 5.17 would take it
    auto = getattr(transformers, plan.family.auto_class)
    with _seeded(plan):
        loaded = _loaded(auto, checkpoint.locate(model, plan.family), options)
    vocabulary.grown(plan, loaded)
    loaded.config.use_cache = loaded.config.get_text_config().use_cache = False
    _stay_differentiable(loaded)
    _mean_to_draw(loaded)
    return loaded


def _mean_to_draw(model: Any) -> None:
    """Let settings for drawing say that it is drawn: transformers saves no other once the Trainer has changed one."""
    settings = getattr(model, "generation_config", None)
    if (
        settings is not None
        and not settings.do_sample
        and any(getattr(settings, name, None) not in (None, usual) for name, usual in DRAWING.items())
    ):
        settings.do_sample = True


@contextmanager
def _seeded(plan: Plan) -> Iterator[None]:
    """What a checkpoint lacks, such as a head that is new, begins by the run's seed; other draws go on as before."""
    import torch

    gpus = [torch.cuda.current_device()] if plan.device.kind == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.manual_seed(plan.run.trainer.seed if plan.run.trainer else 0)
        yield


def _loaded(auto: Any, place: str, options: dict[str, Any]) -> PreTrainedModel:
    """The model from safetensors. Raises Refused where the hub has its weights as a pickle alone."""
    try:
        # Without the word, transformers would fall back on a pickle.
        loaded: PreTrainedModel = auto.from_pretrained(place, trust_remote_code=False, use_safetensors=True, **options)
    except OSError as error:
        # What transformers says of a file that is not there; a full disk or no connection may name such a file as well.
        if error.errno is not None or "file named model.safetensors" not in str(error):
            raise
        message = f"{place} has no weights in safetensors"
        raise Refused(Problem("model", message, unsafe_weights.ADVICE, Exit.DATA)) from error
    return loaded


def _stretched(plan: Plan) -> Any:
    """The checkpoint's config with the context length and the RoPE scaling that were asked for."""
    from transformers import AutoConfig

    assert plan.run.model is not None
    model = plan.run.model
    place = checkpoint.locate(model, plan.family)
    config = AutoConfig.from_pretrained(place, revision=model.revision, trust_remote_code=False, **plan.family.settings)
    text = config.get_text_config()
    if (scaled := rope.stretched(text, model)) is not None:
        text.rope_parameters = scaled
    if model.max_length:
        text.max_position_embeddings = model.max_length
    return config


def _stay_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes' 4-bit layers from repacking their weights in the first evaluation on a CPU with AVX512-BF16.

    The packed form (bitsandbytes 0.50) has no gradient, so that training after an evaluation would silently leave
    out every gradient that passes through such a layer.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


@hookimpl(trylast=True)
def ftcore_patch_model(plan: Plan, model: torch.nn.Module, phase: Phase) -> PatchReport:
    """Roles of the family x kernels of the selected sets, on instances."""
    from ftcore.patching import patch

    roles = [role for role in plan.family.roles if not (plan.trainer and role.name in plan.trainer.fuses)]
    return patch(model, roles, plan.kernels, plan.device, phase, plan.run.patching.prefer, plan)


@hookimpl(trylast=True)
def ftcore_quantize_model(model: PreTrainedModel) -> PreTrainedModel:
    """Nothing to do after loading."""
    return model
