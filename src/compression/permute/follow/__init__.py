"""Follow channels through one forward pass: the permutation groups of any network (paper section 3.2.1)."""
