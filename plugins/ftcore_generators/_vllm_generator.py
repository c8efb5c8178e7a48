"""A vLLM engine beside the model that is trained: who starts it, hands weights over, and lets it sleep.

An adapter is written to disk and named in each request (`LoRARequest`), over base weights that vLLM reads from the
checkpoint itself. Without an adapter, the engine starts with no weights and is given the trained ones
(`reload_weights`), which never touch the disk.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ftcore import Completions, Plan, Problem, Refused, Sampling, checkpoint
from ftcore_generators.vllm import RANKS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ftcore_generators.vllm import Config

BATCHED_TOKENS = 4096
"""Tokens of one pass. With vLLM's own number, its first measurement of memory finds too little beside a trainer."""

TALK = 8192
"""Tokens of a conversation, where no trainer says how long rows are and the model has as long a context."""


class VllmGenerator:
    """An engine in this process that has the weights of the last optimizer step whenever it writes."""

    def __init__(self, plan: Plan, config: Config, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self._plan, self._config, self._model, self._tokenizer = plan, config, model, tokenizer
        self._adapted = hasattr(model, "peft_config")
        self._base: Any = model.get_base_model() if self._adapted else model
        self._longest = config.max_length or _longest(plan, self._base)
        self._folder = TemporaryDirectory(prefix="ftcore-vllm-")
        self._engine: Any = None
        self._request: Any = None
        self._asleep = False
        self._old = True
        """Whether the engine's weights are those of an earlier step, or none."""
        self._version = 0

    @property
    def at_once(self) -> int:
        """Completions written at once."""
        return self._config.max_sequences

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> Completions:
        """One completion per prompt, with the log-probabilities that its tokens were drawn with."""
        from vllm import SamplingParams

        from ftcore.answers import end_ids

        self._refuse_longer(max(map(len, prompt_ids), default=0), sampling.max_new_tokens)
        self.begin_rollout()
        settings = SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            stop_token_ids=end_ids(self._base, self._tokenizer),
            logprobs=0,  # of the drawn token, and of no others
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        outputs = self._engine.generate(prompts, sampling_params=settings, use_tqdm=False, lora_request=self._request)
        said = [output.outputs[0] for output in outputs]
        return Completions(
            ids=[list(one.token_ids) for one in said],
            logprobs=[
                [place[token].logprob for token, place in zip(one.token_ids, one.logprobs, strict=True)] for one in said
            ],
        )

    def begin_rollout(self) -> None:
        """Take the memory, and the weights of the last step."""
        woken = self._asleep
        if self._engine is None:
            self._engine = self._start()
        elif woken:
            _free_cached()  # what PyTorch keeps for later is not free for vLLM
            self._engine.wake_up(tags=["weights"])
        if self._old:
            self._hand_over()
        if woken:
            self._engine.wake_up(tags=["kv_cache"])
        self._asleep = False

    def end_rollout(self) -> None:
        """Give the memory back."""
        if self._config.sleep and self._engine is not None and not self._asleep:
            # Level 1 keeps the weights in host memory; level 2 drops them.
            self._engine.sleep(level=1 if self._adapted else 2)
            self._asleep, self._old = True, self._old or not self._adapted

    def weights_changed(self) -> None:
        """The next rollout begins with a handover."""
        self._old = True

    def _start(self) -> Any:
        # The engine must share this process to be handed tensors; vLLM starts one of its own otherwise.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        trainer = self._plan.run.trainer
        with _random_states_kept():  # vLLM seeds the whole process
            return LLM(
                **(self._over_checkpoint() if self._adapted else self._without_weights()),
                skip_tokenizer_init=True,
                dtype=self._plan.dtype,
                seed=trainer.seed if trainer else 0,
                gpu_memory_utilization=self._config.memory_fraction,
                max_model_len=self._longest,
                max_num_seqs=self._config.max_sequences,
                max_num_batched_tokens=max(BATCHED_TOKENS, self._config.max_sequences),
                enforce_eager=self._config.enforce_eager,
                enable_sleep_mode=self._config.sleep,
                # After temperature and nucleus: of the distribution that was drawn from.
                logprobs_mode="processed_logprobs",
                generation_config="vllm",  # no settings of the checkpoint's
                distributed_executor_backend="uni",
            )

    def _over_checkpoint(self) -> dict[str, Any]:
        model, family = self._plan.run.model, self._plan.family
        assert model is not None
        rank = self._model.peft_config[self._model.active_adapter].r
        given = {
            "model": checkpoint.locate(model, family),
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": next(highest for highest in RANKS if highest >= rank),
        }
        if checkpoint.find(model, family).kind == "hub":
            given["revision"] = model.revision
        if model.max_length or model.rope_scaling:
            text = self._base.config.get_text_config()
            names = ("rope_parameters", "max_position_embeddings")
            given["hf_overrides"] = {name: getattr(text, name) for name in names}
        return given

    def _without_weights(self) -> dict[str, Any]:
        folder = Path(self._folder.name) / "config"
        config = copy.deepcopy(self._base.config)
        config.architectures = [type(self._base).__name__]
        config.save_pretrained(folder)
        return {"model": str(folder), "load_format": "dummy"}

    def _hand_over(self) -> None:
        if self._adapted:
            self._request = self._written()
        else:
            weights = published_weights(self._base)
            self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self._engine.reset_prefix_cache()  # keys and values of a prompt are those of the old weights
        self._old = False

    def _written(self) -> Any:
        """The request for the adapter as it is now. vLLM knows adapters by their ids, so each one is new."""
        from vllm.lora.request import LoRARequest

        shutil.rmtree(Path(self._folder.name) / str(self._version), ignore_errors=True)
        self._version += 1
        folder = Path(self._folder.name) / str(self._version)
        active = self._model.active_adapter
        self._model.save_pretrained(folder, selected_adapters=[active], save_embedding_layers=False)
        return LoRARequest(f"policy-{self._version}", self._version, str(folder))

    def _refuse_longer(self, prompt: int, completion: int) -> None:
        if prompt + completion > self._longest:
            message = f"{self._longest} tokens do not hold a prompt of {prompt} and a completion of {completion}"
            fix = f"use generator.max_length={prompt + completion}, or shorter prompts"
            raise Refused(Problem("generator.max_length", message, fix))


def published_weights(base: Any) -> Iterator[tuple[str, Tensor]]:
    """Names in published checkpoints and weights, without copies; a tied weight comes once."""
    from transformers.core_model_loading import revert_weight_conversion

    once: dict[tuple[Any, ...], str] = {}
    state = base.state_dict()
    for name, weight in state.items():
        once.setdefault((weight.data_ptr(), weight.shape) if weight.numel() else (name,), name)
    yield from revert_weight_conversion(base, {name: state[name] for name in once.values()}).items()


def _longest(plan: Plan, base: Any) -> int:
    trainer: Any = plan.run.trainer
    wanted = trainer.max_length + getattr(trainer, "max_completion_length", 0) if trainer else TALK
    context = getattr(base.config.get_text_config(), "max_position_embeddings", None) or wanted
    return int(min(wanted, context))


def _free_cached() -> None:
    import torch

    torch.cuda.empty_cache()


@contextmanager
def _random_states_kept() -> Iterator[None]:
    import numpy as np
    import torch

    plain, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    random.setstate(plain)
    np.random.set_state(arrays)
