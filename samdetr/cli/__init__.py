"""The commands. Nothing here imports torch before the arguments and the recipe have been checked."""
