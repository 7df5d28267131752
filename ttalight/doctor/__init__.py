"""The doctor: a look at a network and at unlabelled images before anything is adapted."""
