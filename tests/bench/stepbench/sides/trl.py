"""TRL's SFTTrainer as it comes: its gradient checkpointing, its fused head, its metrics."""

from __future__ import annotations

import tempfile
from typing import Any

from stepbench import trainers
from stepbench.sides import hf
from stepbench.works import Work


def run(work: Work) -> dict[str, Any]:
    """A tokenized data set, read in its order; all else is SFTConfig's default."""
    from trl import SFTConfig, SFTTrainer

    loading = hf.options(work)
    quantization = loading.pop("quantization_config", None)
    steps = trainers.StepMeter(work)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=work.folder,
            args=SFTConfig(
                output_dir=scratch,
                model_init_kwargs=loading,
                per_device_train_batch_size=work.rows,
                max_steps=work.total,
                max_length=work.length,
                train_sampling_strategy="sequential",
                logging_first_step=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **({"optim": "adamw_8bit"} if work.optimizer == "adamw8bit" and work.device == "cuda" else {}),
                **({"use_cpu": True, "bf16": False} if work.device == "cpu" else {}),
            ),
            train_dataset=trainers.dataset(work, labels=False),
            quantization_config=quantization,
            peft_config=hf.lora(work),
            callbacks=[steps],
        )
        trainer.train()
    return steps.meter.result(trainers.first_loss(trainer))
