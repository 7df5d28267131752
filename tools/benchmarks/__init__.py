"""Tools that compare versions of the package, and measure it."""
