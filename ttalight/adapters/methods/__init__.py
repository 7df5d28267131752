"""Adaptation methods, one a file."""
