"""Plugins with one mistake each: the contract finds that mistake, and nothing else is wrong with them."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

pytestmark = pytest.mark.slow

HEAD = '''"""A plugin with a mistake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ftcore
from ftcore import Kernel, ModelFamily, Role, bind, hookimpl

'''

LLAMA = """
from ftcore_models.llama import ROLES
from ftcore_models._llama_like import LORA_TARGETS, TINY

TARGETS = LORA_TARGETS

@hookimpl
def ftcore_model_family():
    return ModelFamily(model_types=("llama",), roles=ROLES, lora_targets=TARGETS, tiny=TINY, chat_template=TEMPLATE)

TEMPLATE = None
"""
LFM2 = """
from dataclasses import replace
from ftcore_models import lfm2

@hookimpl
def ftcore_model_family():
    return replace(lfm2.ftcore_model_family(), REPLACED)
"""
REWARD = """
@hookimpl
def ftcore_rewards(plan):
    def length(completions, **_):
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return VALUES
    return [length]
"""
EXPORT = """
@hookimpl
def ftcore_export(plan, checkpoint):
    target = plan.output_dir / "weights.bin"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"weights")
    BODY
    return [ftcore.Artifact.of("weights", target)]
"""
GENERATOR = """
from ftcore_generators.transformers import TransformersGenerator

@hookimpl
def ftcore_make_generator(plan, model, tokenizer):
    return Mistaken(model, tokenizer, 8)

class Mistaken(TransformersGenerator):
    def generate(self, prompt_ids, sampling):
        BODY
"""
DATA = """
from ftcore_data import text

@hookimpl
def ftcore_data_format():
    from dataclasses import replace
    return replace(text.ftcore_data_format(), check=f"{__name__}:check", convert=f"{__name__}:convert")

def check(row):
    return text.check(row)

def convert(row):
    return text.convert(row)
"""
TRAINER = '''
from dataclasses import replace
from ftcore_trainers import sft

@dataclass
class Config(sft.Config):
    """The same settings."""

@hookimpl
def ftcore_trainer_spec():
    return sft.ftcore_trainer_spec()

@hookimpl
def ftcore_make_trainer(plan, model, tokenizer, dataset, collator, callbacks, optimizer):
    BODY
    return sft.ftcore_make_trainer(plan, model, tokenizer, dataset, collator, callbacks, optimizer)
