"""Parts of `loss_curves.py`: the same LoRA training by plain Hugging Face and by ftcore, curve against curve."""
