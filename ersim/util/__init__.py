"""Small tools that know nothing of the model: atomic files, weighted statistics."""
