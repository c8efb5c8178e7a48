"""Acme's plugins for ftcore."""
