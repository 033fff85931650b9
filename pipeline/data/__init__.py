"""From text to blocks of tokens.

`text` reads, tokenises and packs documents; `batches` gives blocks by step; `sequences` says how a model's sequences
begin and documents end; `instructions` words and packs records for fine-tuning; `prepared` keeps packed blocks on disk;
`fetch` gets the demo's model and text. Called by the stages, and by evaluation for its texts.
"""
