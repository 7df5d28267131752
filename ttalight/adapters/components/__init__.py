"""Parts that several adaptation methods share."""
