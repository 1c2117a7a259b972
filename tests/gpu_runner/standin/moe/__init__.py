"""Stands in for the training process in tests of the runner: does on command what real ones do at times."""
