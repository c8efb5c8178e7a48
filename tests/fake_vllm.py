"""A stand-in for the parts of vLLM that `generator=vllm` calls: real names and rules, transformers underneath.

Signatures are those of vLLM 0.32.0, cut down to what is used, so that a wrong name is a TypeError. It is as strict as
an engine: it writes nothing asleep, forgets weights at sleep level 2, and does not load an adapter id a second time.
"""

from __future__ import annotations

import importlib.machinery
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

VERSION = "0.32.0"


@dataclass(kw_only=True)
class SamplingParams:
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


@dataclass
class Logprob:
    logprob: float


@dataclass
class CompletionOutput:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]


class LLM:
    made: ClassVar[list[LLM]] = []
    """All engines of a test."""

    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool = False,
        dtype: str = "auto",
        revision: str | None = None,
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        hf_overrides: dict[str, Any] | None = None,
        load_format: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        enable_sleep_mode: bool = False,
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
        logprobs_mode: str = "raw_logprobs",
        generation_config: str = "auto",
        distributed_executor_backend: str | None = None,
    ) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        self.arguments = {name: value for name, value in locals().items() if name in LLM.__init__.__annotations__}
        torch.manual_seed(seed)
        if load_format == "dummy":
            assert not list(Path(model).glob("*.safetensors"))
            self.model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(model), dtype=getattr(torch, dtype)
            )
        else:
            self.model = AutoModelForCausalLM.from_pretrained(
                model, dtype=getattr(torch, dtype), **(hf_overrides or {})
            )
        self.model.eval()
        self.events: list[Any] = []
        self.asleep: set[str] = set()
        self.lora: tuple[int, Any] | None = None
        LLM.made.append(self)

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        assert self.arguments["enable_sleep_mode"]
        assert not self.asleep
        self.events.append(("sleep", level))
        self.asleep = {"weights", "kv_cache"}
        if level == 2:
            for parameter in self.model.parameters():
                parameter.data.zero_()

    def wake_up(self, tags: list[str] | None = None) -> None:
        assert self.asleep
        self.events.append(("wake_up", tags))
        self.asleep -= set(tags or self.asleep)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.events.append("reset_prefix_cache")
        return True

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        assert method == "reload_weights"
        assert "weights" not in self.asleep
        self.events.append(method)
        found = self.model.load_state_dict(dict((kwargs or {})["weights_iterator"]), strict=False)
        assert not found.unexpected_keys
        assert {*found.missing_keys} <= {*(self.model._tied_weights_keys or ())}
        return [None]

    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: SamplingParams,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        assert not self.asleep
        self.events.append("generate")
        model = self.adapted(lora_request)
        return [RequestOutput([self.one(model, prompt["prompt_token_ids"], sampling_params)]) for prompt in prompts]

    def adapted(self, request: LoRARequest | None) -> Any:
        from peft import PeftModel

        if request is None:
            return self.model
        assert self.arguments["enable_lora"]
        if self.lora is None or self.lora[0] != request.lora_int_id:
            base = self.lora[1].unload() if self.lora else self.model
            self.lora = (request.lora_int_id, PeftModel.from_pretrained(base, request.lora_path).eval())
            assert self.lora[1].peft_config["default"].r <= self.arguments["max_lora_rank"]
        return self.lora[1]

    def one(self, model: Any, ids: list[int], params: SamplingParams) -> CompletionOutput:
        import torch

        said = CompletionOutput()
        for _ in range(params.max_tokens or 0):
            assert len(ids) + len(said.token_ids) < self.arguments["max_model_len"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*ids, *said.token_ids]])).logits[0, -1].float()
            logprobs = (logits / (params.temperature or 1)).log_softmax(-1)
            token = int(logprobs.exp().multinomial(1) if params.temperature else logprobs.argmax())
            said.token_ids.append(token)
            said.logprobs.append({token: Logprob(float(logprobs[token]))})
            if token in (params.stop_token_ids or ()):
                break
        return said


def install(folder: Path, patch: pytest.MonkeyPatch) -> type[LLM]:
    """Put it where `import vllm` finds it, as an installed package, and let the plan take this machine."""
    import trl

    trl.GRPOTrainer  # noqa: B018  imported before there is a vLLM that it could find
    (info := folder / f"vllm-{VERSION}.dist-info").mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n")
    patch.syspath_prepend(str(folder))
    for name in ("vllm", "vllm.lora", "vllm.lora.request"):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(LLM=LLM, SamplingParams=SamplingParams, LoRARequest=LoRARequest)
        patch.setitem(sys.modules, name, module)
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    patch.setattr("ftcore_generators.vllm._machine", lambda plan: [])
    patch.setattr("ftcore_generators.vllm.NARROWEST", 1)
    patch.setattr(LLM, "made", [])
    return LLM
