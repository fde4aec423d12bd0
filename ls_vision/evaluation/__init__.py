"""Evaluation of classifiers: predictions for a whole dataset, and the metrics of ImageNet and its variants."""
