"""What a run leaves behind: its folder, its log and metrics, pictures, a profile."""
