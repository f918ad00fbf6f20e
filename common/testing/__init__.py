"""What tests, demo and benchmarks share: virtual machines, stacks, images, checks that nothing is left behind."""
