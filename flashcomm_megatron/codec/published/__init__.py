"""Published formats, kept as baselines: complete, torch only."""
