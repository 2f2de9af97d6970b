"""The traces of a run: its folder, its log and metrics, pictures, a profile."""
