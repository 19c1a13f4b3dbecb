"Nearest-centroid kernels, Lloyd, and what stands on them."
