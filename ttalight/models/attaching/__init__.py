"""How modules of any kind are taken over for adaptation, called, and given back as they were."""
