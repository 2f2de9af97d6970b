"""Failures of a run: memory, numbers that are not finite and their replay, processes that are lost."""
