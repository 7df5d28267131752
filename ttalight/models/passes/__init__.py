"""Other ways to compute the passes of a network: faster, with less memory, over several processes."""
