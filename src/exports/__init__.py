"""A model as other programs run it: each format in files of its own, and the package it needs imported there."""
