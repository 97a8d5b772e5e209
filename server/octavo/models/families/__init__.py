"""One file a family: config translator, and names of the tensors."""
