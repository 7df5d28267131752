"""The tables of CTA's paper: plans, runs, tables and figures (``ttalight reproduce``)."""
