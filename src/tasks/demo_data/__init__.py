"""Data for the demonstrations, made from scikit-learn's digits."""
