"""Scripts that measure the package, draw what it makes, and compare versions of it."""
