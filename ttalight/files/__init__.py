"""Files: atomic writing, safe reading of untrusted ones, run folders and checkpoints."""
