"""Attaching of a network to an engine: its modules are taken over, called, and restored as they were."""
