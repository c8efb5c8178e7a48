"""Ollama's folder: the chat template in Go's language is the model's own, and the Modelfile is one.

Ollama itself cannot be installed here: Modelfiles are read by a parser written after Ollama's, and templates run by a
small engine, which is checked against Go's own where Go is installed.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import go_template as go
import pytest
from modelfile_parser import parse

from ftcore import checkpoint as sources
from ftcore.bytes_tokenizer import CHATML, byte_tokenizer
from ftcore.errors import Exit
from ftcore.templates import read
from ftcore.testing import ExportContract, runs
from ftcore_exporters._ollama.export import NO_TEMPLATE, Template, modelfile_of, template_of
from ftcore_exporters._ollama.fit import OPEN, PROBES, Jinja
from ftcore_exporters._ollama.modelfile import quoted, unwritable
from ftcore_exporters.ollama import NAME

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ftcore.specs import Artifact, Loaded
    from ftcore_exporters._ollama.layouts import Conversation

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Case:
    """A chat template with the tokens around it."""

    name: str
    """Name of a template that `data.template` takes."""
    whose: str
    model: str
    begin: str | None = None
    end: str = "<|im_end|>"
    added: tuple[str, ...] = ()


LLAMA = ("<|begin_of_text|>", "<|eot_id|>", ("<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>"))
GEMMA = ("<bos>", "<eos>", ("<bos>", "<eos>", "<end_of_turn>"))
SPACED = ("<s>", "</s>", ("<s>", "</s>"))
PHI = ("<s>", "<|endoftext|>", ("<s>", "<|endoftext|>", "<|end|>"))
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
CASES = (
    Case("chatml", "ftcore's chatml", "qwen2"),
    Case("smollm2", "ftcore's smollm2", "smollm2", "<|im_start|>"),
    Case("qwen2_5", "Qwen2.5", "qwen2"),
    Case("qwen3", "Qwen3", "qwen3"),
    Case("llama3", "Llama 3", "llama", *LLAMA),
    Case("llama3_1", "Llama 3.1", "llama", *LLAMA),
    Case("llama3_2", "Llama 3.2", "llama", *LLAMA),
    Case("gemma", "Gemma and Gemma 2", "gemma2", *GEMMA),
    Case("gemma3", "Gemma 3", "gemma3", *GEMMA),
    Case("phi3", "Phi-3", "phi3", *PHI),
    Case("phi3_5", "Phi-3.5", "phi3", *PHI),
    Case("phi4", "ftcore's phi4", "phi3"),
    Case("mistral", "ftcore's mistral", "mistral", *SPACED),
    Case("alpaca", "ftcore's alpaca", "llama", *SPACED),
    Case("vicuna", "ftcore's vicuna", "llama", *SPACED),
    Case("deepseek_r1_distill", "DeepSeek-R1 distillations", "llama", *DEEPSEEK, DEEPSEEK),
    Case("lfm2", "LFM2", "lfm2", "<|startoftext|>", "<|im_end|>", ("<|startoftext|>",)),
)
TRAINED = ("qwen3_training", "qwen2_5_training", "llama3_training", "gemma3_training", "deepseekv3_training")
"""Templates that rows are trained with: none is published with a checkpoint, so their format is proved alone."""
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# As llama.cpp's tests have them (tests/test-chat-template.cpp, MIT).
PHI4 = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}{{'<|im_start|>system<|im_sep|>' + "
    "message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + "
    "message['content'] + '<|im_end|><|im_start|>assistant<|im_sep|>'}}{% elif (message['role'] == 'assistant') %}"
    "{{message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
)
MISTRAL_V7 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "'[/INST]' }}{% elif message['role'] == 'system' %}{{ '[SYSTEM_PROMPT] ' + message['content'] + "
    "'[/SYSTEM_PROMPT]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user, system and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL_V1 = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == "
    "'assistant' %}{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are "
    "supported!') }}{% endif %}{% endfor %}"
)
# Shortened: where Mistral v0.2, v0.3 and Nemo put the system's words, and which spaces they write.
MISTRALS = {
    name: "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}{% if message['role'] == "
    "'system' %}{% set ns.system = message['content'] + '\n\n' %}{% elif message['role'] == 'user' %}{{ '"
    + opens
    + "' }}{% if "
    + place
    + " %}{{ ns.system }}{% set ns.system = '' %}{% endif %}{{ message['content'] + '"
    + closes
    + "' }}{% else %}{{ '"
    + before
    + "' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    for name, opens, place, closes, before in (
        ("Mistral v0.2", " [INST] ", "true", " [/INST]", " "),
        ("Mistral v0.3", "[INST] ", "loop.last", "[/INST]", " "),
        ("Mistral Nemo", "[INST]", "loop.last", "[/INST]", ""),
    )
}


def tokenizer_of(template: str, begin: str | None = "<s>", end: str = "</s>", added: Any = ()) -> Any:
    tokenizer = byte_tokenizer(template, [token for token in (*added,) if token not in ("<|im_end|>",)])
    tokenizer.add_special_tokens({"eos_token": end, **({"bos_token": begin} if begin else {})})
    return tokenizer


def of_case(case: Case) -> Any:
    return tokenizer_of(read(case.name), case.begin, case.end, case.added)


def in_ollama(template: Template, talk: Conversation, thinks: bool | None = None, **last: str) -> str:
    """What Ollama makes of a conversation: `.System` is joined, `.Messages` has the system messages too."""
    assert template.text is not None
    messages = [{"Role": role, "Content": words, "Thinking": ""} for role, words in talk]
    messages[-1] |= last
    system = "\n\n".join(words for role, words in talk if role == "system")
    values = {"System": system, "Think": bool(thinks), "IsThinkSet": thinks is not None}
    return go.run(template.text, Messages=messages, **values)


def same_text(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Ollama's text of all probes is the tokenizer's; the begin-of-text token is left out where Ollama puts it."""
    assert template.fit is not None
    jinja, adds = Jinja(tokenizer, strips_bos=False), tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    begin = str(tokenizer.bos_token) if adds and template.fit.writes_bos else ""
    for talk in (*PROBES, *OPEN):
        if talk[0][0] != "system" or not template.fit.no_system:
            said, wanted = begin + in_ollama(template, talk), jinja(talk, ask=talk in PROBES)
            assert wanted is not None
            if talk in PROBES:
                assert said == wanted
            else:
                assert wanted.startswith(said)
                assert said.endswith(talk[-1][1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_known_templates_are_the_same_in_ollama(case: Case) -> None:
    tokenizer = of_case(case)
    template = template_of(tokenizer)
    assert template.whose == case.whose
    same_text(tokenizer, template)


@pytest.mark.parametrize("name", TRAINED)
def test_templates_for_training_are_proved(name: str) -> None:
    tokenizer = tokenizer_of(read(name))
    template = template_of(tokenizer)
    assert "proved by rendering" in template.whose
    same_text(tokenizer, template)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("{# hello #}" + CHATML, "ChatML"),
        (ZEPHYR, "Zephyr"),
        (PHI4, "Phi-4"),
        (MISTRAL_V1, "Mistral v0.1"),
        (MISTRAL_V7, "Mistral v7"),
        *((text, name) for name, text in MISTRALS.items()),
    ],
)
def test_other_texts_of_a_format_are_proved(text: str, name: str) -> None:
    tokenizer = tokenizer_of(text)
    template = template_of(tokenizer)
    assert template.fit is not None
    assert template.fit.layout.name == name
    same_text(tokenizer, template)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden_modelfiles(case: Case) -> None:
    _, plan = runs.prepared([f"+model={case.model}", "model.tiny=true"])
    assert plan.run.model is not None
    real = replace(plan.run.model, tiny=False, shape=next(iter(plan.family.shapes)))
    config = sources.config_of(real, plan.family)
    tokenizer = of_case(case)
    checkpoint: Any = SimpleNamespace(plan=plan, tokenizer=tokenizer, config=lambda: config, generation=lambda: None)
    text = modelfile_of(checkpoint, "model.gguf", template_of(tokenizer), "Be brief.", None, None)
    wanted = (GOLDEN / f"{case.name}.Modelfile").read_text(encoding="utf-8")
    assert text == wanted.replace("@TODAY@", time.strftime("%d %b %Y"))
    values = parse(text)
    assert ("system", "Be brief.") in values
    assert ("template", template_of(tokenizer).text) in values


