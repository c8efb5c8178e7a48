"""Extras: callbacks, trackers, observers."""
