"""The science: permute, quantize, fine-tune. Needs torch and numpy; knows nothing of images, YAML or processes."""