def test_thinking_is_switched_as_the_template_does() -> None:
    tokenizer = tokenizer_of(read("qwen3"), None)
    template, talk = template_of(tokenizer), PROBES[0]
    assert in_ollama(template, talk, thinks=False) == Jinja(tokenizer)(talk, enable_thinking=False)
    assert in_ollama(template, talk, thinks=True) == Jinja(tokenizer)(talk)
    thought = in_ollama(template, OPEN[0], Thinking="Hm.")
    assert (Jinja(tokenizer)(OPEN[0], ask=False, thoughts="Hm.") or "").startswith(thought)
    assert "<think>\nHm.\n</think>\n\n" in thought


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (CHATML.replace("<|im_end|>", "<|im_end|>{{ loop.index }}"), "turns are numbered"),
        (CHATML.replace("message['content']", "message['content'] | upper"), "words are changed"),
        (CHATML.replace("message['content']", "message['content'] | replace(' ', '')"), "spaces are lost"),
        (CHATML.replace("message['role'] }}", "message['role'] | replace('user', 'human') }}"), "another role"),
        ("{{ messages[-1]['content'] }}", "no turns"),
        ("{% if messages | length > 4 %}{{ raise_exception('too long') }}{% endif %}" + CHATML, "refuses"),
        (CHATML.replace("<|im_start|>{{", "\u200b<|im_start|>{{"), "a Modelfile cannot hold it"),
    ],
)
def test_an_unknown_template_is_never_guessed(changed: str, why: str) -> None:
    assert changed != CHATML, why
    template = template_of(tokenizer_of(changed))
    assert (template.text, template.fit, template.remarks) == (None, None, (NO_TEMPLATE,))


