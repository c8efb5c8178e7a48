"""From the trained model to the folder that `ollama create` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftcore import Checkpoint, Plan
from ftcore import checkpoint as sources
from ftcore.paths import whole_folder
from ftcore.report import note
from ftcore_exporters._ollama.fit import Fit, fit
from ftcore_exporters._ollama.go import go_template
from ftcore_exporters._ollama.known import KNOWN, digest
from ftcore_exporters._ollama.modelfile import modelfile, unwritable
from ftcore_exporters._ollama.parameters import context, sampling, stops
from ftcore_exporters._recorded import origin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TEMPLATE = (
    "No TEMPLATE: the chat template of this model is none that ftcore can tell in Ollama's language. Ollama takes the"
    " nearest one of its own, or hands prompts over as they stand; add a TEMPLATE before `ollama create`."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a folder holds."""

    file: str
    """Name of the GGUF file."""
    template: Template


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """The TEMPLATE of a Modelfile, and what is to be said about it."""

    text: str | None
    whose: str
    fit: Fit | None
    begin: str = ""
    """What it writes in front of all else: the begin-of-text token, unless Ollama puts it there by itself."""
    remarks: tuple[str, ...] = ()


def write_folder(
    checkpoint: Checkpoint, target: Path, kind: str, system: str | None, num_ctx: int | None, license: str | None
) -> Written:
    """Write the GGUF file and the Modelfile, both or none.

    :param kind: type of the GGUF file.
    :param num_ctx: context in tokens; None chooses it.
    :param license: None takes the checkpoint's.
    """
    from ftcore_exporters.gguf.export import write_files

    template = template_of(checkpoint.tokenizer, images=checkpoint.plan.family.vision is not None)
    for remark in template.remarks:
        note(f"ollama: {remark}")
    with whole_folder(target) as folder:
        [(file, _)] = write_files(checkpoint, folder, [kind])
        text = modelfile_of(checkpoint, file.name, template, system, num_ctx, license)
        (folder / "Modelfile").write_text(text, encoding="utf-8", newline="\n")
    return Written(file=file.name, template=template)


def modelfile_of(
    checkpoint: Checkpoint, file: str, template: Template, system: str | None, num_ctx: int | None, license: str | None
) -> str:
    """Text of the Modelfile of a trained model, whose GGUF file has the name `file`."""
    plan, generation = checkpoint.plan, checkpoint.generation()
    layout = template.fit.layout if template.fit else None
    ends = stops(plan, checkpoint.tokenizer, generation, layout)
    return modelfile(
        file,
        comments=["Written by ftcore.", f"Chat template: {template.whose}.", *template.remarks],
        template=template.text,
        system=system or None,
        parameters=[
            *sampling(plan, generation),
            ("num_ctx", context(plan, checkpoint.config(), num_ctx)),
            *(("stop", end) for end in ends),
        ],
        license=license or _license(plan),
    )


def template_of(tokenizer: PreTrainedTokenizerBase, images: bool = False) -> Template:
    """The tokenizer's chat template in Ollama's language; without text where it is not proved to be the same.

    :param images: whether the model reads images.
    """
    if not tokenizer.chat_template:
        return Template(text=None, whose="none, prompts are handed over as they stand", fit=None)
    jinja = tokenizer.get_chat_template()
    found = fit(tokenizer)
    begin = str(tokenizer.bos_token or "")
    adds = bool(begin) and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    begin = begin if found and found.writes_bos and not adds else ""
    text = go_template(found.layout, begin) if found else None
    if found is None or text is None or unwritable(text):
        return Template(text=None, whose="unknown", fit=None, remarks=(NO_TEMPLATE,))
    known = KNOWN.get(digest(jinja))
    whose = known or f"the format of {found.layout.name}, proved by rendering"
    return Template(
        text=text, whose=whose, fit=found, begin=begin, remarks=(*_remarks(found, adds), *_left_out(tokenizer, images))
    )


def _remarks(found: Fit, adds: bool) -> list[str]:
    """What a conversation in Ollama may have otherwise than in training."""
    said = []
    if found.no_system:
        said.append("The chat template takes no system message; one is put in front of the next question.")
    if found.strips:
        roles = " and ".join(found.strips)
        said.append(f"The chat template strips white space around messages of {roles}; Ollama does not.")
    if found.dated:
        said.append("The chat template writes the date of the day; Ollama writes that of this export.")
    if adds and not found.writes_bos:
        said.append("Ollama puts the begin-of-text token in front, which the chat template does not write.")
    return said


def _left_out(tokenizer: PreTrainedTokenizerBase, images: bool) -> list[str]:
    """What the chat template writes and the Modelfile's does not."""
    named = tokenizer.chat_template
    texts = named.values() if isinstance(named, dict) else [named]
    said = ["Tools are not mapped: tools and tool answers are left out."] if any("tool" in t for t in texts) else []
    return [*said, *(["Images are not mapped: the model is given text alone."] if images else [])]


def _license(plan: Plan) -> str | None:
    """Text of the checkpoint's LICENSE file, where it has one and a Modelfile can hold it."""
    source = sources.find(origin(plan), plan.family)
    file = Path(source.name) / "LICENSE"
    if source.kind != "path" or not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace").replace("\f", "")
    return None if unwritable(text) else text
