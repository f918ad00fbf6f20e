"""The benchmark: ratios against named peers, all measured in one run."""
