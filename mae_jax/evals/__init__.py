"""Evaluations: held-out loss, linear and k-NN probes, metrics of classification and segmentation, figures."""
