"""Decoding over pipeline stages: the first one decodes, the later ones follow."""
