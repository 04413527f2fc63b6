"""Level 2. Attention kernels."""
