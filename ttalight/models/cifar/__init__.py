"""Networks for images of 32 pixels, registered with timm: one family a file."""
