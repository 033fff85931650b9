"""Training all weights of an exported model beside the intact one: on the run's text, then perhaps on records.

Unlike pruning and fine-tuning by LoRA it works on the small model itself, so what comes out is served as the export is.
"""
