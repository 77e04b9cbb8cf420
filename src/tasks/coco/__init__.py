"""COCO's data, checks and figures."""
