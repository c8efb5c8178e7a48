"""Kernel sets: the plugins that offer ops for roles."""
