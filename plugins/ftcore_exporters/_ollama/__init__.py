"""Ollama's Modelfile: how a chat template is told in Go's template language, and how the file is written."""
