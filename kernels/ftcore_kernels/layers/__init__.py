"""Module forwards that use an op, and the functions that bind them to instances."""
