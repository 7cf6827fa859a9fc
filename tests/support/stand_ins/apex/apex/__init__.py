"""A stand-in for apex: its fused norm, computed by torch and counted."""
