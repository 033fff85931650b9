"""The stages of the pipeline; each exchanges directories with the others and imports none of them."""