def test_what_differs_is_said() -> None:
    said = {case.name: " ".join(template_of(of_case(case)).remarks) for case in CASES}
    assert said["chatml"] == said["phi3"] == ""
    assert said["qwen2_5"] == TOOLS
    assert "takes no system message" in said["gemma"]
    assert "strips white space around messages of user and assistant" in said["gemma3"]
    assert "date of the day" in said["llama3_2"]
    assert "date" not in said["llama3_1"]


def test_begin_of_text_is_written_where_ollama_does_not_put_it() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = of_case(CASES[4])
    assert tokenizer.bos_token == "<|begin_of_text|>"
    assert str(template_of(tokenizer).text).startswith("<|begin_of_text|>{{")
    numbers = [("<|begin_of_text|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|begin_of_text|> $A", None, numbers)
    assert str(template_of(tokenizer).text).startswith("{{ range")
    tokenizer.chat_template = CHATML
    assert "which the chat template does not write" in " ".join(template_of(tokenizer).remarks)


def test_a_base_model_has_no_template_and_no_warning() -> None:
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = None
    assert template_of(tokenizer).remarks == ()


VALUES = (
    "a",
    " a ",
    '"',
    '""',
    '"a" b',
    'say "a"',
    '"""',
    'a """ b',
    "a\nb",
    '\n"\n',
    "\t",
    "{{ .Content }}",
    "# a",
    "",
)


@pytest.mark.parametrize("value", VALUES)
def test_values_are_read_back_as_they_were(value: str) -> None:
    assert unwritable(value) is None
    text = f"FROM ./a.gguf\nSYSTEM {quoted(value)}\nPARAMETER stop {quoted(value)}\n"
    assert parse(text) == [("from", "./a.gguf"), ("system", value), ("stop", value)]


def test_random_values_are_read_back_or_refused() -> None:
    chance, refused = random.Random(0), 0
    for _ in range(3000):
        value = "".join(chance.choice('"""\n\r\t ab#{}\u200b') for _ in range(chance.randrange(12)))
        if unwritable(value):
            refused += 1
            with pytest.raises(ValueError, match=r"\"\"\"|U\+200B"):
                quoted(value)
        else:
            assert parse(f"FROM ./a.gguf\nSYSTEM {quoted(value)}\n")[1] == ("system", value)
    assert 100 < refused < 2900


@pytest.mark.parametrize(
    "bad", ["FROM\n", "SYSTEM a\n", 'FROM a\nSYSTEM "a\n', "FROM a\nBUILD x\n", "FROM a\nPARAMETER \n"]
)
def test_the_tests_own_parser_is_strict(bad: str) -> None:
    with pytest.raises(ValueError, match=r"FROM|closed|instruction|parameter"):
        parse(bad)


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("export.ollama.type=q9", "export.ollama.type"),
        ("export.ollama.type=Q8_0", "export.ollama.type"),
        ("export.ollama.model_name=../evil", "export.ollama.model_name"),
        ("export.ollama.model_name=a..b", "export.ollama.model_name"),
        ("export.ollama.model_name='a\\b'", "export.ollama.model_name"),
        ("export.ollama.model_name=/a", "export.ollama.model_name"),
        ("export.ollama.model_name='a; rm -rf b'", "export.ollama.model_name"),
        ("export.ollama.num_ctx=0", "export.ollama.num_ctx"),
        ('export.ollama.system="a\u200bb"', "export.ollama.system"),
        ('sampling.system="a\u200bb"', "sampling.system"),
    ],
)
def test_mistakes_are_refused_in_the_plan(setting: str, key: str) -> None:
    problems = runs.refusals([*runs.TINY, "+export=[ollama]", setting])
    assert [(p.key, p.code) for p in problems] == [(key, Exit.CONFIG)]
    assert problems[0].fix


