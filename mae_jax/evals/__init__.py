"""What a training run is judged by: held-out loss, probes on frozen features, pictures."""
