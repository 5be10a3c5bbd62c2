"""Files and buckets: checkpoints, the workdir's lock, metric files, weight files."""
