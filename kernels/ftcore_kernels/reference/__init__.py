"""Plain PyTorch twins of `ops`: same names, same signatures, the roundings of Hugging Face transformers."""
