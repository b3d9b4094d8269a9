"""Speed as ratios from one interleaved run. Not installed: run from a checkout, as a module."""
