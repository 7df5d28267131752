"""``python -m ttalight`` is the command ``ttalight``."""

from ttalight.cli import main

main()
