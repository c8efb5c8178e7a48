"""Completions by the model that is being trained, a token a step: its decoder layers over a cache of keys and values.

`engine.Engine` is what a generator uses; everything else serves it.
"""
