"""Quantize: replace each weight by a codebook and one code per subvector (paper section 3.3)."""
