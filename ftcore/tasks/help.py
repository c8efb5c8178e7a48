"""`ftcore --help`: what it is, three examples, the kinds and what is installed of each."""

from __future__ import annotations

from collections.abc import Mapping

EXAMPLES = (
    (
        "ftcore +model=smollm2 +trainer=sft '+export=[safetensors]'",
        "fine-tune SmolLM2 with LoRA on the shipped rows, and merge",
    ),
    (
        "ftcore plan +model=qwen3 +trainer=sft data.path=rows.jsonl",
        "see what would run, and every problem, before it does",
    ),
    ("ftcore +model=qwen3 model.tiny=true +trainer=grpo", "GRPO on a tiny random model: nothing is downloaded"),
)


def show_help(tasks: Mapping[str, str]) -> None:
    """Print the help page."""
    from ftcore.catalog import installed
    from ftcore.config import DEFAULTED, KINDS, MANY
    from ftcore.report import heading, note, table

    note("ftcore: fine-tune large language models on your own GPU (or CPU), with plugins for every part.")
    heading("Usage: ftcore [TASK] key=value ...")
    table(tasks.items())
    heading("Examples")
    for command, what in EXAMPLES:
        note(f"  {command}\n      {what}")
    heading("Kinds and installed options")
    catalog = installed()
    rows = []
    for kind in KINDS:
        form = f"{kind}=[...]" if kind in MANY else f"{kind}=..."
        rows.append((form if kind in DEFAULTED else f"+{form}", ", ".join(catalog.names(kind)) or "none installed"))
    table(rows)
    note(
        "\n`+` selects a kind that has no default; without `+` a default is replaced. Other keys: trainer.max_steps=50,"
    )
    note("data.path=rows.jsonl, memory=least, output_dir=my-run; `ftcore plugins trainer/sft` lists an option's keys.")
    note("Sweeps: ftcore -m ... trainer.learning_rate=1e-4,1e-3")
