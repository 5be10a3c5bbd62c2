"""Files and buckets: checkpoints, the lock of a workdir, metrics, weights, caches."""
