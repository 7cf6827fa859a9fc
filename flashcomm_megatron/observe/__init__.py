"""What is said: counters, error samples, metrics, messages."""
