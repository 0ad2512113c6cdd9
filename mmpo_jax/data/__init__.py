"""From files to batches: rows, records, token ids, padded arrays (docs/design.md, section 4)."""
