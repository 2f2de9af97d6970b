"""What goes wrong: signals, memory that runs out, numbers that are not finite, and their replay."""
