"""Speed as ratios from one interleaved run, and accuracy. Not installed: run from a checkout, as a module."""