def test_families_without_gguf_are_refused() -> None:
    problems = runs.refusals(["+model=bert", "model.tiny=true", "+trainer=classify", "+export=[ollama]"])
    assert "export.ollama" in [p.key for p in problems]


@pytest.mark.parametrize("name", ["a", "smollm2-sft-001", "me/my-model:q8", "a.b_c"])
def test_names_that_ollama_takes(name: str) -> None:
    assert NAME.fullmatch(name)


class TestOllama(ExportContract):
    plugin = "export/ollama"
    base = runs.TINY
    settings = ("export.ollama.type=f32", "export.ollama.verify=false")

    def reload(self, artifact: Artifact, loaded: Loaded) -> Any:
        from transformers import AutoModelForCausalLM, GgufConfig

        file = next(artifact.path.glob("*.gguf")).name
        plain = GgufConfig(dequantize=True)
        return AutoModelForCausalLM.from_pretrained(
            artifact.path, gguf_file=file, dtype="float32", quantization_config=plain
        )


def test_the_folder_is_what_ollama_create_reads(tmp_path: Path) -> None:
    from gguf import GGUFReader

    from ftcore import pipeline

    settings = [
        "export.ollama.type=f32",
        "export.ollama.model_name=me/tiny",
        "export.ollama.num_ctx=300",
        'export.ollama.system="Say \\"no\\"."',
    ]
    run = f"output_dir='{tmp_path / 'run'}'"
    hooks, plan = runs.prepared([*runs.TINY, "+export=[ollama]", *settings, run])
    [artifact] = pipeline.export(hooks, pipeline.load(hooks, plan))
    values = parse((artifact.path / "Modelfile").read_text(encoding="utf-8"))
    found = dict(values)
    assert found["system"] == 'Say "no".'
    assert found["num_ctx"] == "300"
    assert [value for name, value in values if name == "stop"] == ["<|im_end|>"]
    file = artifact.path / found["from"]
    assert sorted(path.name for path in artifact.path.iterdir()) == sorted(["Modelfile", file.name])
    keys = GGUFReader(file).fields
    assert keys["tokenizer.ggml.add_bos_token"].contents() is False
    assert found["template"].startswith("{{ range")
    assert artifact.note == f"ollama create me/tiny -f {artifact.path / 'Modelfile'}"
    assert artifact.checks["template"] == "ftcore's tiny models"
    assert artifact.checks["template_prompts"] == 1.0
    assert artifact.checks["verified"] is True, artifact.checks


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcore import pipeline
    from ftcore_exporters._ollama import export

    def fails(*_: Any) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(export, "modelfile_of", fails)
    run = tmp_path / "run"
    settings = ["+model=qwen2", "model.tiny=true", "+export=[ollama]"]
    hooks, plan = runs.prepared([*settings, f"output_dir='{run}'"])
    with pytest.raises(OSError, match="disk full"):
        pipeline.export(hooks, pipeline.load(hooks, plan))
    assert [path for path in run.rglob("*") if path.is_file()] == []
    assert not (run / "export" / "ollama").exists()


