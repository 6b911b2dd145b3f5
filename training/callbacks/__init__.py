"""What happens around the loop: progress, files, checkpoints, the average, signals."""
