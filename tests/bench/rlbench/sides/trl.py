"""TRL's trainers as they come: their gradient checkpointing, their fused heads, their metrics."""

from __future__ import annotations

import tempfile
from typing import Any

from stepbench.sides import hf

from rlbench import rows
from rlbench.meter import TrainingMeter
from rlbench.works import TrainerWork


def run(work: TrainerWork) -> dict[str, Any]:
    """Batch, length and number of steps are the work's, weights are 16 bits; all else is the config's default."""
    import trl
    from transformers import AutoTokenizer

    tokenizer, steps = AutoTokenizer.from_pretrained(work.folder), TrainingMeter(work)
    config, special = {
        "dpo": (trl.DPOConfig, {"max_length": work.length, "train_sampling_strategy": "sequential"}),
        "kto": (trl.KTOConfig, {"max_length": work.length}),
        "grpo": (trl.GRPOConfig, _grpo(work)),
    }[work.trainer]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_class(work, tokenizer)(
            model=work.folder,
            args=config(
                output_dir=scratch,
                model_init_kwargs=hf.options(work),
                per_device_train_batch_size=work.batch,
                max_steps=work.total,
                logging_first_step=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **({"use_cpu": True, "bf16": False} if work.device == "cpu" else {}),
                **special,
            ),
            train_dataset=_ordered(work, rows.dataset(work, tokenizer)),
            processing_class=tokenizer,
            peft_config=hf.lora(work),
            callbacks=[steps],
            **({"reward_funcs": rows.by_place} if work.trainer == "grpo" else {}),
        )
        trainer.train()
        return steps.result(trainer)


def _grpo(work: TrainerWork) -> dict[str, Any]:
    return {
        "num_generations": work.group,
        "max_completion_length": work.length - work.prompt,
        "shuffle_dataset": False,
    }


def _ordered(work: TrainerWork, given: Any) -> Any:
    """ftcore draws KTO's rows once, by its seed, which is TRL's default as well; TRL reads them as they are."""
    return given.shuffle(seed=42) if work.trainer == "kto" else given


def trainer_class(work: TrainerWork, tokenizer: Any) -> Any:
    """TRL's class; GRPO's is given its completions."""
    import trl

    class Given(trl.GRPOTrainer):  # type: ignore[misc]
        def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
            return rows.completions(work, tokenizer, prompt_ids), None

    return {"dpo": trl.DPOTrainer, "kto": trl.KTOTrainer, "grpo": Given}[work.trainer]
