"""A size instead of settings: d and k of every weight, chosen so that the whole network has a wanted size."""
