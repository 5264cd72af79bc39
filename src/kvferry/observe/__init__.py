"""What lets others see what happens: ranges for profilers."""