TOOLS = "Tools are not mapped: tools and tool answers are left out."


def test_tools_and_images_that_ollama_is_not_told_of_are_said() -> None:
    with_tools = CHATML + "{% if tools %}{{ tools | tojson }}{% endif %}"
    assert template_of(tokenizer_of(CHATML)).remarks == ()
    assert template_of(tokenizer_of(with_tools)).remarks == (TOOLS,)
    named = tokenizer_of(CHATML)
    named.chat_template = {"default": CHATML, "tool_use": with_tools}
    assert template_of(named).remarks == (TOOLS,)
    assert template_of(tokenizer_of(CHATML), images=True).remarks[-1].startswith("Images are not mapped")


def test_an_unknown_template_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ftcore import pipeline

    own = tmp_path / "own.jinja"
    own.write_text(CHATML.replace("message['content']", "message['content'] | upper"), encoding="utf-8")
    run = f"output_dir='{tmp_path / 'run'}'"
    template = f"data.template='{own}'"
    hooks, plan = runs.prepared(["+model=qwen2", "model.tiny=true", "+export=[ollama]", template, run])
    [artifact] = pipeline.export(hooks, pipeline.load(hooks, plan))
    text = (artifact.path / "Modelfile").read_text(encoding="utf-8")
    assert "template" not in dict(parse(text))
    assert f"# {NO_TEMPLATE}\n" in text
    assert NO_TEMPLATE in capsys.readouterr().out
    assert artifact.checks["template"] == "unknown"


GO = """
package main
import ("encoding/json"; "os"; "strings"; "text/template")
type Message struct { Role, Content, Thinking string }
type Case struct { Template string; Messages []*Message; System string; Think, IsThinkSet bool }
func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	out := []string{}
	for _, c := range cases {
		var b strings.Builder
		t := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
		values := map[string]any{"Messages": c.Messages, "System": c.System}
		values["Think"], values["IsThinkSet"] = c.Think, c.IsThinkSet
		if err := t.Execute(&b, values); err != nil { panic(err) }
		out = append(out, b.String())
	}
	json.NewEncoder(os.Stdout).Encode(out)
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_go_itself_agrees(tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(GO, encoding="utf-8")
    asked, wanted = [], []
    for case in CASES:
        template = template_of(of_case(case))
        for thinks in (None, False, True):
            for talk in (*PROBES, *OPEN):
                messages = [{"Role": role, "Content": words} for role, words in talk]
                think = {"Think": bool(thinks), "IsThinkSet": thinks is not None}
                asked.append({"Template": template.text, "Messages": messages, **think})
                wanted.append(in_ollama(template, talk, thinks))
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "GO111MODULE": "off", "CGO_ENABLED": "0"}
    go_binary = shutil.which("go")
    assert go_binary is not None
    done = subprocess.run(
        [go_binary, "run", str(tmp_path / "main.go")],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == wanted
    assert len(wanted) == len(CASES) * 3 * 10
