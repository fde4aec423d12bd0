"""What a trained classifier is worth: predictions on a whole dataset, and the figures of ImageNet and its variants."""
