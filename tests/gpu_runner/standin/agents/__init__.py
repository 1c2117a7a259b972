"""Stands in for the mind process in tests of the runner, so that nothing but the runner writes in the lab."""