'''
KERNELS = """
@hookimpl
def ftcore_kernels():
    return [Kernel("mistaken.rms_norm", "rms_norm", install=f"{__name__}:install")]

def install(module, role):
    bind(module, forward)

def forward(module, hidden_states):
    from torch.nn.functional import rms_norm
    return rms_norm(hidden_states, hidden_states.shape[-1:], module.weight, EPS)
"""
ADAPTER = """
@hookimpl
def ftcore_adapt_model(plan, model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    BODY
    return model
"""
QUANTIZER = """
import ftcore_quantizers.bnb_nf4 as nf4

@hookimpl
def ftcore_quantization_config(plan):
    from transformers import BitsAndBytesConfig
    return BODY
"""
EXTRA = """
@hookimpl
def ftcore_callbacks(plan):
    from transformers import TrainerCallback

    class Mistaken(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            BODY

    return [Mistaken()]
"""


TRAINED = {
    "test_three_finite_steps",
    "test_loss_falls",
    "test_trains_what_is_trainable_and_nothing_else",
    "test_the_plan_decides_dtype_and_recomputation",
    "test_run_is_recorded",
}
"""The tests that look at one run: they all fail when there is none."""


@dataclass(frozen=True)
class Mistake:
    """A plugin, and the tests of its contract that fail."""

    kind: str
    source: str
    found_by: set[str]


MISTAKES = {
    "imports_torch": Mistake("model", LLAMA + "import torch\n", {"test_import_is_light_and_changes_nothing"}),
    "sets_environment": Mistake(
        "model", LLAMA + "import os\nos.environ['TOKENIZERS'] = 'x'\n", {"test_import_is_light_and_changes_nothing"}
    ),
    "field_without_help": Mistake(
        "reward",
        REWARD.replace("VALUES", "[plan.config(Config).weight * len(t) for t in texts]")
        + '@dataclass\nclass Config(ftcore.RewardConfig):\n    """Settings."""\n\n    target: int = 4\n',
        {"test_config_is_typed_and_documented"},
    ),
    "requires_a_list": Mistake("model", LLAMA + "REQUIRES = ['torch']\n", {"test_requirements_can_be_read"}),
    "selects_nothing": Mistake(
        "trainer",
        TRAINER.replace("BODY", "") + "SELECTS = {'data': 'nonsense'}\n",
        {"test_selects_what_is_installed", *TRAINED},
    ),
    "hook_with_a_typing_error": Mistake(
        "trainer",
        TRAINER.replace("BODY", "") + "@hookimpl\ndef ftcore_calbacks(plan):\n    return []\n",
        {"test_hooks_match_their_specs", *TRAINED},
    ),
    "hook_that_pushes_forward": Mistake(
        "reward",
        REWARD.replace("VALUES", "[plan.config(ftcore.RewardConfig).weight * len(t) for t in texts]").replace(
            "@hookimpl", "@hookimpl(tryfirst=True)"
        ),
        {"test_no_hook_pushes_itself_forward"},
    ),
    "wrong_role": Mistake(
        "model",
        LLAMA.replace("roles=ROLES", "roles=(*ROLES, Role('mlp', 'LlamaFeedForward'))"),
        {"test_every_role_is_in_the_model"},
    ),
    "wrong_traits": Mistake(
        "model",
        LLAMA.replace("roles=ROLES", "roles=(Role('rms_norm', 'LlamaRMSNorm', frozenset({'unit_offset'})),)"),
        {"test_kernels_keep_loss_and_gradients"},
    ),
    "wrong_targets": Mistake(
        "model",
        LLAMA.replace("TARGETS = LORA_TARGETS", "TARGETS = ('q_proj', 'w1')"),
        {"test_lora_targets_are_in_the_model"},
    ),
    "wrong_parameters": Mistake(
        "model",
        LLAMA.replace("lora_targets=TARGETS", "lora_targets=TARGETS[:4], lora_parameters=('gate_proj.weight', 'w1')"),
        {"test_lora_parameters_are_in_the_model"},
    ),
    "packs_what_leaks": Mistake(
        "model",
        LFM2.replace("REPLACED", "limits=()"),
        {"test_packed_is_unpacked"},
    ),
    "says_less_than_is_claimed": Mistake(
        "model",
        LLAMA
        + """
@hookimpl(wrapper=True)
def ftcore_patch_model(plan, model, phase):
    report = yield
    kept = tuple(claim for claim in report.claims if claim.role != "lm_head")
    return ftcore.specs.PatchReport(claims=kept, skipped=report.skipped)
""",
        {"test_coverage_is_what_is_claimed"},
    ),
    "template_without_end": Mistake(
        "model",
        LLAMA.replace(
            "TEMPLATE = None",
            "TEMPLATE = \"{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\\n{% endfor %}"
            '{% if add_generation_prompt %}assistant: {% endif %}"',
        ),
        {"test_chat_template_trains_the_answers_and_nothing_else"},
    ),
    "patches_the_class": Mistake(
        "model",
        LLAMA
        + """
@hookimpl(wrapper=True)
def ftcore_patch_model(plan, model, phase):
    report = yield
    for module in model.modules():
        if type(module).__name__ == "LlamaMLP" and plan.kernels:
            type(module).forward = lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return report
""",
        {"test_a_second_model_stays_as_it_was"},
    ),
    "reward_too_short": Mistake(
        "reward", REWARD.replace("VALUES", "[plan.config(ftcore.RewardConfig).weight]"), {"test_one_finite_number_each"}
    ),
    "reward_not_finite": Mistake(
        "reward",
        REWARD.replace("VALUES", "[float('inf') * plan.config(ftcore.RewardConfig).weight for _ in texts]"),
        {"test_one_finite_number_each"},
    ),
    "reward_without_weight": Mistake(
        "reward", REWARD.replace("VALUES", "[1.0 + len(t) for t in texts]"), {"test_weight_is_a_factor"}
    ),
    "export_changes_weights": Mistake(
        "export",
        EXPORT.replace("BODY", "checkpoint.model.half()"),
        {"test_model_is_left_as_it_was"},
    ),
    "export_leaves_rubbish": Mistake(
        "export", EXPORT.replace("BODY", "(target.parent / '.work').touch()"), {"test_artifacts_are_there"}
    ),
    "export_numbers_its_files": Mistake(
        "export",
        EXPORT.replace("BODY", "target = target.rename(target.with_suffix(f'.{len(list(target.parent.iterdir()))}'))"),
        {"test_writing_twice_replaces"},
    ),
    "generator_cuts_short": Mistake(
        "generator",
        GENERATOR.replace(
            "BODY", "return ftcore.Completions(ids=[r[:3] for r in super().generate(prompt_ids, sampling).ids])"
        ),
        {"test_completions_end_by_the_rules", "test_a_stream_is_the_completion_in_pieces"},
    ),
    "generator_stutters": Mistake(
        "generator",
        GENERATOR.replace(
            "BODY",
            "return super().generate(prompt_ids, sampling)\n\n"
            "    def stream(self, prompt_ids, sampling, show):\n"
            "        return super().stream(prompt_ids, sampling, lambda new: show(new * 2))",
        ),
        {"test_a_stream_is_the_completion_in_pieces"},
    ),
    "generator_does_not_listen": Mistake(
        "generator",
        GENERATOR.replace(
            "BODY",
            "return super().generate(prompt_ids, sampling)\n\n"
            "    def conversation(self):\n"
            "        return Talk(self)\n\n"
            "class Talk:\n"
            "    def __init__(self, generator):\n"
            "        self.generator, self.first = generator, None\n\n"
            "    def stream(self, prompt_ids, sampling, show):\n"
            "        self.first = self.first or prompt_ids\n"
            "        return self.generator.stream(self.first, sampling, show)",
        ),
        {"test_a_conversation_streams_the_same"},
    ),
    "generator_mixes_batches_up": Mistake(
        "generator",
        GENERATOR.replace(
            "BODY",
            "ids = super().generate(prompt_ids, sampling).ids\n"
            "        return ftcore.Completions(ids=ids[self.at_once :] + ids[: self.at_once])",
        ),
        {"test_any_number_of_prompts"},
    ),
    "generator_leaves_eval_mode": Mistake(
        "generator",
        GENERATOR.replace("BODY", "self._model.eval()\n        return super().generate(prompt_ids, sampling)"),
        {"test_model_is_left_as_it_was"},
    ),
    "generator_remembers": Mistake(
        "generator",
        GENERATOR.replace(
            "BODY",
            "known = self.__dict__.setdefault('known', {})\n"
            "        key = str(prompt_ids)\n"
            "        known[key] = known.get(key) or super().generate(prompt_ids, sampling)\n"
            "        return known[key]",
        ),
        {"test_new_weights_are_used"},
    ),
    "check_takes_anything": Mistake(
        "data", DATA.replace("return text.check(row)", "return None"), {"test_bad_rows_are_refused"}
    ),
    "convert_forgets_the_column": Mistake(
        "data",
        DATA.replace("return text.convert(row)", "return {'words': row['text']}"),
        {"test_rows_convert_to_the_columns_of_the_shape", "test_sample_goes_through_a_run"},
    ),
    "trainer_recomputes": Mistake(
        "trainer",
        TRAINER.replace("BODY", "model.gradient_checkpointing_enable()"),
        {"test_the_plan_decides_dtype_and_recomputation"},
    ),
    "trainer_trains_frozen_weights": Mistake(
        "trainer",
        TRAINER.replace("BODY", "next(p for p in model.parameters() if not p.requires_grad).data.mul_(1.01)"),
        {"test_trains_what_is_trainable_and_nothing_else"},
    ),
    "trainer_does_not_learn": Mistake(
        "trainer",
        TRAINER.replace(
            "BODY",
            "plan = replace(plan, run=replace(plan.run, trainer=replace(plan.config(Config), learning_rate=0.0)))",
        ),
        {"test_loss_falls", "test_trains_what_is_trainable_and_nothing_else"},
    ),
    "kernel_with_its_own_eps": Mistake("kernels", KERNELS.replace("EPS", "1e-3"), {"test_maths_stays_the_same"}),
    "kernel_that_is_not_there": Mistake(
        "kernels",
        KERNELS.replace("EPS", "1e-6").replace("{__name__}:install", "{__name__}:instal"),
        {"test_kernels_are_named_and_can_be_installed", "test_maths_stays_the_same"},
    ),
    "adapter_that_starts_elsewhere": Mistake(
        "adapter",
        ADAPTER.replace("BODY", "model.model.norm.weight.data.mul_(2)"),
        {"test_starts_where_the_model_is"} | {"test_saved_and_loaded_says_the_same"},
    ),
    "adapter_without_weights": Mistake(
        "adapter",
        ADAPTER.replace("BODY", "model.requires_grad_(False)"),
        {"test_a_step_trains_the_adapter_and_nothing_else"},
    ),
    "quantizer_that_does_nothing": Mistake(
        "quantizer",
        QUANTIZER.replace("BODY", "None"),
        {"test_weights_are_smaller_and_say_nearly_the_same"},
    ),
    "extra_that_meddles": Mistake(
        "extra",
        EXTRA.replace("BODY", "[p.data.mul_(1.5) for p in model.parameters() if p.requires_grad]"),
        {"test_run_goes_through"},
    ),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, set[str]]]:
    """Plugin to outcome to the tests that ended so; all in one process, since importing torch takes seconds."""
    folder = tmp_path_factory.mktemp("mistakes")
    points: list[str] = []
    tests = ["from ftcore.testing import *", "pytest_plugins = ['ftcore.testing']"]
    for name, mistake in MISTAKES.items():
        (folder / f"mistaken_{name}.py").write_text(HEAD + mistake.source)
        points += [f"[ftcore.{mistake.kind}]", f"{name} = mistaken_{name}"]
        tests += [f"class Test_{name}({mistake.kind.capitalize()}Contract):", f"    plugin = '{mistake.kind}/{name}'"]
    info = folder / "mistaken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mistaken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(_grouped(points))
    (folder / "test_mistakes.py").write_text("\n".join(tests))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rA",
            "-p",
            "no:cacheprovider",
            "-k",
            "not triton",
            f"--rootdir={folder}",
            "test_mistakes.py",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
    )
    outcomes: dict[str, dict[str, set[str]]] = {
        name: {"PASSED": set(), "FAILED": set(), "ERROR": set()} for name in MISTAKES
    }
    for outcome, name, test in re.findall(
        r"^(PASSED|FAILED|ERROR) test_mistakes.py::Test_(\w+)::(\w+)", done.stdout, re.M
    ):
        outcomes[name][outcome].add(test)
    assert any(outcome["PASSED"] for outcome in outcomes.values()), done.stdout + done.stderr
    sys.stdout.write(done.stdout)  # shown by pytest when a test below fails
    return outcomes


def _grouped(points: list[str]) -> str:
    """The lines of entry_points.txt, each group once."""
    groups: dict[str, list[str]] = {}
    for group, point in zip(points[::2], points[1::2], strict=True):
        groups.setdefault(group, []).append(point)
    return "\n".join(f"{group}\n" + "\n".join(lines) for group, lines in groups.items())


@pytest.mark.parametrize("name", MISTAKES)
def test_the_contract_finds_the_mistake(name: str, found: dict[str, dict[str, set[str]]]) -> None:
    wanted = MISTAKES[name].found_by
    assert found[name]["PASSED"], "every test failed, so this says nothing about the one mistake"
    assert found[name]["FAILED"] | found[name]["ERROR"] == wanted
