"""Model families: layers, weight names, mask token and logit alignment of each."""
