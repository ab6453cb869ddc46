"""A step of one batch: which rows run, which of them are read, and by which rule they are unmasked."""
